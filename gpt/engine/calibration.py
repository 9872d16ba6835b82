"""Calibration: the network over sample texts in float32, layer by layer, to see what its linear layers meet.

The source's tensors are read as they are needed, so that one layer's weights are in memory at a time, and beside them
the residual stream of all samples: tokens * E * 4 bytes.  The network is the one of gpt.network; the original hooks
Hugging Face's modules instead and keeps the whole model in memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from gpt.checkpoint.derived import read_whole
from gpt.checkpoint.layout import gemms
from gpt.checkpoint.smoothquant import LayerScales, LinearScales, Ranges, layer_scales
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.writer import Pair
from gpt.config import ModelConfig
from gpt.console import human_bytes, human_time, log, progress
from gpt.engine.kv_cache import KvCache
from gpt.engine.quant_errors import ErrorRow, cache_errors, linear_errors
from gpt.engine.step import ContextStep
from gpt.engine.torch_executor import ACTIVATION_FUNCTIONS, TorchOps
from gpt.errors import CheckpointError, Problems
from gpt.mapping import Mapping as Ranks
from gpt.network.gpt import block, embed

# Rows of a linear layer's input that are kept to measure the error of its output.
SAMPLE_ROWS = 256
_TABLE_ROWS = 4096
_LONG_S = 60.0
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 4 << 20  # mallopt's number for it; bytes


@dataclass(frozen=True)
class Calibration:
    """Of every layer: what is written with the weights, and how well INT8 represents them."""

    layers: list[LayerScales]
    errors: list[ErrorRow]


class LayerRecord:
    """Running maxima over all samples of what one layer's linear layers and its cache meet, and a sample of the inputs.

    samples: {linear layer: [rows, in]}, at most SAMPLE_ROWS, the same number of each batch.
    """

    def __init__(self, num_batches: int):
        self.rows_per_batch = max(1, SAMPLE_ROWS // num_batches)
        self.ranges: dict[str, Ranges] = {}
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.kv: list[torch.Tensor] = []  # [rows, 2G, D] of each batch
        self.kv_max = torch.zeros(2)

    def see_linear(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        seen = self.ranges.get(name)
        x_max, y_max = magnitudes(x), magnitudes(y)
        if seen is not None:
            x_max, y_max = torch.maximum(seen.x, x_max), torch.maximum(seen.y, y_max)
        self.ranges[name] = Ranges(x_max, y_max)
        self.samples.setdefault(name, []).append(x[self._rows(x)].clone())

    def see_cache(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [N, G, D]."""
        both = torch.stack([torch.maximum(part.amax(), -part.amin()) for part in (k, v)])
        self.kv_max = torch.maximum(self.kv_max.to(both.device), both)
        rows = self._rows(k)
        self.kv.append(torch.cat([k[rows], v[rows]], dim=1))

    def _rows(self, x: torch.Tensor) -> slice:
        return slice(None, None, max(1, -(-x.shape[0] // self.rows_per_batch)))


def magnitudes(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each column of x [N, n]; NaN where there is one."""
    return torch.maximum(x.amax(dim=0), -x.amin(dim=0))  # aminmax takes ten times as long, abs() another copy


class _RecordingOps(TorchOps):
    """The float executor, with linear weights as checkpoints have them, [in, out]."""

    def __init__(self, model: ModelConfig, weights: Mapping[str, torch.Tensor], record: LayerRecord):
        super().__init__(model, Ranks(), weights)
        self.record = record

    def linear(
        self, x: torch.Tensor, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> torch.Tensor:
        y = x @ self.weights[name + ".weight"]
        if bias and name + ".bias" in self.weights:
            y += self.weights[name + ".bias"]
        self.record.see_linear(name.split(".", 3)[3], x, y)
        return y if activation is None else ACTIVATION_FUNCTIONS[activation](y)

    def attention(self, qkv: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        heads = qkv.view(qkv.shape[0], -1, self.model.head_size)
        _, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        self.record.see_cache(k, v)
        return self.attend(heads, 0, scale)  # the cache here is one layer's

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        return x  # every token counts, in the last layer too


@dataclass
class _Batch:
    """Token lists side by side, and their residual stream [N, E] behind the layers so far."""

    step: ContextStep
    x: torch.Tensor


@torch.inference_mode()
def calibrate(
    model: ModelConfig,
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[int]],
    *,
    alpha: float | None,
    smooth_inner: bool = False,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> Calibration:
    """Runs `samples`, token ids of each text, through the model whose float tensors are `pairs`.

    alpha: of SmoothQuant, None for the cache's scales alone.  smooth_inner: dense and proj get smoothers.  Raises
    CheckpointError where activations are not finite.
    """
    _give_back_large_blocks()
    device = device or torch.device("cpu")
    sources = {tensor.name: source for tensor, source in pairs}
    tokens = sum(map(len, samples))
    log.info(
        "Calibrating on %d texts, %d tokens, in float32 on %s: %s between layers",
        *(len(samples), tokens, device, human_bytes(tokens * model.n_embd * 4)),
    )
    batches = list(_embedded(model, sources, samples, batch_size, device))
    cache = _cache(model, samples, batch_size, device)
    result = Calibration([], [])
    begin = time.perf_counter()
    for layer in progress(range(model.n_layer), what="calibrating", unit="layer"):
        record = LayerRecord(len(batches))
        weights = _layer_weights(sources, layer, device)
        ops = _RecordingOps(model, weights, record)
        for batch in batches:
            ops.begin(batch.step, cache)
            batch.x = block(ops, model, Ranks(), batch.x, layer)
        _check_finite(layer, record)
        linears = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in gemms(model)}
        scales = layer_scales(linears, record.ranges, record.kv_max, alpha, smooth_inner=smooth_inner)
        result.errors.extend(cache_errors(layer, torch.cat(record.kv), scales, record.ranges))
        if alpha is not None:
            inputs = {name: torch.cat(rows) for name, rows in record.samples.items()}
            result.errors.extend(linear_errors(model, layer, linears, inputs, scales))
        result.layers.append(_on_cpu(scales))
        del weights, ops, linears
        if layer == 0:
            _tell_duration(time.perf_counter() - begin, model.n_layer)
    return result


def _tell_duration(layer_s: float, num_layers: int) -> None:
    """What is long is told in advance, which a bar tells on a terminal alone."""
    if layer_s * num_layers >= _LONG_S:
        log.info("A layer takes %.1f s, all %d about %s", layer_s, num_layers, human_time(layer_s * num_layers))


def _embedded(
    model: ModelConfig,
    sources: Mapping[str, SourceTensor],
    samples: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
) -> Iterator[_Batch]:
    """The samples in batches, embedded; of the tables only the rows that occur are kept."""
    used = torch.tensor(sorted({token for sample in samples for token in sample}))
    weights = {"model.wte": _rows(sources["model.wte"], used).to(device)}
    if model.learned_positions:
        longest = max(map(len, samples))
        weights["model.wpe"] = _rows(sources["model.wpe"], torch.arange(longest)).to(device)
    ops = TorchOps(model, Ranks(), weights)
    cache = _cache(model, [], 0, device)
    for first in range(0, len(samples), batch_size):
        chosen = samples[first : first + batch_size]
        ids = torch.searchsorted(used, torch.tensor([token for sample in chosen for token in sample]))
        positions = torch.cat([torch.arange(len(sample)) for sample in chosen])
        lengths = tuple(map(len, chosen))
        last = torch.tensor(lengths).cumsum(0) - 1
        step = ContextStep(
            ids.int().to(device), positions.int().to(device), last.to(device), lengths=lengths, padded=False
        )
        ops.begin(step, cache)
        yield _Batch(step, embed(ops, model, Ranks()))


def _rows(table: SourceTensor, wanted: torch.Tensor) -> torch.Tensor:
    """The rows of `table` that `wanted`, in ascending order, numbers: float32."""
    parts = []
    for first in range(0, table.shape[0], _TABLE_ROWS):
        last = min(first + _TABLE_ROWS, table.shape[0])
        here = wanted[(wanted >= first) & (wanted < last)]
        if len(here):
            parts.append(table.read(first, last)[here - first].float())
    return torch.cat(parts)


def _cache(model: ModelConfig, samples: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> KvCache:
    """Room for one layer of one batch: attention writes it, and nothing reads it."""
    shape = (1, 2, batch_size, model.n_kv_head, max(map(len, samples), default=0), model.head_size)
    return KvCache(torch.zeros(shape, device=device))


def _layer_weights(sources: Mapping[str, SourceTensor], layer: int, device: torch.device) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    names = [name for name in sources if name.startswith(prefix)]
    weights = {name: read_whole(sources[name]).float().to(device) for name in names}
    return {**weights, "model.wte": torch.empty(0, device=device)}  # its dtype is the executor's


def _check_finite(layer: int, record: LayerRecord) -> None:
    problems = Problems()
    for name, ranges in record.ranges.items():
        for what, values in (("inputs", ranges.x), ("outputs", ranges.y)):
            if count := int((~torch.isfinite(values)).sum()):
                problems.add(f"layer {layer}, {name}: {count} of {len(values)} {what} become NaN or infinite")
    problems.raise_if_any(
        CheckpointError,
        "the model's activations are not finite, so that nothing can be calibrated",
        hint="look for NaN, infinite or huge weights with: python check.py <model>",
    )


def _give_back_large_blocks() -> None:
    """Has the C library return every large block to the system when it is freed.

    By default glibc keeps blocks of up to 32 MiB and cannot return what lies below a small one that lives on: the 48
    layers of a 1.5B model left 3 GB behind.
    """
    with suppress(OSError, AttributeError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _on_cpu(scales: LayerScales) -> LayerScales:
    def moved(linear: LinearScales) -> LinearScales:
        values = {key: value.cpu() for key, value in vars(linear).items() if value is not None}
        return dataclasses.replace(linear, **values)

    return LayerScales({name: moved(linear) for name, linear in scales.linears.items()}, scales.kv_max.cpu())
