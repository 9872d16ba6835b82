"""The sum over GPUs: NCCL called in a loop as its own tests do, NCCL in a CUDA graph, and ours in a CUDA graph, by
words that carry their epoch and by parts that are read.

mpirun -np 2 python3 benchmarks/bench_allreduce.py          (or srun --mpi=none --ntasks 2 ...)

A decode step has two sums per layer of batch x hidden size x 2 bytes: 12 KB to 1 MB.  Two floors: each GPU receives
(R - 1) x the bytes over its link, and a kernel that waits for a peer costs a launch and two trips.  algbw is bytes over
time, busbw is algbw x 2 (R - 1) / R, as nccl-tests define them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from common import RESULTS, Sample, append_csv, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.comm import Communicator, start
from gpt.comm_nccl import NcclCommunicator
from gpt.kernels.peer_all_reduce import MAX_BYTES, MAX_WORD_BYTES, peer_all_reduce
from gpt.runtime.peer_memory import LIMIT_VARIABLE, connect_peers

# Some milliseconds, in which 100 calls can be queued.
_SLEEP_CYCLES = 8_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=int, nargs="+", default=[4, 8, 12, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--sums", type=int, default=100, help="sums per measurement, one after the other")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=RESULTS / "allreduce_gpu.csv")
    args = parser.parse_args()
    os.environ[LIMIT_VARIABLE] = str(MAX_BYTES)
    ranks = start()
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    gpus = NcclCommunicator(ranks, device)
    small_sum = connect_peers(ranks, gpus.group, device)
    if small_sum is None:
        raise SystemExit("the GPUs share no memory")
    rows = []
    for num_bytes in (1024 * kb for kb in args.kb):
        x = torch.zeros(num_bytes // 2, dtype=torch.float16, device=device).view(getattr(torch, args.dtype))

        def nccl(x: torch.Tensor = x) -> None:
            dist.all_reduce(x, group=gpus.group)

        ways = {"nccl, calls": repeat(nccl, args.sums), "nccl, graph": graph(nccl, args.sums)}
        for name, word_bytes in {"words": MAX_WORD_BYTES, "parts": 0}.items():
            if name == "words" and num_bytes > MAX_WORD_BYTES:
                continue
            ways[f"peer memory, {name}, graph"] = graph(
                partial(peer_all_reduce, x, small_sum.peers, word_bytes=word_bytes), args.sums
            )
        rows += measure(ranks, ways, nccl, num_bytes, args)
    if ranks.rank == 0:
        append_csv(args.csv, rows)
    ranks.barrier()


def repeat(step: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    run()
    return run


def graph(step: Callable[[], object], count: int) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        repeat(step, 3)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):  # NCCL's own thread asks the GPU meanwhile
        repeat(step, count)
    return captured.replay


def slowest_us(ranks: Communicator, run: Callable[[], None], align: Callable[[], object]) -> float:
    """The slowest rank's time of `run` on its GPU.

    Ranks leave a barrier up to a millisecond apart, and launching takes its time: every GPU is kept busy until its work
    is queued, and a sum, `align`, makes all of them begin together.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    ranks.barrier()
    torch.cuda._sleep(_SLEEP_CYCLES)
    align()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(max(ranks.gather_objects(begin.elapsed_time(end) * 1e3)))


def sum_us(
    ranks: Communicator, step: Callable[[], object], *, on_gpu: bool, count: int = 100, rounds: int = 5
) -> float:
    """The median time of a sum among `count` in a row, on a GPU in a CUDA graph."""
    if on_gpu:
        run = graph(step, count)
        return Sample([slowest_us(ranks, run, step) for _ in range(rounds + 1)][1:]).median / count
    repeat(step, 3)
    begin = time.perf_counter()
    repeat(step, count)
    return (time.perf_counter() - begin) / count * 1e6


def measure(
    ranks: Communicator,
    ways: dict[str, Callable[[], None]],
    align: Callable[[], object],
    num_bytes: int,
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    """us per sum of each way, in turn; of each repetition the slowest rank's."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeat + 1):
        for name, run in ways.items():
            times[name].append(slowest_us(ranks, run, align) / args.sums)
    rows: list[dict[str, object]] = []
    nccl_version = ".".join(map(str, torch.cuda.nccl.version()))
    peer = Sample(times["nccl, calls"][1:]).median
    for name, values in times.items():
        us = Sample(values[1:])  # the first round warms up
        algbw = num_bytes / us.median / 1e3
        rows.append(
            {
                "device": f"{ranks.size} x {torch.cuda.get_device_name()}",
                "versions": f"{describe_versions('torch', 'triton')} nccl {nccl_version}",
                "dtype": args.dtype,
                "bytes": num_bytes,
                "way": name,
                "us_median": round(us.median, 3),
                "us_min": round(min(us.values), 3),
                "us_max": round(max(us.values), 3),
                "algbw_gb_per_s": round(algbw, 3),
                "busbw_gb_per_s": round(algbw * 2 * (ranks.size - 1) / ranks.size, 3),
                "of_nccl_calls": round(us.median / peer, 3),
            }
        )
        if ranks.rank == 0:
            print(f"{num_bytes // 1024:5d} KB  {name:<26} {us} us, {algbw:7.2f} GB/s", flush=True)
    return rows


if __name__ == "__main__":
    main()
