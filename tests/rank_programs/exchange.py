"""Every operation of a communicator on known values; prints `rank r of n: good` where all results are right."""

from __future__ import annotations

import sys

import torch

from gpt.comm import start

comm = start()
own, size = comm.rank, comm.size
total = size * (size + 1) // 2


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"rank {own}: {what}")


for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    # Big enough for every algorithm a library may switch to.
    for shape in ((1,), (3, 5), (300, 700)):
        x = torch.full(shape, own + 1.0, dtype=dtype)
        comm.all_reduce(x)
        check(x.dtype == dtype and torch.equal(x, torch.full(shape, total, dtype=dtype)), f"all_reduce {dtype} {shape}")

# 1 + 2^-8 + ... has no bfloat16; the sum is taken in float32 and rounded once.
x = torch.tensor([1.0 if own == 0 else 2.0**-8], dtype=torch.bfloat16)
comm.all_reduce(x)
check(x.item() == torch.tensor(1.0 + (size - 1) * 2.0**-8).bfloat16().item(), "one rounding")

columns = torch.zeros(4, 6)
columns[:, ::2] = own
view = columns[:, ::2]
comm.all_reduce(view)
check(torch.equal(columns[:, ::2], torch.full((4, 3), (total - size) * 1.0)), "all_reduce in place of a view")
check(torch.equal(columns[:, 1::2], torch.zeros(4, 3)), "neighbours of a view")

for dtype in (torch.float32, torch.bfloat16, torch.int64):
    part = torch.arange(6).view(2, 3).to(dtype) + 10 * own
    for dim in (0, 1, -1):
        expected = torch.cat([torch.arange(6).view(2, 3).to(dtype) + 10 * rank for rank in range(size)], dim)
        check(torch.equal(comm.all_gather(part, dim), expected), f"all_gather {dtype} {dim}")
        check(
            torch.equal(comm.all_gather(part.t(), dim), torch.cat([p.t() for p in expected.chunk(size, dim)], dim)), "t"
        )

# Random values: the order of the sum may be any, but the same bytes must come out everywhere.
x = torch.randn(1000, generator=torch.Generator().manual_seed(own))
comm.all_reduce(x)
check(len(set(comm.gather_objects(x.numpy().tobytes()))) == 1, "the ranks have different sums")

check(comm.broadcast_object({"from": own}) == {"from": 0}, "broadcast")
check(comm.gather_objects((own, "x")) == [(rank, "x") for rank in range(size)], "gather")
check((comm.local_rank, comm.local_size) == (own, size), "local")
for _ in range(5):
    comm.barrier()
sys.stdout.write(f"rank {own} of {size}: good\n")  # in one piece: lines of ranks do not mix
sys.stdout.flush()
comm.barrier()
