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
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.cli import ArgumentParser, run_main
from gpt.launch import find_mpirun

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LIMIT = "GPT_PEER_SUM_BYTES"
MARK = "BENCH_NODE_STEP"  # by which a step's processes are known
# Multicast between GPUs stays off: a program that uses it can put a machine's GPUs out of service.
VARIABLES = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
# Open MPI 4 and 5: as root, more ranks than it sees slots, and not each rank tied to a single core.
VARIABLES |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
VARIABLES |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
VARIABLES |= {"OMPI_MCA_hwloc_base_binding_policy": "none", "PRTE_MCA_hwloc_default_binding_policy": "none"}
VARIABLES |= {"GPT_RANK_TIMEOUT": "120", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

GPT_175B = "--n_layer 96 --n_embd 12288 --n_head 96 --vocab_size 51200"
STARCODER = "--n_layer 40 --n_embd 6144 --n_head 48 --vocab_size 49152 --n_positions 8192 -mq --hidden_act gelu_new"
TINY = "--n_layer 2 --n_embd 64 --n_head 8 --vocab_size 5120"
LIMITS = "--max_batch_size 256 --max_input_len 200 --max_output_len 200"
PLUGINS = "--use_gpt_attention_plugin --use_gemm_plugin --use_layernorm_plugin"


@dataclass(frozen=True)
class Step:
    """Commands, one after the other.  gpus: the ones they see, all where empty.  needs: the step in the background that
    has to be over.  instead: a variable and its value for all later steps where this one fails."""

    name: str
    commands: tuple[Sequence[str], ...]
    limit_s: float
    gpus: tuple[int, ...] = ()
    needs: str = ""
    instead: tuple[str, str] | None = None


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


class Plan:
    """The groups of steps: those of one group run at the same time."""

    def __init__(self, args: argparse.Namespace, out: Path, scratch: Path):
        self.args, self.out, self.scratch = args, out, scratch
        self.on_gpu = args.device == "cuda"
        self.device = ["--device", args.device]

    def groups(self) -> Iterator[list[Step]]:
        ranks = self.args.ranks
        yield [self._check(ranks)]
        if self.on_gpu:
            yield [self._right_sums(ranks)]
        if ranks == 8:
            yield from ([step] for step in self._gpt_175b())
        if ranks == 2 and self.on_gpu:
            yield [
                Step(
                    "tests of GPU ranks", ([PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu_ranks.py"],), 75
                )
            ]
        yield self._sums(ranks, 0)
        # One rank's ids first, which the others compare theirs with.
        yield [self._starcoder(1, 0), *([] if ranks == 2 else self._sums(2, 2))]
        if ranks == 8:
            yield [self._starcoder(8, 0)]
            yield [self._starcoder(4, 0), self._starcoder(2, 4), self._santacoder(1, 6)]
            yield [self._santacoder(4, 0), *self._sums(4, 4)]
        elif ranks == 4:
            yield [self._starcoder(4, 0)]
            yield [self._starcoder(2, 0), self._santacoder(1, 2)]
            yield [self._santacoder(4, 0)]
        else:
            yield [self._starcoder(2, 0)]

    def _check(self, ranks: int) -> Step:
        command = self._mpirun(ranks, "check.py", "--ranks", "--timeout", "40", *self.device)
        return Step(f"check of {ranks} ranks", ([find_mpirun(), "--version"], command), 75)

    def _right_sums(self, ranks: int) -> Step:
        """Through the GPUs' shared memory, beside plain ones; where they are not right, NCCL does all."""
        command = ["env", f"{LIMIT}={1 << 20}", *self._mpirun(ranks, "tests/rank_programs/peer_sum.py")]
        return Step(f"right sums of {ranks}", (command,), 60, instead=(LIMIT, "0"))

    def engines(self) -> list[Step]:
        """Made in the background, without a GPU: StarCoder's shape from a seed, SantaCoder's from a folder of Hugging
        Face's, as a user has it."""
        ranks = [n for n in (1, 2, 4, 8) if n <= self.args.ranks]
        sizes = (TINY + " -mq" if self.args.tiny else STARCODER).split()
        starcoder = [
            self._build(*sizes, *LIMITS.split(), *PLUGINS.split(), "--random_seed", 1, "--world_size", n,
                        "--output_dir", self.scratch / f"starcoder_{n}")
            for n in ranks
        ]  # fmt: skip
        if self.args.ranks == 2:
            return [Step("starcoder engines", tuple(starcoder), 100)]
        hf, ft = self.scratch / "santacoder", self.scratch / "c-model" / "santacoder"
        santacoder: list[Sequence[str]] = [[PYTHON, "-c", MAKE_SANTACODER, str(hf), str(int(self.args.tiny))]]
        for n in (1, 4):
            flags = ["-p", 8, "--model", "santacoder", "-i", hf, "-o", ft, "-tp", n, "--storage-type", "float16"]
            santacoder.append([PYTHON, "hf_gpt_convert.py", *map(str, flags)])
            more = [*PLUGINS.split(), "--enable_context_fmha", "--parallel_build", "--world_size", n]
            engine = self.scratch / f"santacoder_{n}"
            santacoder.append(self._build("--model_dir", ft / f"{n}-gpu", *more, "--output_dir", engine))
        return [Step("starcoder engines", tuple(starcoder), 100), Step("santacoder engines", tuple(santacoder), 200)]

    def _gpt_175b(self) -> list[Step]:
        sizes = (TINY if self.args.tiny else GPT_175B).split()
        engine = self.scratch / "gpt_175b"
        build = self._build(
            *sizes, *LIMITS.split(), *PLUGINS.split(), "--dtype", "float16", "--random_seed", 1,
            "--world_size", 8, "--output_dir", engine,
        )  # fmt: skip
        # The bundled tokenizer stands for the hub's, which is not there; the words of random weights mean nothing.
        run = self._mpirun(
            8, "run.py", "--max_output_len", 8, "--engine_dir", engine, "--tokenizer", "assets/gpt2-tiny", *self.device
        )
        return [
            Step("GPT-175B, build and run", ([*build, "--dry_run"], build, run), 110),
            self._bench("gpt_175b", 8, (1, 16, 256), 0, limit_s=170),
        ]

    def _sums(self, ranks: int, first: int) -> list[Step]:
        if not self.on_gpu:
            return []
        command = self._mpirun(ranks, "benchmarks/bench_allreduce.py", "--csv", self.out / "allreduce.csv")
        return [Step(f"sums of {ranks}", (command,), 60, tuple(range(first, first + ranks)))]

    def _starcoder(self, ranks: int, first: int) -> Step:
        return self._bench(f"starcoder_{ranks}", ranks, (1, 16, 32), first)

    def _santacoder(self, ranks: int, first: int) -> Step:
        engine = self.scratch / f"santacoder_{ranks}"
        run = ["run.py", "--engine_dir", engine, "--tokenizer", self.scratch / "santacoder", *self.device]
        run += ["--input_text", "def print_hello_world():", "--max_output_len", 20]
        command = [PYTHON, *map(str, run)] if ranks == 1 else self._mpirun(ranks, *run)
        bench = self._bench(f"santacoder_{ranks}", ranks, (1, 32), first)
        return dataclasses.replace(bench, commands=(command, *bench.commands))

    def _bench(self, model: str, ranks: int, batches: Sequence[int], first: int, limit_s: float = 100) -> Step:
        ids = self.out / f"ids_{model.rpartition('_')[0]}.json"
        flags = ["--engine_dir", self.scratch / model, "--batch_size", *batches, "--nccl", *self.device]
        flags += ["--ids", ids, "--csv", self.out / "ranks.csv"]
        if self.args.tiny:
            flags += ["--input_len", 8, "--output_len", 4, "--repeat", 1]
        elif ranks == 1 or max(batches) <= 32:  # a larger batch fits with short sequences only
            flags += ["--input_len", 128, "--output_len", 128, "--repeat", 2]
        script = ["benchmarks/bench_ranks.py", *flags]
        command = [PYTHON, *map(str, script)] if ranks == 1 else self._mpirun(ranks, *script)
        engines = f"{model.rpartition('_')[0]} engines"
        return Step(f"{model} measured", (command,), limit_s, tuple(range(first, first + ranks)), engines)

    def _build(self, *flags: object) -> list[str]:
        return [PYTHON, "build.py", *map(str, flags)]

    def _mpirun(self, ranks: int, *words: object) -> list[str]:
        return [find_mpirun(), "-np", str(ranks), PYTHON, *map(str, words)]


# A Hugging Face folder of SantaCoder's shape with random weights and the bundled tokenizer:  FOLDER TINY
MAKE_SANTACODER = """
import shutil, sys, torch
from pathlib import Path
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM
folder, tiny = Path(sys.argv[1]), int(sys.argv[2])
sizes = dict(n_layer=2, n_embd=64, n_head=8) if tiny else dict(n_layer=24, n_embd=2048, n_head=16)
config = GPTBigCodeConfig(vocab_size=49280, n_positions=2048, multi_query=True, **sizes)
torch.manual_seed(1)
GPTBigCodeForCausalLM(config).half().save_pretrained(folder)
for name in ("merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json"):
    shutil.copy(Path("assets/gpt2-tiny") / name, folder)
"""


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
