"""All that is measured on several GPUs of one machine, the most valuable first, in a bounded time.

    python3 benchmarks/bench_node.py --ranks 8 --out results --budget 470
    python3 benchmarks/bench_node.py --ranks 4 --out results --device cpu --tiny        the same steps, rehearsed

Two ranks: the tests for GPU ranks, the sum's time, StarCoder's shape (15.5 B) on one and two GPUs with 32 prompts' ids
compared.  Four: SantaCoder's too, by the commands of a user.  Eight: GPT-175B first.  Steps that use different GPUs run
at the same time; one that fails or takes too long is told, and the others go on.  --out gets ranks.csv, allreduce.csv,
log.txt with what every step printed, and table.txt, which is printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from node_steps import Plan, Step

from gpt.cli import ArgumentParser, run_main

ROOT = Path(__file__).resolve().parent.parent
MARK = "BENCH_NODE_STEP"  # by which a step's processes are known
# Multicast between GPUs stays off: a program that uses it can put a machine's GPUs out of service.
VARIABLES = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
# Open MPI 4 and 5: as root, more ranks than it sees slots, and not each rank tied to a single core.
VARIABLES |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
VARIABLES |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
VARIABLES |= {"OMPI_MCA_hwloc_base_binding_policy": "none", "PRTE_MCA_hwloc_default_binding_policy": "none"}
VARIABLES |= {"GPT_RANK_TIMEOUT": "300", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="GPUs to use")
    parser.add_argument("--out", type=Path, default=Path("node"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the steps whose names contain one of these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models instead of the published shapes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_main(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_node-") as scratch:
        plan = Plan(args, out, Path(scratch))
        runner = Runner(out / "log.txt", args.budget)
        with ThreadPoolExecutor() as background:
            runner.background = {step.name: background.submit(runner.run, step) for step in plan.engines()}
            for group in plan.groups():
                runner.run_group([step for step in group if is_wanted(step, args.only)])
    (out / "table.txt").write_text(table(out, runner))
    print((out / "table.txt").read_text(), flush=True)
    return 1 if runner.failed else 0


def is_wanted(step: Step, only: Sequence[str] | None) -> bool:
    return only is None or any(name in step.name for name in only)


class Runner:
    """Runs steps within their limits and what is left of the budget, and keeps what they print."""

    def __init__(self, log: Path, budget_s: float):
        self._log = log
        self._begin = time.monotonic()
        self._budget_s = budget_s
        self.results: list[tuple[str, str, float]] = []
        self.variables = {**VARIABLES, "PYTHONPATH": str(ROOT)}
        self.background: dict[str, Future[None]] = {}

    @property
    def failed(self) -> bool:
        return any(how != "done" for _, how, _ in self.results)

    def run_group(self, steps: Sequence[Step]) -> None:
        with ThreadPoolExecutor(max(1, len(steps))) as pool:
            list(pool.map(self.run, steps))

    def run(self, step: Step) -> None:
        if step.needs in self.background:
            self.background[step.needs].result()
        begin = time.monotonic()
        left = self._budget_s - (begin - self._begin)
        deadline = begin + min(step.limit_s, left)
        how, text = ("done", "") if left > 5 else ("left out", "")
        for command in step.commands:
            if how != "done":
                break
            how, output = self._command(command, step.gpus, deadline)
            text += f"$ {' '.join(command)}\n{output}\n"
        if how != "done" and step.instead is not None:
            self.variables |= [step.instead]
        seconds = time.monotonic() - begin
        self.results.append((step.name, how, seconds))
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"==== {step.name}: {how}, {seconds:.1f} s\n{text}\n")
        shown = text if how != "done" else "\n".join(text.splitlines()[-6:])
        print(
            f"[{time.monotonic() - self._begin:4.0f} s] {step.name}: {how}, {seconds:.1f} s\n{shown[-3000:]}",
            flush=True,
        )

    def _command(self, command: Sequence[str], gpus: tuple[int, ...], deadline: float) -> tuple[str, str]:
        mark = uuid.uuid4().hex
        environ = {**os.environ, **self.variables, MARK: mark}
        if gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(list(command), cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(max(0.1, deadline - time.monotonic()))
                how = "done" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                how = "too long"
            end_step(f"{MARK}={mark}")
            process.wait()
            output.seek(0)
            return how, output.read()


def end_step(variable: str) -> None:
    """Ends what a step has started and what is still there, wherever its mpirun has put it: ranks hold their GPU."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if has_variable(entry, variable)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if left and number == signal.SIGTERM:
            time.sleep(2.0)


def has_variable(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def table(out: Path, runner: Runner) -> str:
    """What was measured, in short."""
    lines = [f"{name:<28} {how:<14} {seconds:6.1f} s" for name, how, seconds in runner.results]
    names = ("model", "batch_size", "token_ms", "times_limit", "first_token_ms", "prefill_tokens_per_s", "sums_share",
             "sum_us", "nccl_token_ms", "needed_over_predicted", "rows_like_one_rank", "worst_margin")  # fmt: skip
    lines += ["", *columns(out / "ranks.csv", names, {})]
    sums = ("device", "bytes", "way", "us_median", "us_min", "busbw_gb_per_s")
    lines += ["", *columns(out / "allreduce.csv", sums, {"bytes": {"4096", "12288", "65536", "262144", "1048576"}})]
    return "\n".join(lines) + "\n"


def columns(path: Path, names: Sequence[str], only: dict[str, set[str]]) -> list[str]:
    """Some columns of a CSV file, of the rows with the values of `only`, as aligned text."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] in values for name, values in only.items())]
    cells = [list(names), *([row[name] or "-" for name in names] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(names))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


if __name__ == "__main__":
    sys.exit(main())
