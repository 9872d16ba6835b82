"""Sums through the GPUs' shared memory beside plain sums, one by one and in CUDA graphs; prints `rank r of n: good`."""

from __future__ import annotations

import sys

import torch

from gpt.comm import start
from gpt.comm_nccl import NcclCommunicator
from gpt.kernels.peer_all_reduce import DTYPES, MAX_BYTES, reference
from gpt.runtime.peer_memory import PeerSum, connect_peers

comm = start()
device = torch.device("cuda", comm.local_rank)
torch.cuda.set_device(device)
gpus = NcclCommunicator(comm, device)


def parts_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Every rank's values, which all ranks can make."""
    generators = [torch.Generator().manual_seed(1000 * seed + rank) for rank in range(comm.size)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for generator in generators]


def check(found: torch.Tensor, parts: list[torch.Tensor], what: str) -> None:
    if not torch.equal(found, reference(parts)):
        raise SystemExit(f"rank {comm.rank}: {what}: {found.flatten()[:8]} is not {reference(parts).flatten()[:8]}")


def check_one_by_one(small_sum: PeerSum) -> None:
    for step in range(4):
        for dtype in DTYPES:
            largest = MAX_BYTES // dtype.itemsize
            for shape in ((1,), (3, 7), (1, 6144), (64, 769), (64, 2049), (largest - 1,), (largest,)):
                parts = parts_of(shape, dtype, step)
                x = parts[comm.rank].clone()
                if not small_sum(x):
                    raise SystemExit(f"{shape} {dtype} was left to NCCL")
                check(x, parts, f"{shape} {dtype}, step {step}")
            for shape in ((1, 6144), (64, 3076)):  # in words with their epochs, and in parts
                parts, stream = parts_of(shape, dtype, step), torch.full(shape, 0.5, device=device)
                bias = torch.ones(shape[1:], dtype=dtype, device=device)
                small_sum(parts[comm.rank], stream, bias)
                if not torch.equal(stream, 1.5 + reference([part.float() for part in parts])):
                    raise SystemExit(f"rank {comm.rank}: {shape} {dtype} to the stream, step {step}: {stream}")
    # One that does not begin at a multiple of 16 bytes.
    parts = parts_of((1001,), torch.float16, 0)
    x = parts[comm.rank].clone()[1:]
    small_sum(x)
    check(x, [part[1:] for part in parts], "a view")


def check_in_a_graph() -> None:
    """An odd number of sums per replay, so that the halves of the buffers change places between replays."""
    shapes = ((1, 6144), (8, 6144), (1, 1))
    inputs = [torch.zeros(shape, dtype=torch.float16, device=device) for shape in shapes]
    outputs = [torch.zeros_like(x) for x in inputs]

    def sums() -> None:
        for x, total in zip(inputs, outputs, strict=True):
            total.copy_(x)
            gpus.all_reduce(total)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sums()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        sums()
    for step in range(50):
        parts = [parts_of(shape, torch.float16, step) for shape in shapes]
        for x, values in zip(inputs, parts, strict=True):
            x.copy_(values[comm.rank])
        graph.replay()
        if step % 3 == 0:
            sums()  # between replays, as prompts are
        for total, values in zip(outputs, parts, strict=True):
            check(total, values, f"replay {step}, {list(total.shape)}")


small_sum = connect_peers(comm, gpus.group, device)
if small_sum is None:
    raise SystemExit("the GPUs share no memory: --log_level info would say why")
gpus.small_sum = small_sum
check_one_by_one(small_sum)
check_in_a_graph()
sys.stdout.write(f"rank {comm.rank} of {comm.size}: good\n")
sys.stdout.flush()
comm.barrier()
