"""Ranks on GPUs of their own, over NCCL, beside one rank.  Run where there are two GPUs: `pytest -m gpu`.

Most of the time is spent compiling kernels of as many shapes as there are cases: all programs run at once.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import relative_error
from ranks import PROGRAMS, without_mpi
from test_runtime_ranks import CASES, Case, build_case

pytestmark = pytest.mark.gpu

# Each family and way to divide the embedding once, and each dtype.
NAMES = ("gpt2", "gpt2 bfloat16", "gpt2 untied, embedding by hidden size", "multi-query", "rope swiglu")
HERE = {name: CASES[name] for name in (*NAMES, "virtual tokens, embedding by vocabulary")}
HERE["gpt2 float16"] = Case(("--dtype", "float16"), {"n_head": 4, "n_embd": 48}, 5e-3)
Done = list[subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Launches:
    """Every program, started, by the names that the tests ask for, and where they write."""

    folder: Path
    programs: dict[str, Future[Done]]

    def logits(self, name: str) -> list[torch.Tensor]:
        done = self.programs[name].result()
        assert [result.returncode for result in done] == [0] * len(done), done
        results: list[dict[str, Any]] = torch.load(self.folder / f"{name}.pt")
        return list(results[0]["logits"])


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    base = tmp_path_factory.mktemp("ranks")
    folders = {f"{name}-{n}": (n, build_case(name, n, base, case)) for name, case in HERE.items() for n in (1, 2)}
    (base / "prompts.csv").write_text("1,2,3\n")
    run: list[object] = ["run.py", "--engine_dir", build_case("rope swiglu", 4, base), "--max_output_len", 2]
    run += ["--device", "cuda", "--input_tokens", base / "prompts.csv", "--output_csv", base / "out.csv"]
    two_gpus = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2])
    calls = {
        "too many": partial(without_mpi, 4, *run, CUDA_VISIBLE_DEVICES=two_gpus),
        "sums": partial(without_mpi, 2, PROGRAMS / "peer_sum.py", GPT_PEER_SUM_BYTES=str(1 << 20)),
    }
    logits = [PROGRAMS / "logits.py", "cuda"]
    for name, (n, folder) in folders.items():
        calls[name] = partial(without_mpi, n, *logits, base / f"{name}.pt", folder)
    command = [*logits, base / "nccl.pt", folders["gpt2-2"][1]]
    calls["nccl"] = partial(without_mpi, 2, *command, GPT_PEER_SUM_BYTES="0")
    with ThreadPoolExecutor(len(calls)) as pool:
        yield Launches(base, {name: pool.submit(call) for name, call in calls.items()})


@pytest.mark.parametrize("name", HERE)
def test_two_gpus_are_one(name: str, launches: Launches) -> None:
    for ours, expected in zip(launches.logits(f"{name}-2"), launches.logits(f"{name}-1"), strict=True):
        assert relative_error(ours, expected) < HERE[name].bound


def test_more_ranks_than_gpus(launches: Launches) -> None:
    results = launches.programs["too many"].result()
    assert all(result.returncode != 0 for result in results)
    assert sum("each rank needs a GPU of its own" in result.stderr for result in results) == 1


def test_sums_through_shared_memory(launches: Launches) -> None:
    results = launches.programs["sums"].result()
    assert [result.stdout for result in results] == ["rank 0 of 2: good\n", "rank 1 of 2: good\n"], results


def test_nccl_alone_is_as_good(launches: Launches) -> None:
    """The same engine without the sums through shared memory."""
    for ours, expected in zip(launches.logits("nccl"), launches.logits("gpt2-1"), strict=True):
        assert relative_error(ours, expected) < HERE["gpt2"].bound
