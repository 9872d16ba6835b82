"""Our engine beside its peers on one GPU: same random weights of real shapes, prompts and lengths, in one call.

    python3 benchmarks/bench_gpu.py                                     everything, in about eight minutes
    python3 benchmarks/bench_gpu.py --decode --case gpt2-xl --system ours ours_int8 ours_int4 hf_static
    python3 benchmarks/bench_gpu.py --plot benchmarks/results/gpu.csv --plot_dir docs      plots and a table

A row is appended to the CSV file as soon as it is measured, the most important ones first, until --budget is spent.
Times are of whole calls, prompts as lists in and token ids as lists out: first_token_ms of calls for one token,
token_ms the difference to calls for all tokens, divided (where it is not above zero, both run again).  The limit is the
time in which the weights and the filled part of the cache could be read at the speed that a copy reaches in the same
call; prompts are compared with a measured product.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import RESULTS, Sample, append_csv, describe_device, describe_versions
from gpu_rows import COLUMNS, compare, describe_row, numbers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_plan import PEERS, QUANTISED, START_SECONDS, SYSTEMS, Work, describe, plan

from gpt.cli import ArgumentParser, add_log_level, positive_int, run_main
from gpt.console import setup_logging
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import ConfigError

if TYPE_CHECKING:
    from gpu_cases import Case, Shape
    from gpu_measure import Budget, Ceilings
    from gpu_systems import Setup, System

    from gpt.config import ModelConfig


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", action="store_true", help="time per token at the batch sizes of each case")
    parser.add_argument("--throughput", action="store_true", help="a large batch with long prompts (1.5B)")
    parser.add_argument("--prefill", action="store_true", help="long prompts' step against a product (1.5B)")
    parser.add_argument("--profile", action="store_true", help="time of each kernel in one of our steps")
    parser.add_argument("--prompt_profile", action="store_true", help="the same of long prompts' step (1.5B)")
    parser.add_argument("--load", action="store_true", help="run.py as a process, to its first token (1.5B)")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="models; none of the six flags above: all six")
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all installed")
    parser.add_argument("--batch_size", type=positive_int, nargs="+", help="of --decode and --profile")
    parser.add_argument("--input_len", type=positive_int, default=128, help="of --decode and --profile")
    parser.add_argument("--output_len", type=positive_int, default=128, help="of --decode and --profile, at least 2")
    parser.add_argument("--throughput_shape", type=positive_int, nargs=3, default=[64, 512, 256], metavar="N")
    parser.add_argument("--prefill_shape", type=positive_int, nargs=2, default=[8, 1024], metavar="N")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="float16")
    parser.add_argument("--build_flags", default="", help="more flags of build.py for our engine, in one string")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--repeat", type=positive_int, default=5, help="rounds at most")
    parser.add_argument("--row_seconds", type=float, default=8.0, help="no new round of a row after that")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS / "gpu.csv")
    parser.add_argument("--profile_csv", type=Path, default=RESULTS / "gpu_kernels.csv")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="CSV", help="only draw what these files hold")
    parser.add_argument("--plot_dir", type=Path, metavar="FOLDER", help="for the plots (default: beside the CSV files)")
    add_log_level(parser, default="warning")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: draw_plots(args.plot, args.plot_dir) if args.plot else run(args))


def run(args: argparse.Namespace) -> int:
    from gpu_measure import Budget, measure_ceilings

    budget = Budget(args.budget)
    works = list(plan(args))
    import torch

    if torch.device(args.device).type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("there is no GPU here", found=f"--device {args.device}", hint="--device cpu --case tiny")
        torch.cuda.set_device(torch.device(args.device).index or 0)
    ceilings = measure_ceilings(args.device)
    reached = f"copy {ceilings.copy_gb_per_s:.0f} GB/s, product {ceilings.gemm_tflops:.3g} TFLOP/s"
    print(f"{device_name(args.device)}: {reached}", flush=True)
    bench = Bench(args, budget, ceilings)
    for work in works:
        bench.run(work)
    draw_plots([path for path in (args.csv, args.profile_csv) if path in bench.written], args.plot_dir)
    print(
        f"{args.budget - budget.left:.0f} s, {bench.num_failed} failed, {bench.num_skipped} left out for lack of time"
    )
    return 1 if bench.num_failed else 0


class Bench:
    """Runs works one after the other and writes their rows."""

    def __init__(self, args: argparse.Namespace, budget: Budget, ceilings: Ceilings):
        self.args = args
        self.budget = budget
        self.ceilings = ceilings
        self.ours: dict[tuple[str, Shape], list[list[int]]] = {}
        self.written: set[Path] = set()
        self.num_failed = self.num_skipped = 0

    def run(self, work: Work) -> None:
        """What goes wrong is told and ends this work alone."""
        needed = max(START_SECONDS.get(work.system, 0.0), START_SECONDS.get(work.kind, 0.0))
        if self._is_over(work, needed):
            return
        try:
            with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder:
                self._run(work, Path(folder))
        except Exception:  # a peer may raise anything, and the rows behind it are still wanted
            self.num_failed += 1
            traceback.print_exc()
            print(f"failed: {describe(work)}", flush=True)

    def _run(self, work: Work, scratch: Path) -> None:
        from gpu_measure import allocated_bytes

        base_bytes = allocated_bytes(self.args.device)
        setup = self._setup(work, scratch)
        if work.kind == "load":
            self._load(work, setup)
            return
        system = make_system(work.system, setup)
        for shape in work.shapes:
            if self._is_over(work, 0.0):
                return
            if work.kind in ("profile", "prompt_profile"):
                self._profile(work, setup, system, shape)
            else:
                self._time(work, setup, system, shape, base_bytes)

    def _is_over(self, work: Work, needed_s: float) -> bool:
        if self.budget.left > needed_s:
            return False
        self.num_skipped += 1
        print(f"left out: {describe(work)}: {max(0.0, self.budget.left):.0f} s left of --budget", flush=True)
        return True

    def _setup(self, work: Work, scratch: Path) -> Setup:
        from gpu_cases import build_flags
        from gpu_systems import Setup

        import build
        from gpt.engine.folder import open_engine

        folder = scratch / "engine"
        flags = build_flags(work.case, self.args.dtype, self.args.seed, list(work.shapes))
        more = shlex.split(self.args.build_flags + " " + QUANTISED.get(work.system, ""))
        build.run_build([*flags, *more, "--output_dir", str(folder), "--log_level", self.args.log_level])
        return Setup(open_engine(folder), self.args.device, scratch)

    def _time(self, work: Work, setup: Setup, system: System, shape: Shape, base_bytes: int | None) -> None:
        from gpu_measure import measure, worst_margin

        prompts = random_prompts(work.case, shape)
        seconds = min(self.args.row_seconds, self.budget.left)
        if work.system in PEERS:  # those do not allocate through PyTorch here
            base_bytes = None
        timing = measure(system, shape, prompts, repeat=self.args.repeat, row_seconds=seconds, base_bytes=base_bytes)
        ours = self.ours.setdefault((work.case.name, shape), timing.tokens) if work.system == "ours" else None
        reference = self.ours.get((work.case.name, shape)) if ours is None else None
        margin = worst_margin(system, prompts, reference, timing.tokens) if reference is not None else None
        row = self._row(work, setup, shape, len(timing.first_token_ms))
        row |= numbers(setup.info, shape, timing, self.ceilings) | compare(reference, timing.tokens, margin)
        self._write(self.args.csv, [{name: row.get(name, "") for name in COLUMNS}])
        print(describe_row(row), flush=True)

    def _load(self, work: Work, setup: Setup) -> None:
        from gpu_load import measure_load

        (shape,) = work.shapes
        try:
            timing = measure_load(setup, random_prompts(work.case, shape), repeat=3, timeout_s=self.budget.left)
        except subprocess.TimeoutExpired:
            self._is_over(work, self.budget.left)
            return
        load = Sample(timing.seconds)
        row = self._row(work, setup, replace(shape, output_len=1), len(load.values)) | {
            "load_s": round(load.median, 3),
            "load_s_min": round(min(load.values), 3),
            "load_s_max": round(max(load.values), 3),
            "load_cold_s": round(timing.cold_s, 3),
            **{f"load_{name}_s": round(seconds, 3) for name, seconds in timing.stages_s.items()},
            "load_two_tokens_s": round(timing.two_tokens_s, 3),
            "weight_bytes": timing.num_bytes,
        }
        self._write(self.args.csv, [{name: row.get(name, "") for name in COLUMNS}])
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in timing.stages_s.items())
        print(f"{describe(work)}: {load} s from the start of run.py to its end, one token; {stages};", end=" ")
        print(f"kernels not compiled yet: {timing.cold_s:.2f}; two tokens: {timing.two_tokens_s:.2f}", flush=True)

    def _profile(self, work: Work, setup: Setup, system: System, shape: Shape) -> None:
        from datetime import datetime, timezone

        from gpu_measure import profile_step

        kernels = profile_step(system, shape, random_prompts(work.case, shape), self.args.device)
        total = sum(kernel.us for kernel in kernels)
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = self._row(work, setup, shape, 1)
        rows = [
            {
                "run": stamp,
                **row,
                "kernel": kernel.name,
                "calls_per_step": round(kernel.calls, 2),
                "us_per_step": round(kernel.us, 3),
                "share": round(kernel.us / total, 4),
            }
            for kernel in kernels
        ]
        if not rows:
            raise RuntimeError("the profiler saw no kernels")
        self._write(self.args.profile_csv, rows)
        print(f"{describe(work)}: {total:.0f} us of kernels per step, the longest:", flush=True)
        for kernel in kernels[:8]:
            print(f"  {kernel.us:9.1f} us {kernel.us / total:6.1%} {kernel.calls:7.1f} x {kernel.name[:90]}")

    def _row(self, work: Work, setup: Setup, shape: Shape, repeat: int) -> dict[str, object]:
        packages = {"vllm": "vllm", "ctranslate2": "ctranslate2"}.get(work.system)
        return {
            "device": device_name(self.args.device),
            "versions": describe_versions(*installed("torch", "triton", "transformers", packages)),
            "kind": work.kind,
            "case": work.case.name,
            "dtype": setup.info.build.dtype,
            "batch_size": shape.batch_size,
            "input_len": shape.input_len,
            "output_len": shape.output_len,
            "system": work.system,
            "repeat": repeat,
        }

    def _write(self, path: Path, rows: list[dict[str, object]]) -> None:
        append_csv(path, rows)
        self.written.add(path)


def make_system(name: str, setup: Setup) -> System:
    from gpu_peers import CTranslate2, Vllm
    from gpu_systems import HfEager, HfStatic, Ours

    if name == "hf_compile":
        return HfStatic(setup, compiled=True)
    if name in QUANTISED:
        return Ours(setup)
    kinds = {"ours": Ours, "hf_static": HfStatic, "hf_eager": HfEager, "vllm": Vllm, "ctranslate2": CTranslate2}
    system: System = kinds[name](setup)
    return system


def random_prompts(model: Case | ModelConfig, shape: Shape) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (shape.batch_size, shape.input_len), generator=generator).tolist()


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else describe_device()


def installed(*packages: str | None) -> list[str]:
    from gpu_systems import is_installed

    return [package for package in packages if package is not None and is_installed(package)]


def draw_plots(paths: Sequence[Path], folder: Path | None) -> int:
    from gpu_plots import draw, latest_rows, table

    for path in paths:
        print(table(latest_rows(path)), end="")
    if paths and not installed("matplotlib"):
        print(f"no matplotlib here: bench_gpu.py --plot {' '.join(map(str, paths))} draws elsewhere")
        return 0
    for path in paths:
        for file in draw(path, folder or path.parent):
            print(f"drew {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
