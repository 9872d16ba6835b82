"""The table of what was built and compared for TensorRT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trt_matrix import record, record_refusal, table
from trt_models import build_config

from gpt.errors import ConfigError


def test_rows_of_one_combination_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setenv("GPT_TRT_MATRIX", str(path))
    build = build_config("float16", fused=True, max_prompt_embedding_table_size=3)
    record("gpt2", build, built="ampere ada")
    record("gpt2", build, error=1e-4)
    record("gpt2", build, built="ada", error=3e-4)
    record("gpt2", build_config(world_size=2, use_parallel_embedding=True), error=2e-7)
    record("gpt2", build_config(plugins=("attention", "lookup")), error=3e-7)
    record_refusal(ConfigError("no", found=["b: not allowed", "a: too long"]))
    record_refusal(ConfigError("unknown target", found="hopper"))
    lines = list(table([json.loads(line) for line in path.read_text().splitlines()], "1.2.3"))
    assert "TensorRT-RTX 1.2.3" in lines[0]
    assert lines[3:] == [
        "| gpt2 | float32 | plain | padded | 2 ranks, embedding by vocabulary | - | 2.0e-07 |",
        "| gpt2 | float32 | plugin | padded | plugins attention lookup | - | 3.0e-07 |",
        "| gpt2 | float16 | fused | padded | prompt tuning | ampere, ada | 3.0e-04 |",
        "\n3 combinations, 1 of them built and compared.",
        "\n## Refused before building, or by the library, with the reason that is shown\n",
        "- a: too long",
        "- b: not allowed",
        "- unknown target: hopper",
    ]


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPT_TRT_MATRIX", raising=False)
    monkeypatch.chdir(tmp_path)
    record("gpt2", build_config(), built="ada")
    assert not list(tmp_path.iterdir())
