"""check.py --tune: what is refused before anything is measured, and what a GPU leaves for the next session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import build_engine

import check
from gpt.engine.tuning import Tuning, tuning_path

SIZES = ["--vocab_size", "97", "--n_layer", "1", "--n_embd", "64", "--n_head", "2", "--n_positions", "64"]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    limits = ["--max_batch_size", "4", "--max_input_len", "16", "--max_output_len", "8", "--random_seed", "1"]
    build_engine(None, tmp_path / "engine", *SIZES, *limits)
    return tmp_path / "engine"


@pytest.mark.parametrize(
    ("arguments", "gpu", "told"),
    [
        (["ENGINE", "--tune", "1"], False, "measured on a GPU"),
        (["ENGINE", "--tune", "1", "8"], True, "takes no such batch"),
        (["ENGINE", "ENGINE", "--tune", "1"], True, "measures one engine"),
    ],
)
def test_refusals(
    arguments: list[str],
    gpu: bool,
    told: str,
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert check.main([str(engine) if word == "ENGINE" else word for word in arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(engine.glob("tuning-*"))


@pytest.mark.gpu
def test_the_next_session_finds_what_was_measured(engine: Path) -> None:
    assert check.main([str(engine), "--tune", "1", "4"]) == 0
    device = torch.device("cuda")
    assert Tuning.load(tuning_path(engine, device), device).gemvs
