"""The kernel in Triton's interpreter, its buffers in files that all ranks map:  peer_sum_interpreted.py FOLDER"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from mapped_buffers import mapped_buffers

from gpt.comm import start
from gpt.kernels.peer_all_reduce import DTYPES, PIECE_BYTES, peer_all_reduce, reference

all_reduce = partial(peer_all_reduce, word_bytes=64 << 10)  # both ways, without the largest tensors


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bfloat16:  # the interpreter cuts float32 off where a GPU rounds it: sums without a rest
        return torch.randint(-20, 20, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def unrounded(parts: list[torch.Tensor]) -> torch.Tensor:
    return reference([part.float() for part in parts])


def check(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise SystemExit(f"rank {comm.rank}: {what}: {found} is not {expected}")


comm = start()
# Old counts that overflow on the way.
peers = mapped_buffers(comm, Path(sys.argv[1]), 2**31 - 4)
for step in range(2):
    for dtype in DTYPES:
        # Several pieces, an odd end, a single value: each piece counts its own epochs.
        for shape in ((1,), (5,), (2, 130), (PIECE_BYTES // 2 + 3,), (1, 3 * PIECE_BYTES // 4), (2, 17000)):
            if shape[-1] == 17000 and step > 0:
                continue
            parts = [values(shape, dtype, 1000 * step + 10 * shape[-1] + rank) for rank in range(comm.size)]
            x = parts[comm.rank].clone()
            all_reduce(x, peers)
            check(x, reference(parts), f"{dtype} {shape}, step {step}")
            x, stream, bias = parts[comm.rank].clone(), values(shape, torch.float32, 1), values(shape[-1:], dtype, 2)
            for added in (None, bias):
                expected = stream if added is None else stream + added.float()
                total = stream.clone()
                all_reduce(x, peers, total, added)
                check(total, expected + unrounded(parts), f"{dtype} {shape} to a stream, step {step}")
            check(x, parts[comm.rank], f"{dtype} {shape}, left alone, step {step}")
sys.stdout.write(f"rank {comm.rank} of {comm.size}: good, epochs {peers.epochs[:, 0].tolist()}\n")
sys.stdout.flush()
comm.barrier()
