"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_gpt2

# Nothing here may look for the network, whatever the machine has configured.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def make_gpt2(tmp_path: Path) -> Callable[..., Path]:
    """`make_gpt2(name="hf", **overrides)` saves a tiny GPT-2 under the test's folder (see tiny_models.tiny_gpt2)."""

    def make(name: str = "hf", **overrides: object) -> Path:
        return tiny_gpt2(tmp_path / name, **overrides)

    return make
