"""What GPUs share with each other, in files that the ranks of a test map: for kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt.comm import Communicator
from gpt.kernels.peer_all_reduce import NUM_EPOCHS, PeerBuffers, buffer_bytes


def mapped_buffers(comm: Communicator, folder: Path, first_epoch: int = 0) -> PeerBuffers:
    """first_epoch: where the ranks' counts stand."""
    num_bytes = buffer_bytes(comm.size)
    (folder / str(comm.rank)).write_bytes(bytes(num_bytes))
    comm.barrier()
    buffers = tuple(
        torch.from_file(str(folder / str(rank)), shared=True, size=num_bytes, dtype=torch.uint8)
        for rank in range(comm.size)
    )
    peers = PeerBuffers(comm.rank, buffers, torch.full((2, NUM_EPOCHS), first_epoch, dtype=torch.int32))
    peers.flags()[comm.rank].fill_(first_epoch)
    comm.barrier()
    return peers
