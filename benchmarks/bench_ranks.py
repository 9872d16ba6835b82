"""One engine on all its ranks: time per token and to the first one, what sums cost, memory, ids beside one rank's.

    python3 build.py --n_layer 40 --n_embd 6144 --n_head 48 -mq --random_seed 1 --world_size 2 --output_dir starcoder_2
    mpirun -np 2 python3 benchmarks/bench_ranks.py --engine_dir starcoder_2 --batch_size 1 16 --ids ids.json
    python3 benchmarks/bench_ranks.py --plot benchmarks/results/ranks_gpu.csv

An engine of one rank writes its ids to --ids, those of several compare theirs: `worst_margin` is how far one rank's
choice lies below that of several where they first differ, in standard deviations of the logits.

Times are of whole calls on rank 0: the difference between many new tokens and one, divided.  The limit is the time in
which all GPUs together could read the weights and the filled cache at the speed of a copy.  What sums cost is measured
twice: by steps whose sums do nothing, and as sums alone, one after the other (in a CUDA graph).  Memory is the most
that PyTorch had allocated and what the GPU holds beside PyTorch's pools (the CUDA context, NCCL), on the rank with
most; `build.py --dry_run` predicts it for the same limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RESULTS, Sample, append_csv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.cli import ArgumentParser, add_log_level, positive_int, run_main
from gpt.console import setup_logging

if TYPE_CHECKING:
    import torch
    from gpu_cases import Shape
    from gpu_measure import Ceilings, Timing
    from gpu_systems import Ours

    from gpt.engine.folder import EngineInfo


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, help="of random weights or any others; the name is the rows' model")
    parser.add_argument("--batch_size", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--input_len", type=positive_int, default=64)
    parser.add_argument("--output_len", type=positive_int, default=64, help="at least 2")
    parser.add_argument("--repeat", type=positive_int, default=3, help="rounds")
    parser.add_argument("--nccl", action="store_true", help="measure steps whose sums are all NCCL's as well")
    parser.add_argument("--ids", type=Path, help="JSON file of one rank's ids: written by one rank, read by several")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--csv", type=Path, default=RESULTS / "ranks_gpu.csv")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw what this file holds")
    add_log_level(parser, default="warning")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: plot(args.plot) if args.plot else run(args))


def run(args: argparse.Namespace) -> int:
    from gpu_cases import Shape

    from gpt.engine.folder import open_engine
    from gpt.errors import ConfigError

    if args.engine_dir is None or args.output_len < 2:
        raise ConfigError("bench_ranks.py needs --engine_dir, and --output_len of at least 2")
    bench = Bench(args, open_engine(args.engine_dir))
    for batch_size in args.batch_size:
        bench.measure(Shape(batch_size, args.input_len, args.output_len))
    return 0


class Bench:
    """An engine that is loaded once and measured in several shapes; rank 0 writes and prints."""

    def __init__(self, args: argparse.Namespace, info: EngineInfo):
        import torch
        from gpu_measure import allocated_bytes, measure_ceilings
        from gpu_systems import Ours, Setup

        from gpt.runtime.load import device_of_rank, pick_device
        from gpt.runtime.ranks import join_ranks

        self.args = args
        self.info = info
        self.device = device_of_rank(pick_device(args.device), join_ranks(info))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.ceilings: Ceilings = measure_ceilings(str(self.device))
        allocated_bytes(str(self.device))  # the pools are empty again
        begin = time.perf_counter()
        self.system: Ours = Ours(Setup(info, args.device, args.engine_dir))
        allocated_bytes(str(self.device))
        self.load_s = time.perf_counter() - begin
        self.session: Any = self.system.session
        self.comm = self.session.comm

    def measure(self, shape: Shape) -> None:
        from bench_gpu import random_prompts
        from gpu_cases import prefill_flops, step_bytes

        prompts = random_prompts(self.info.model, shape)
        timing, needed_bytes = self._time_and_memory(shape, prompts)
        first, token = Sample(timing.first_token_ms), Sample(timing.token_ms)
        ranks = self.comm.size
        whole = dataclasses.replace(self.info.build, world_size=1)
        copy = min(self.comm.gather_objects(self.ceilings.copy_gb_per_s))
        limit_ms = step_bytes(self.info.model, whole, shape) / ranks / copy / 1e6
        tflops = prefill_flops(self.info.model, shape) / first.median / 1e9 / ranks
        row: dict[str, object] = {
            **describe(self.device, ranks),
            "model": self.args.engine_dir.name,
            "dtype": self.info.build.dtype,
            "ranks": ranks,
            "batch_size": shape.batch_size,
            "input_len": shape.input_len,
            "output_len": shape.output_len,
            "repeat": self.args.repeat,
            **spread("token_ms", timing.token_ms),
            "tokens_per_s": round(shape.batch_size / token.median * 1e3, 1),
            **spread("first_token_ms", timing.first_token_ms),
            "prefill_tokens_per_s": round(shape.batch_size * shape.input_len / first.median * 1e3, 1),
            "prefill_tflops_per_rank": round(tflops, 2),
            "gemm_tflops": round(self.ceilings.gemm_tflops, 1),
            "copy_gb_per_s": round(copy, 1),
            "limit_ms": round(limit_ms, 4),
            "times_limit": round(token.median / limit_ms, 3),
            "load_s": round(self.load_s, 2),
            "first_call_s": round(timing.first_call_s, 2),
            **self._sums(shape, prompts, token.median),
            **self._memory(shape, needed_bytes),
            **self._compare(shape, prompts, timing.tokens),
        }
        if self.comm.rank == 0:
            append_csv(self.args.csv, [row])
            print("; ".join(f"{name} {row[name]}" for name in SHOWN if row[name] != ""), flush=True)

    def _time(self, shape: Shape, prompts: list[list[int]], repeat: int) -> Timing:
        from gpu_measure import measure

        def any_rank(disturbed: bool) -> bool:
            return any(self.comm.gather_objects(disturbed))

        # The number of rounds must not depend on a rank's own clock.
        return measure(
            self.system, shape, prompts, repeat=repeat, row_seconds=math.inf, base_bytes=None, any_rank=any_rank
        )

    def _sums(self, shape: Shape, prompts: list[list[int]], token_ms: float) -> dict[str, object]:
        """Of one step: the sums' number and size, a step without them, their time alone, and with NCCL for all."""
        names = ("sums_per_step", "sum_bytes", "no_sums_token_ms", "sums_share", "sum_us", "sums_alone_share")
        found: dict[str, object] = dict.fromkeys((*names, "nccl_token_ms"), "")
        if self.comm.size == 1:
            return found
        import torch
        from bench_allreduce import sum_us

        from gpt.dtypes import torch_dtype

        dtype = torch_dtype(self.info.build.dtype)
        x = torch.zeros((shape.batch_size, self.info.model.n_embd), dtype=dtype, device=self.session.device)
        us = sum_us(self.comm, lambda: self.comm.all_reduce(x), on_gpu=self.device.type == "cuda")
        num_sums = 2 * self.info.model.n_layer
        silent = self._variant(shape, prompts, WithoutSums(self.comm))
        found |= {
            "sums_per_step": num_sums,
            "sum_bytes": x.nbytes,
            "no_sums_token_ms": round(silent, 4),
            "sums_share": round(1 - silent / token_ms, 4),
            "sum_us": round(us, 2),
            "sums_alone_share": round(num_sums * us / token_ms / 1e3, 4),
        }
        small_sum = self.comm.small_sum
        if self.args.nccl and small_sum is not None and x.nbytes <= small_sum.limit_bytes:
            self.comm.small_sum = None
            found["nccl_token_ms"] = round(self._variant(shape, prompts, self.comm), 4)
            self.comm.small_sum = small_sum
        self.session.exchange_through(self.comm)
        return found

    def _variant(self, shape: Shape, prompts: list[list[int]], comm: Any) -> float:
        self.session.exchange_through(comm)
        return Sample(self._time(shape, prompts, repeat=1).token_ms).median

    def _time_and_memory(self, shape: Shape, prompts: list[list[int]]) -> tuple[Timing, int]:
        """The times, and the bytes that the rank with most needed of its GPU; 0 on a CPU."""
        import torch

        if self.device.type != "cuda":
            return self._time(shape, prompts, self.args.repeat), 0
        torch.cuda.reset_peak_memory_stats(self.device)
        timing = self._time(shape, prompts, self.args.repeat)
        free, total = torch.cuda.mem_get_info(self.device)
        beside = total - free - torch.cuda.memory_reserved(self.device)
        return timing, max(self.comm.gather_objects(torch.cuda.max_memory_allocated(self.device) + beside))

    def _memory(self, shape: Shape, needed_bytes: int) -> dict[str, object]:
        from gpu_cases import limits

        from gpt.engine.plan import Plan

        plan = Plan.make(self.info.model, dataclasses.replace(self.info.build, **limits([shape])))
        return {
            "weight_bytes": plan.needed.weights,
            "cache_bytes": plan.needed.kv_cache,
            "predicted_bytes": plan.gpu_bytes,
            "needed_bytes": needed_bytes or "",
            "needed_over_predicted": round(needed_bytes / plan.gpu_bytes, 4) if needed_bytes else "",
        }

    def _compare(self, shape: Shape, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, object]:
        """With the ids of one rank, which other engines of the same weights have written."""
        nothing: dict[str, object] = {"rows_like_one_rank": "", "worst_margin": ""}
        if self.args.ids is None:
            return nothing
        path, key = self.args.ids, str(shape)
        stored = json.loads(path.read_text()) if self.comm.rank == 0 and path.is_file() else {}
        if self.comm.size == 1:
            path.write_text(json.dumps({**stored, key: tokens}))
            return nothing
        expected = self.comm.broadcast_object(stored.get(key))
        if expected is None:
            return nothing
        from gpu_measure import worst_margin

        margin = worst_margin(self.system, prompts, expected, tokens)
        same = sum(ours == theirs for ours, theirs in zip(expected, tokens, strict=True))
        return {
            "rows_like_one_rank": f"{same}/{len(tokens)}",
            "worst_margin": "" if margin is None else round(margin, 5),
        }


class WithoutSums:
    """A communicator whose sums do nothing: what else a step costs."""

    def __init__(self, comm: Any):
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def small_sum(self, tensor: torch.Tensor, stream: object = None, bias: object = None) -> bool:
        """The addition to the stream belongs to a sum that takes it along."""
        return self._comm.small_sum is not None and tensor.nbytes <= self._comm.small_sum.limit_bytes


SHOWN = (
    "model", "ranks", "batch_size", "token_ms", "times_limit", "first_token_ms", "prefill_tokens_per_s",
    "no_sums_token_ms", "sums_share", "sum_us", "nccl_token_ms", "needed_over_predicted", "rows_like_one_rank",
    "worst_margin", "load_s", "first_call_s",
)  # fmt: skip


def spread(name: str, values: Sequence[float]) -> dict[str, object]:
    sample = Sample(values)
    return {name: round(sample.median, 4), f"{name}_min": round(min(values), 4), f"{name}_max": round(max(values), 4)}


def describe(device: torch.device, ranks: int) -> dict[str, object]:
    from bench_gpu import device_name, installed
    from common import describe_versions

    names = installed("torch", "triton")
    return {"device": f"{ranks} x {device_name(str(device))}", "versions": describe_versions(*names)}


def plot(path: Path) -> int:
    from gpu_plots import draw_ranks

    print(f"drew {draw_ranks(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
