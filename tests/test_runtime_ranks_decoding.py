"""Beams, samples, stop words and scores on several ranks: what one rank makes, and as the first rank was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import build_engine
from ranks import PROGRAMS, mpirun

pytestmark = pytest.mark.mpi

SIZES = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
LIMITS = ["--max_batch_size", "4", "--max_beam_width", "4", "--max_input_len", "40", "--max_output_len", "20"]


def test_two_ranks_decode_as_one(tmp_path: Path) -> None:
    results: dict[int, dict[str, Any]] = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        flags = [*LIMITS, "--dtype", "float32", "--random_seed", "5", "--world_size", str(world_size)]
        build_engine(None, folder, *SIZES, *flags)
        done = mpirun(world_size, PROGRAMS / "decoding.py", tmp_path / "out.json", folder)
        assert done.returncode == 0, done.stderr
        results[world_size] = json.loads((tmp_path / "out.json").read_text())
    one, two = results[1], results[2]
    for name in ("free", "stopped", "samples"):
        assert two[name] == one[name], name
    for name in ("scores", "perplexity"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    for ours, expected in zip(two["logprobs"], one["logprobs"], strict=True):
        assert ours == pytest.approx(expected, abs=1e-5)
    assert {len(row) for row in one["free"]} == {12}
    assert min(len(row) for row in one["stopped"]) < 12
    assert one["samples"][0] != one["samples"][1]


def test_two_ranks_share_steps_over_blocks() -> None:
    done = mpirun(2, PROGRAMS / "paged_session.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 2: good") == 2
