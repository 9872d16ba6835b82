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


def test_sums_through_shared_memory() -> None:
    results = without_mpi(2, PROGRAMS / "peer_sum.py", GPT_PEER_SUM_BYTES=str(1 << 20))
    assert [result.stdout for result in results] == ["rank 0 of 2: good\n", "rank 1 of 2: good\n"], results


def test_nccl_alone_is_as_good(results: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The same engines without the sums through shared memory."""
    folder = build_case("gpt2", 2, tmp_path)
    out = tmp_path / "out.pt"
    done = without_mpi(2, PROGRAMS / "logits.py", "cuda", out, folder, GPT_PEER_SUM_BYTES="0")
    assert [result.returncode for result in done] == [0, 0], done
    whole = results[1][list(CASES).index("gpt2")]
    for ours, expected in zip(torch.load(out)[0]["logits"], whole["logits"], strict=True):
        assert relative_error(ours, expected) < CASES["gpt2"].bound
