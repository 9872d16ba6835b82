"""Memory that the GPUs of one machine share, for sums without NCCL: set up once, and left alone where it cannot be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpt.comm import Communicator
from gpt.console import human_bytes, log
from gpt.errors import ConfigError, brief

if TYPE_CHECKING:
    import torch

    from gpt.kernels.peer_all_reduce import PeerBuffers

LIMIT_VARIABLE = "GPT_PEER_SUM_BYTES"
# Up to here GPUs that use each other's memory are faster than NCCL in steps: two at 384 KiB and by
# benchmarks/bench_allreduce.py further on, four and eight at 192 KiB and not at 384.
_MAX_RANKS = 8
_LIMIT_BYTES_OF_TWO = 1 << 20
_LIMIT_BYTES = 1 << 18


class PeerSum:
    """Sums small tensors over the ranks through `peers`.  limit_bytes: larger ones are NCCL's."""

    def __init__(self, peers: PeerBuffers, limit_bytes: int):
        from gpt.kernels.peer_all_reduce import can_sum, peer_all_reduce

        self.peers = peers
        self._can_sum = can_sum
        self._sum = peer_all_reduce
        self.limit_bytes = limit_bytes

    def __call__(
        self, tensor: torch.Tensor, stream: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> bool:
        """See gpt.comm.SmallSum."""
        if tensor.nbytes > self.limit_bytes or not self._can_sum(tensor):
            return False
        self._sum(tensor, self.peers, stream, bias)
        return True


def connect_peers(ranks: Communicator, group: torch.distributed.ProcessGroup, device: torch.device) -> PeerSum | None:
    """The sum over GPUs that reach each other's memory, None where NCCL has to do it; all ranks agree on which.

    group: the ranks' NCCL group, over which they exchange handles.  Raises ConfigError for a limit that is no number.
    """
    limit_bytes = _limit_bytes(ranks.size)
    if max(ranks.gather_objects(limit_bytes)) == 0:
        return None
    if not _agree(ranks, _obstacle(ranks, device)):
        return None
    peers = None
    problem = None
    try:
        peers = _share_memory(ranks, group, device)
    except (RuntimeError, ImportError, AttributeError) as error:  # an API of PyTorch's that is not stable yet
        problem = f"{type(error).__name__}: {brief(error)}"
    if not _agree(ranks, problem) or peers is None:
        return None
    log.info("Sums of up to %s read the other GPUs' memory", human_bytes(limit_bytes))
    return PeerSum(peers, limit_bytes)


def _limit_bytes(num_ranks: int) -> int:
    from gpt.kernels.peer_all_reduce import MAX_BYTES

    default = 0 if num_ranks > _MAX_RANKS else _LIMIT_BYTES_OF_TWO if num_ranks == 2 else _LIMIT_BYTES
    text = os.environ.get(LIMIT_VARIABLE, str(default))
    if not text.isdecimal() or int(text) > MAX_BYTES:
        raise ConfigError(
            f"{LIMIT_VARIABLE} is no number of bytes", found=repr(text), allowed=f"0 (NCCL sums all) to {MAX_BYTES}"
        )
    return int(text)


def _obstacle(ranks: Communicator, device: torch.device) -> str | None:
    """Why this rank cannot share memory with all others, before anybody tries."""
    import torch

    if ranks.local_size != ranks.size:
        return "the ranks are on several machines"
    num_gpus = torch.cuda.device_count()
    for other in range(num_gpus):
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"{device} does not reach the memory of GPU {other}"
    return None


def _agree(ranks: Communicator, problem: str | None) -> bool:
    """Whether no rank has a problem."""
    problems = [f"rank {rank}: {found}" for rank, found in enumerate(ranks.gather_objects(problem)) if found]
    if problems:
        log.info("NCCL sums small tensors too: %s", problems[0])
    return not problems


def _share_memory(ranks: Communicator, group: torch.distributed.ProcessGroup, device: torch.device) -> PeerBuffers:
    # Not needed here, and where it is out of order the whole machine notices.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch
    from torch.distributed import _symmetric_memory as symmetric_memory

    from gpt.kernels.peer_all_reduce import NUM_EPOCHS, PeerBuffers, buffer_bytes

    num_bytes = buffer_bytes(ranks.size)
    own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(own, group)
    buffers = tuple(
        own if rank == ranks.rank else handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(ranks.size)
    )
    epochs = torch.zeros((2, NUM_EPOCHS), dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    ranks.barrier()  # all flags are zero before the first one is written
    return PeerBuffers(ranks.rank, buffers, epochs, handle)
