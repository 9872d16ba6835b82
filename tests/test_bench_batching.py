"""benchmarks/bench_batching.py on a CPU with a tiny model."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import build_engine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_batching
from batching_steps import Call, summarize

SIZES = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "50", "--n_positions", "64"]
LIMITS = ["--max_batch_size", "4", "--max_input_len", "20", "--max_output_len", "12", "--dtype", "float32"]
PAGED = ["--paged_kv_cache", "--tokens_per_block", "4", "--max_num_tokens", "32", "--use_inflight_batching"]


def test_static_and_continuous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_engine(None, tmp_path / "e", *SIZES, *LIMITS, *PAGED, "--random_seed", "1")
    flags = ["--engine_dir", str(tmp_path / "e"), "--num_prompts", "12", "--static_prompts", "5", "--static_batch", "2"]
    flags += ["--output_lens", "uniform:2:9", "--max_output_len", "12", "--rounds", "2", "--device", "cpu", "--profile"]
    monkeypatch.setattr(sys, "argv", ["bench_batching.py", *flags, "--csv", str(tmp_path / "b.csv")])
    assert bench_batching.main() == 0
    printed = capsys.readouterr().out
    assert "equal ids 5/5  (the first 5 prompts)" in printed
    static, continuous = csv.DictReader((tmp_path / "b.csv").open())
    assert (static["prompts"], continuous["prompts"]) == ("5", "12")
    assert int(static["new_tokens"]) < int(continuous["new_tokens"])
    steps = list(csv.DictReader((tmp_path / "b_steps.csv").open()))
    assert {row["steps"] for row in steps} == {"prompts", "single"}
    prompts = sum(int(row["count"]) * int(row["prompt_tokens"]) for row in steps)
    assert prompts == pytest.approx(int(continuous["prompt_tokens"]), rel=0.3)  # means are rounded
    fed = sum(int(row["count"]) * int(row["rows"]) for row in steps)
    assert fed == pytest.approx(int(continuous["new_tokens"]) - 12, rel=0.3)


def test_steps_are_divided_among_what_they_were() -> None:
    took: Any = SimpleNamespace(elapsed_time=lambda other: other)
    calls = [
        Call(1, 500, 3, 0.0, took, 40.0, seconds=0.05),
        Call(1, 700, 64, 0.0, took, 60.0, seconds=0.07),
        Call(8, 0, 70, 0.0, took, 80.0, seconds=0.12),
    ]
    ahead, prompts = summarize(calls)
    assert (prompts["count"], prompts["prompt_tokens"], prompts["ms"], prompts["device_ms"]) == (2, 600, 60.0, 50.0)
    assert (ahead["steps"], ahead["rows_up_to"], ahead["count"], ahead["rows"]) == ("ahead", 128, 8, 70)
    assert (ahead["ms"], ahead["device_ms"], ahead["seconds"]) == (15.0, 10.0, 0.12)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SIZES, *LIMITS, *PAGED, "--random_seed", "1", "--use_gpt_attention_plugin", "--remove_input_padding"]
    build_engine(None, tmp_path / "e", *flags)
    flags = ["--engine_dir", str(tmp_path / "e"), "--num_prompts", "12", "--static_batch", "2", "--profile"]
    flags += ["--output_lens", "uniform:2:9", "--max_output_len", "12", "--rounds", "1", "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["bench_batching.py", *flags])
    assert bench_batching.main() == 0
    assert "equal ids 12/12" in capsys.readouterr().out
