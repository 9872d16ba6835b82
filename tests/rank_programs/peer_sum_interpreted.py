"""The kernel in Triton's interpreter, its buffers in files that all ranks map:  peer_sum_interpreted.py FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from gpt.comm import start
from gpt.kernels.peer_all_reduce import DTYPES, MAX_PIECES, PIECE_BYTES, PeerBuffers, buffer_bytes, reference
from gpt.kernels.peer_all_reduce import peer_all_reduce as all_reduce


def values(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bfloat16:  # the interpreter cuts float32 off where a GPU rounds it: sums without a rest
        return torch.randint(-20, 20, (count,), generator=generator).to(dtype)
    return torch.randn(count, generator=generator).to(dtype)


comm = start()
num_bytes = buffer_bytes(comm.size)
own = Path(sys.argv[1]) / str(comm.rank)
own.write_bytes(bytes(num_bytes))
comm.barrier()
buffers = tuple(
    torch.from_file(str(Path(sys.argv[1]) / str(rank)), shared=True, size=num_bytes, dtype=torch.uint8)
    for rank in range(comm.size)
)
# An old count that overflows on the way.
epochs = torch.full((MAX_PIECES,), 2**31 - 4, dtype=torch.int32)
buffers[comm.rank][-4 * MAX_PIECES * comm.size :].view(torch.int32).fill_(2**31 - 4)
comm.barrier()
peers = PeerBuffers(comm.rank, buffers, epochs)
for step in range(4):
    for dtype in DTYPES:
        # Several pieces, an odd end, a single value: each piece counts its own epochs.
        for count in (1, 5, PIECE_BYTES // 2, PIECE_BYTES // 2 + 3, 3 * PIECE_BYTES // 4):
            parts = [values(count, dtype, 1000 * step + 10 * count + rank) for rank in range(comm.size)]
            x = parts[comm.rank].clone()
            all_reduce(x, peers)
            if not torch.equal(x, reference(parts)):
                raise SystemExit(f"rank {comm.rank}: {dtype} {count}, step {step}: {x} is not {reference(parts)}")
sys.stdout.write(f"rank {comm.rank} of {comm.size}: good, epoch {int(epochs[0])}\n")
sys.stdout.flush()
comm.barrier()
