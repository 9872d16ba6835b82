"""Launch parameters kept beside an engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from gpt.config import ModelConfig
from gpt.engine import autotune
from gpt.engine.tuning import Tuning, token_bucket, tuning_path
from gpt.kernels.attention import AttentionConfig
from gpt.kernels.gemv import GemvConfig
from gpt.kernels.skinny import SkinnyConfig
from gpt.mapping import Mapping
from gpt.quant import QuantConfig

CPU = torch.device("cpu")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    tuning = Tuning(CPU)
    tuning.gemvs[48, 32] = GemvConfig(16, 32, 2)
    tuning.skinnies[16, 48, 32, 1] = SkinnyConfig(16, 32, 2, split_k=2)
    tuning.attentions[1, 4, 4, 128] = AttentionConfig(32, 4, 1)
    tuning.save(tuning_path(tmp_path, CPU))
    return tuning_path(tmp_path, CPU)


def test_what_was_measured_comes_back(stored: Path) -> None:
    tuning = Tuning.load(stored, CPU)
    assert tuning.gemv(48, 32) == GemvConfig(16, 32, 2)
    assert tuning.skinny(7, 48, 32, splits=True) == SkinnyConfig(16, 32, 2, split_k=2)
    assert tuning.attention(1, 4, 4, 128) == AttentionConfig(32, 4, 1)


def test_shorter_caches_take_what_was_measured_for_the_next_longer(stored: Path) -> None:
    tuning, untuned = Tuning.load(stored, CPU), Tuning(CPU)
    tuning.attentions[1, 4, 4, 512] = AttentionConfig(64, 8, 2)
    assert tuning.attention(1, 4, 4, 96) == AttentionConfig(32, 4, 1)
    assert tuning.attention(1, 4, 4, 256) == AttentionConfig(64, 8, 2)
    assert tuning.attention(1, 4, 4, 640) == untuned.attention(1, 4, 4, 640)


def test_other_shapes_get_defaults(stored: Path) -> None:
    tuning, untuned = Tuning.load(stored, CPU), Tuning(CPU)
    assert tuning.gemv(48, 64) == untuned.gemv(48, 64)
    assert tuning.skinny(7, 48, 32, splits=False) == untuned.skinny(7, 48, 32, splits=False)
    assert tuning.attention(2, 4, 4, 128) == untuned.attention(2, 4, 4, 128)


@pytest.mark.parametrize("name", ["device", "triton"])
def test_another_device_or_compiler(name: str, stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored.write_text(json.dumps({**json.loads(stored.read_text()), name: "another"}))
    with caplog.at_level(logging.INFO, "gpt"):
        tuning = Tuning.load(stored, CPU)
    assert not tuning.gemvs
    assert not tuning.attentions
    assert "measured elsewhere" in caplog.text
    assert "another" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "list", "missing", "config", "binary"])
def test_a_damaged_file(damage: str, stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = json.loads(stored.read_text())
    if damage == "config":
        whole["attentions"][0][1] = {"block": 3}  # comes last: what was read before it must not stay
    elif damage == "missing":
        del whole["skinnies"]
    text = {"cut": stored.read_text()[:-40], "list": "[]", "binary": "\xff"}.get(damage, json.dumps(whole))
    stored.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "gpt"):
        tuning = Tuning.load(stored, CPU)
    assert [tuning.gemvs, tuning.skinnies, tuning.attentions] == [{}, {}, {}]
    assert str(stored) in caplog.text
    assert "defaults are used" in caplog.text


def test_no_file_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gpt"):
        assert not Tuning.load(tmp_path / "tuning-cpu.json", CPU).gemvs
    assert not caplog.text


def test_batches_that_share_parameters() -> None:
    assert [token_bucket(size) for size in (2, 16, 17, 33, 300)] == [16, 16, 32, 64, 64]


@pytest.mark.parametrize(
    ("quant", "products", "caches"),
    [
        (QuantConfig(), 5, 1),
        (QuantConfig("int8"), 1, 0),
        (QuantConfig("int4", kv_cache="int8"), 1, 0),
        (QuantConfig(kv_cache="fp8"), 5, 0),
    ],
)
def test_only_what_is_float_is_measured(
    quant: QuantConfig, products: int, caches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fastest for float16 weights need not be for those of a byte, which keep the defaults made for them."""
    model = ModelConfig(vocab_size=64, n_positions=64, n_embd=32, n_head=2, n_layer=1, n_kv_head=2, inter_size=128)
    monkeypatch.setattr(autotune, "_best", lambda candidates, launch, copies: "measured")
    monkeypatch.setattr(autotune, "_COLD_BYTES", 1)
    found = autotune.autotune(model, Mapping(), torch.float32, [1], 128, CPU, quant)
    assert (len(found.gemvs), len(found.attentions)) == (products, caches)
    assert (64, 32) in found.gemvs  # the head


def test_shapes_that_no_candidate_suits_keep_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's products fill no card, and a cache of few tokens no block."""
    model = ModelConfig(vocab_size=64, n_positions=64, n_embd=32, n_head=2, n_layer=1, n_kv_head=2, inter_size=128)
    monkeypatch.setattr(autotune, "_time_candidate", lambda config, launch, copies: 0.0)
    monkeypatch.setattr(autotune, "_COLD_BYTES", 1)
    monkeypatch.setattr(autotune, "num_multiprocessors", lambda device: 132)
    found = autotune.autotune(model, Mapping(), torch.float32, [4], 8, CPU)
    plain = Tuning(CPU)
    assert found.attentions == {(4, 2, 2, 8): plain.attention(4, 2, 2, 8)}
    assert found.skinnies == {
        (16, n, k, int(splits)): plain.skinny(16, n, k, splits=splits, itemsize=4)
        for n, k, splits in autotune.product_shapes(model, Mapping(), QuantConfig())
    }
