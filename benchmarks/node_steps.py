"""What bench_node.py runs, in which order, on which GPUs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.launch import find_mpirun

PYTHON = sys.executable
LIMIT = "GPT_PEER_SUM_BYTES"
GPT_175B = "--n_layer 96 --n_embd 12288 --n_head 96 --vocab_size 51200"
STARCODER = "--n_layer 40 --n_embd 6144 --n_head 48 --vocab_size 49152 --n_positions 8192 -mq --hidden_act gelu_new"
TINY = "--n_layer 2 --n_embd 64 --n_head 8 --vocab_size 5120"
LIMITS = "--max_batch_size 256 --max_input_len 200 --max_output_len 200"
PLUGINS = "--use_gpt_attention_plugin --use_gemm_plugin --use_layernorm_plugin"
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
        name = model.removesuffix(f"_{ranks}")
        ids = self.out / f"ids_{name}.json"
        flags = ["--engine_dir", self.scratch / model, "--batch_size", *batches, "--nccl", *self.device]
        flags += ["--ids", ids, "--csv", self.out / "ranks.csv"]
        if self.args.tiny:
            flags += ["--input_len", 8, "--output_len", 4, "--repeat", 1]
        elif ranks == 1 or max(batches) <= 32:  # a larger batch fits with short sequences only
            flags += ["--input_len", 128, "--output_len", 128, "--repeat", 2]
        script = ["benchmarks/bench_ranks.py", *flags]
        command = [PYTHON, *map(str, script)] if ranks == 1 else self._mpirun(ranks, *script)
        engines = f"{name} engines"
        return Step(f"{model} measured", (command,), limit_s, tuple(range(first, first + ranks)), engines)

    def _build(self, *flags: object) -> list[str]:
        return [PYTHON, "build.py", *map(str, flags)]

    def _mpirun(self, ranks: int, *words: object) -> list[str]:
        return [find_mpirun(), "-np", str(ranks), PYTHON, *map(str, words)]
