"""Ranks on GPUs of their own, over NCCL, beside one rank.  Run where there are two GPUs: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import relative_error
from ranks import PROGRAMS, without_mpi
from test_runtime_ranks import CASES, build_case

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("ranks")
    found = {}
    for world_size in (1, 2):
        folders = [build_case(name, world_size, base) for name in CASES]
        done = without_mpi(world_size, PROGRAMS / "logits.py", "cuda", base / "out.pt", *folders)
        assert [result.returncode for result in done] == [0] * world_size, done
        found[world_size] = torch.load(base / "out.pt")
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_are_one(name: str, results: dict[int, list[dict[str, Any]]]) -> None:
    whole, parts = (results[world_size][list(CASES).index(name)] for world_size in (1, 2))
    for ours, expected in zip(parts["logits"], whole["logits"], strict=True):
        assert relative_error(ours, expected) < CASES[name].bound


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus not in (1, 2):
        pytest.fail("this test is for one or two GPUs: engines of the cases have at most four ranks")
    engine = build_case("rope swiglu", 2 * num_gpus, tmp_path)
    (tmp_path / "prompts.csv").write_text("1,2,3\n")
    tokens = ["--input_tokens", tmp_path / "prompts.csv", "--output_csv", tmp_path / "out.csv"]
    arguments = ["run.py", "--engine_dir", engine, "--max_output_len", 2, "--device", "cuda", *tokens]
    results = without_mpi(2 * num_gpus, *arguments)
    assert all(result.returncode != 0 for result in results)
    assert sum("each rank needs a GPU of its own" in result.stderr for result in results) == 1
