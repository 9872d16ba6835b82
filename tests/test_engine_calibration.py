"""Calibration by our own network, layer by layer, against hooks on Hugging Face's modules and NeMo's arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calibration_models import hooked_ranges, plant_outliers, source_of, tiny_bigcode
from engines import random_prompts
from tiny_models import tiny_gpt2
from tiny_nemo import GPT_NEXT, nemo_logits, save_model, tiny_config, tiny_state

from gpt.checkpoint import smoothquant
from gpt.checkpoint.layout import DENSE, FC, GATE, PROJ, QKV, gemms
from gpt.checkpoint.nemo import read_config
from gpt.checkpoint.nemo_archive import read_yaml
from gpt.checkpoint.nemo_ranks import model_config, open_weights
from gpt.checkpoint.nemo_weights import match_tensors
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.writer import Pair
from gpt.config import ModelConfig
from gpt.engine import calibration
from gpt.engine.calibration import Calibration, calibrate
from gpt.engine.quant_errors import ErrorRow
from gpt.errors import CheckpointError

SAMPLES = random_prompts((40, 7, 1, 64, 23), 301)
HF_NAMES = {QKV: "attn.c_attn", DENSE: "attn.c_proj", FC: "mlp.c_fc", PROJ: "mlp.c_proj"}


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return tiny_gpt2(tmp_path / "gpt2")


def nemo_source(tmp_path: Path, **changes: object) -> tuple[ModelConfig, list[Pair]]:
    config = tiny_config(**{**GPT_NEXT, **changes})
    folder = save_model(tmp_path / "nemo", config, tiny_state(config), mode=None)
    read = read_config(read_yaml(folder / "model_config.yaml"))
    weights = open_weights(folder, read.training)
    model = model_config(read, weights)
    return model, match_tensors(model, weights)


def smoothed_half(folder: Path) -> Calibration:
    model, pairs = source_of(folder)
    return calibrate(model, pairs, SAMPLES, alpha=0.5)


def error(result: Calibration, layer: int, part: str, quantity: str, variant: str) -> float:
    (row,) = [
        row
        for row in result.errors
        if (row.layer, row.part, row.quantity, row.variant) == (layer, part, quantity, variant)
    ]
    return row.relative_error


@pytest.mark.parametrize("kind", ["gpt2", "multi-query", "bigcode with all heads"])
def test_ranges_are_those_that_hooks_on_the_original_modules_see(kind: str, tmp_path: Path) -> None:
    """With alpha 1 the factors are x itself, for each of the four linear layers."""
    folder = tmp_path / "hf"
    if kind == "gpt2":
        tiny_gpt2(folder)
    else:
        tiny_bigcode(folder, multi_query=kind == "multi-query")
    model, pairs = source_of(folder)
    hooked = hooked_ranges(folder, SAMPLES)
    smooth = calibrate(model, pairs, SAMPLES, alpha=1.0, smooth_inner=True, batch_size=2)
    plain = calibrate(model, pairs, SAMPLES, alpha=None, batch_size=3)
    weights = {tensor.name: source for tensor, source in pairs}
    for layer in range(model.n_layer):
        for ours, theirs in HF_NAMES.items():
            x, y = hooked[f"transformer.h.{layer}.{theirs}"]
            scales = smooth.layers[layer].linears[ours]
            assert scales.factors is not None
            torch.testing.assert_close(scales.factors, x, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scales.output_max, y.max(), rtol=1e-5, atol=1e-6)
            unsmoothed = plain.layers[layer].linears[ours]
            assert unsmoothed.factors is None
            torch.testing.assert_close(unsmoothed.input_max, x.max(), rtol=1e-5, atol=1e-6)
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            columns = weight.read(0, weight.shape[0]).abs().amax(0)
            assert torch.equal(unsmoothed.column_max, columns)


@pytest.mark.gpu
def test_a_gpu_sees_what_the_cpu_sees(gpt2: Path) -> None:
    model, pairs = source_of(gpt2)
    cpu = calibrate(model, pairs, SAMPLES, alpha=0.5, smooth_inner=True)
    gpu = calibrate(model, pairs, SAMPLES, alpha=0.5, smooth_inner=True, device=torch.device("cuda"))
    for ours, theirs in zip(gpu.layers, cpu.layers, strict=True):
        torch.testing.assert_close(ours.kv_max, theirs.kv_max, rtol=1e-4, atol=0)
        for name, linear in ours.linears.items():
            for field, values in vars(linear).items():
                torch.testing.assert_close(values, getattr(theirs.linears[name], field), rtol=1e-4, atol=0)
    assert len(gpu.errors) == len(cpu.errors)


def test_the_cache_has_ranges_of_its_own(gpt2: Path) -> None:
    model, pairs = source_of(gpt2)
    hooked = hooked_ranges(gpt2, SAMPLES)
    for layer, scales in enumerate(calibrate(model, pairs, SAMPLES, alpha=None).layers):
        _, k, v = hooked[f"transformer.h.{layer}.attn.c_attn"][1].chunk(3)
        torch.testing.assert_close(scales.kv_max, torch.stack([k.max(), v.max()]), rtol=1e-5, atol=1e-6)


def test_rotary_keys_are_measured_as_they_are_cached(tmp_path: Path) -> None:
    """A rotation keeps the length of a pair of values, so that it can make one of them larger, never both."""
    model, pairs = nemo_source(tmp_path, rotary_percentage=1.0)
    result = calibrate(model, pairs, random_prompts((20, 12), model.vocab_size), alpha=None)
    still, _ = nemo_source(tmp_path)
    not_rotated = calibrate(
        dataclasses.replace(model, rotary_base=1e30, rotary_scaling=1e30),
        pairs,
        random_prompts((20, 12), still.vocab_size),
        alpha=None,
    )
    before, after = not_rotated.layers[0].kv_max, result.layers[0].kv_max
    assert torch.equal(before[1], after[1])
    assert after[0] != before[0]
    assert after[0] <= before[0] * 2**0.5


def test_results_do_not_depend_on_the_batch_size(gpt2: Path) -> None:
    model, pairs = source_of(gpt2)
    first, second = (calibrate(model, pairs, SAMPLES, alpha=0.5, batch_size=size) for size in (1, 5))
    for a, b in zip(first.layers, second.layers, strict=True):
        for name in gemms(model):
            one, other = a.linears[name], b.linears[name]
            torch.testing.assert_close(one.input_max, other.input_max, rtol=1e-5, atol=0)
            torch.testing.assert_close(one.column_max, other.column_max, rtol=1e-5, atol=0)
    again = calibrate(model, pairs, SAMPLES, alpha=0.5, batch_size=5)
    assert again.errors == second.errors


def test_a_gated_model_has_a_fifth_linear_layer_with_shared_factors(tmp_path: Path) -> None:
    model, pairs = nemo_source(tmp_path)
    samples = random_prompts((20, 12), model.vocab_size)
    result = calibrate(model, pairs, samples, alpha=0.5)
    linears = result.layers[1].linears
    assert list(linears) == [QKV, DENSE, FC, GATE, PROJ]
    fc, gate = linears[FC].factors, linears[GATE].factors
    assert fc is not None
    assert gate is not None
    assert torch.equal(fc, gate)
    assert not torch.equal(linears[FC].column_max, linears[GATE].column_max)
    assert {row.part for row in result.errors} == {"cache", *linears}


def test_planted_outliers_are_undone_by_smoothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight channels of the layernorms times 30 and the rows behind them over 30: the float function is the same."""
    clean, outliers = tiny_gpt2(tmp_path / "clean"), tiny_gpt2(tmp_path / "outliers")
    plant_outliers(outliers, 1, range(8), 30.0)
    undisturbed = smoothed_half(clean)
    smoothed = smoothed_half(outliers)
    monkeypatch.setattr(smoothquant, "smoothing_factors", lambda x, rows, alpha: torch.ones_like(x))
    plain = smoothed_half(outliers)
    for part in (QKV, FC):
        without, with_, best = (error(r, 1, part, "output", "per-tensor") for r in (plain, smoothed, undisturbed))
        assert without > 3 * with_, part
        assert with_ == pytest.approx(best, rel=0.2), part
    assert error(plain, 0, QKV, "output", "per-tensor") < 0.05  # the other layer has none


class CountingSource:
    """A source tensor that adds its name to `reads` with each block."""

    def __init__(self, name: str, source: SourceTensor, reads: list[str]):
        self.name, self.source, self.reads = name, source, reads
        self.shape, self.dtype = source.shape, source.dtype

    def read(self, first: int, last: int) -> torch.Tensor:
        self.reads.append(self.name)
        return self.source.read(first, last)


def test_layers_are_read_once_and_in_turn(tmp_path: Path) -> None:
    model, pairs = source_of(tiny_gpt2(tmp_path / "hf", n_layer=5))
    reads: list[str] = []
    counted: list[Pair] = [(tensor, CountingSource(tensor.name, source, reads)) for tensor, source in pairs]
    calibrate(model, counted, SAMPLES, alpha=0.5)
    layers = [int(name.split(".")[2]) for name in reads if ".layers." in name]
    assert layers == sorted(layers)
    assert len(layers) == len(set(reads) - {"model.wte", "model.wpe"})  # each tensor once, none of the head's


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Bytes of tensors alive, counted by torch itself, do not grow with the number of layers."""
    peaks = {}
    for n_layer in (2, 6):
        model, pairs = source_of(tiny_gpt2(tmp_path / f"hf{n_layer}", n_layer=n_layer, n_embd=256))
        peaks[n_layer] = max(peak_tensor_bytes(model, pairs))
    layer_bytes = 12 * 256 * 256 * 4
    assert peaks[6] < peaks[2] + layer_bytes / 4
    assert peaks[2] > layer_bytes


def peak_tensor_bytes(model: ModelConfig, pairs: list[Pair]) -> Iterator[int]:
    """Bytes of all float tensors that exist when each layer's errors are measured."""
    import gc

    from gpt.engine import calibration

    found: list[int] = []
    original = calibration.linear_errors

    def count(*args: object) -> Iterator[ErrorRow]:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        found.append(sum({item.data_ptr(): item.nbytes for item in tensors}.values()))
        return original(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "linear_errors", count)
        calibrate(model, pairs, random_prompts((8, 8), 301), alpha=0.5)
    yield from found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(gpt2: Path, value: float) -> None:
    model, pairs = source_of(gpt2)
    poisoned: list[Pair] = []
    for tensor, source in pairs:
        if tensor.name == "model.layers.1.mlp.dense_h_to_4h.bias":
            values = source.read(0, 1).clone()
            values[0, 5] = value
            poisoned.append((tensor, LoadedVector(values)))
        else:
            poisoned.append((tensor, source))
    with pytest.raises(CheckpointError) as caught:
        calibrate(model, poisoned, SAMPLES, alpha=0.5)
    assert f"layer 1, {FC}: 1 of 128 outputs become NaN or infinite" in str(caught.value)
    assert "check.py" in str(caught.value)


@dataclasses.dataclass
class LoadedVector:
    values: torch.Tensor
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.values[first:last]


def test_separate_scales_never_cost_more_than_a_shared_one(gpt2: Path) -> None:
    model, pairs = source_of(gpt2)
    result = calibrate(model, pairs, SAMPLES, alpha=None)
    assert {row.part for row in result.errors} == {"cache"}
    for layer in range(model.n_layer):
        for quantity in "KV":
            shared, separate = (error(result, layer, "cache", quantity, v) for v in ("shared", "separate"))
            assert separate <= shared * 1.02  # the rounding of single values varies


def test_ranges_of_a_gated_rotary_model_are_those_of_nemos_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**GPT_NEXT)
    model, pairs = nemo_source(tmp_path)
    ids = [5, 17, 200, 31]
    inputs: list[torch.Tensor] = []
    linear = F.linear

    def watched(x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        inputs.append(x.abs().amax(0).float())
        return linear(x, *more)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", watched)
        nemo_logits(config, tiny_state(config), ids)
    result = calibrate(model, pairs, [ids], alpha=1.0, smooth_inner=True)
    for layer, scales in enumerate(result.layers):
        for name, expected in zip((QKV, DENSE, FC, PROJ), inputs[4 * layer :], strict=False):
            factors = scales.linears[name].factors
            assert factors is not None
            torch.testing.assert_close(factors, expected.clamp(min=1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer_s", "told"), [(45.0, "A layer takes 45.0 s, all 2 about 00:01:30"), (20.0, "")])
def test_what_takes_long_is_told_after_the_first_layer(
    layer_s: float, told: str, gpt2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count(0.0, layer_s)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(calibration, "progress", lambda layers, **_: layers)
    with caplog.at_level(logging.INFO, "gpt"):
        smoothed_half(gpt2)
    assert [line for line in caplog.messages if line.startswith("A layer")] == ([told] if told else [])
