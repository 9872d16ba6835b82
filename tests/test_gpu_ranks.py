"""Ranks on GPUs of their own, over NCCL, beside one rank.  Run where there are two GPUs: `pytest -m gpu`.

Most of the time goes to compiling kernels: few cases, one after the other in one process per rank, all launches at
once.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import relative_error
from ranks import PROGRAMS, without_mpi
from test_runtime_ranks import CASES, Case, build_case

pytestmark = pytest.mark.gpu

HERE = {name: CASES[name] for name in ("multi-query", "gpt2 untied, embedding by hidden size", "rope swiglu")}
HERE["gpt2 float16"] = Case(("--dtype", "float16"), {"n_head": 4, "n_embd": 48}, 5e-3)
FIRST = next(iter(HERE))
Done = list[subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Launches:
    """Every launch, by the names that the tests ask for, and where they write."""

    folder: Path
    launches: dict[str, Future[Done]]

    def logits(self, name: str) -> dict[str, torch.Tensor]:
        """By case."""
        done = self.launches[name].result()
        assert [result.returncode for result in done] == [0] * len(done), done
        results: list[dict[str, Any]] = torch.load(self.folder / f"{name}.pt")
        return {case: result["logits"] for case, result in zip(HERE, results, strict=False)}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Launches]:
    base = tmp_path_factory.mktemp("ranks")
    begin = time.monotonic()
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"[{time.monotonic() - begin:3.0f} s] {text}", flush=True)

    def told(name: str, num_ranks: int, *command: object, **variables: str) -> Callable[[], Done]:
        def call() -> Done:
            done = without_mpi(num_ranks, *command, **variables)
            say(f"{name}: exit codes {[result.returncode for result in done]}")
            return done

        return call

    folders = {n: [build_case(name, n, base, case) for name, case in HERE.items()] for n in (1, 2)}
    (base / "prompts.csv").write_text("1,2,3\n")
    run: list[object] = ["run.py", "--engine_dir", build_case("rope swiglu", 4, base), "--max_output_len", 2]
    run += ["--device", "cuda", "--input_tokens", base / "prompts.csv", "--output_csv", base / "out.csv"]
    two_gpus = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2])
    say("engines are built")
    logits = [PROGRAMS / "logits.py", "cuda"]
    calls = {
        "one rank": told("one rank", 1, *logits, base / "one rank.pt", *folders[1]),
        "two ranks": told("two ranks", 2, *logits, base / "two ranks.pt", *folders[2]),
        "nccl": told("nccl", 2, *logits, base / "nccl.pt", folders[2][0], GPT_PEER_SUM_BYTES="0"),
        "sums": told("sums", 2, PROGRAMS / "peer_sum.py", GPT_PEER_SUM_BYTES=str(1 << 20)),
        "too many": told("too many", 4, *run, CUDA_VISIBLE_DEVICES=two_gpus),
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        yield Launches(base, {name: pool.submit(call) for name, call in calls.items()})


def test_more_ranks_than_gpus(launches: Launches) -> None:
    results = launches.launches["too many"].result()
    assert all(result.returncode != 0 for result in results)
    assert sum("each rank needs a GPU of its own" in result.stderr for result in results) == 1


def test_sums_through_shared_memory(launches: Launches) -> None:
    results = launches.launches["sums"].result()
    assert [result.stdout for result in results] == ["rank 0 of 2: good\n", "rank 1 of 2: good\n"], results


def test_nccl_alone_is_as_good(launches: Launches) -> None:
    """An engine without the sums through shared memory."""
    compare(launches.logits("nccl")[FIRST], launches.logits("one rank")[FIRST], FIRST)


@pytest.mark.parametrize("name", HERE)
def test_two_gpus_are_one(name: str, launches: Launches) -> None:
    compare(launches.logits("two ranks")[name], launches.logits("one rank")[name], name)


def compare(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    for row, expected_row in zip(ours, expected, strict=True):
        assert relative_error(row, expected_row) < HERE[name].bound
