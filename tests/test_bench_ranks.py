"""benchmarks/bench_ranks.py on CPU ranks with a tiny model: its rows, and ids beside one rank's."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from engines import build_engine
from ranks import ROOT, mpirun

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_ranks
from bench_ranks import WithoutSums

from gpt.comm import NullCommunicator

pytestmark = pytest.mark.mpi

SIZES = ["--n_layer", "2", "--n_embd", "64", "--n_head", "4", "--vocab_size", "301", "--n_positions", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the rows of one and of two ranks, whose ids were compared with one rank's, one of them changed."""
    base = tmp_path_factory.mktemp("bench")
    limits = ["--max_batch_size", "3", "--max_input_len", "16", "--max_output_len", "16"]
    for ranks in (1, 2):
        engine = base / f"tiny_{ranks}"
        build_engine(
            None, engine, *SIZES, *limits, "--dtype", "float32", "--random_seed", "1", "--world_size", str(ranks)
        )
        flags = ["--engine_dir", engine, "--batch_size", 1, 3, "--input_len", 8, "--output_len", 6, "--repeat", 2]
        flags += ["--ids", base / "ids.json", "--csv", base / "ranks.csv", "--device", "cpu"]
        result = mpirun(ranks, "benchmarks/bench_ranks.py", *flags)
        assert result.returncode == 0, result.stderr
        if ranks == 1:
            ids = json.loads((base / "ids.json").read_text())
            ids["3 x (8 + 6)"][1][4] = (ids["3 x (8 + 6)"][1][4] + 1) % 301
            (base / "ids.json").write_text(json.dumps(ids))
    return base


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "ranks.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_batch_and_number_of_ranks(folder: Path) -> None:
    rows = read_rows(folder)
    assert [(row["ranks"], row["batch_size"]) for row in rows] == [("1", "1"), ("1", "3"), ("2", "1"), ("2", "3")]
    for row in rows:
        assert 0 < float(row["token_ms_min"]) <= float(row["token_ms"]) <= float(row["token_ms_max"])
        assert float(row["limit_ms"]) * float(row["times_limit"]) == pytest.approx(float(row["token_ms"]), rel=0.1)
        assert int(row["predicted_bytes"]) > int(row["weight_bytes"]) + int(row["cache_bytes"])
        if row["ranks"] == "2":
            assert row["sums_per_step"] == "4"
            assert int(row["sum_bytes"]) == 64 * 4 * int(row["batch_size"])
            assert float(row["sum_us"]) > 0
            assert float(row["no_sums_token_ms"]) > 0
        else:
            assert row["sum_us"] == row["sums_share"] == ""


def test_ids_are_compared_with_one_ranks(folder: Path) -> None:
    found = [(row["rows_like_one_rank"], row["worst_margin"]) for row in read_rows(folder)]
    assert found[:3] == [("", ""), ("", ""), ("1/1", "")]
    assert found[3][0] == "2/3"
    assert float(found[3][1]) > 0.1  # a wrong id, no tie


def test_plot(folder: Path) -> None:
    assert bench_ranks.main(["--plot", str(folder / "ranks.csv")]) == 0
    assert (folder / "ranks_ranks.svg").stat().st_size > 1000


def test_without_sums_only_the_sums_are_missing() -> None:
    comm = WithoutSums(NullCommunicator())
    assert comm.gather_objects(5) == [5]
    assert comm.size == 1


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ranks.main([]) == 2
    assert "--engine_dir" in capsys.readouterr().err
