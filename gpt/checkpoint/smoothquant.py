"""SmoothQuant (Xiao et al. 2023) and the scales of an INT8 cache: from what calibration saw to the tensors written.

Symbols: W [in, out]; x_j the largest magnitude of input j, y_k of output k, m_j of row j of W, w_k of column k.

    smoothing  s_j = max(1e-5, x_j^alpha / m_j^(1 - alpha));  W[j, :] *= s_j;  what makes input j is divided by s_j
    per tensor     weight.int8 = round(W 127 / max w), clipped to [-127, 127]
    per channel    weight.int8.col = round(W 127 / w_k), the same

Everything is computed in float32 (s in float64) from float32 weights, whatever dtype the float files are stored in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.checkpoint.layout import DENSE, FC, GATE, PROJ, QKV, QuantFiles, Tensor, gemms, quant_tensors
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.torch_file import LoadedTensor
from gpt.config import ModelConfig
from gpt.errors import GptError

if TYPE_CHECKING:
    import torch

    from gpt.checkpoint.writer import Pair

LEVELS = 127  # -128 is never used: the range is symmetric
_SMALLEST_FACTOR = 1e-5
# A row, column, input or output of zeros has no scale of its own; any would do, infinity would not.
_SMALLEST_ROW, _SMALLEST_RANGE = 1e-5, 1e-8
# The layernorm in front, and the linear layers that share its output and therefore their factors.
_NORMS = {QKV: "input_layernorm", FC: "post_attention_layernorm", GATE: "post_attention_layernorm"}


@dataclass(frozen=True)
class Ranges:
    """What calibration saw of one linear layer: the largest magnitude of each input [in] and output [out], float32."""

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class LinearScales:
    """Of one linear layer, after smoothing; float32.

    factors: what W's rows are multiplied by [in], None without smoothing.  input_max, output_max: of the smoothed input
    and of the output, one number each.  column_max: of the smoothed weight [out].
    """

    factors: torch.Tensor | None
    input_max: torch.Tensor
    output_max: torch.Tensor
    column_max: torch.Tensor


@dataclass(frozen=True)
class LayerScales:
    """Of one layer: `linears` by name within the layer; kv_max [2], the largest magnitudes of what its cache gets, K
    (after the rotary embedding) and V."""

    linears: Dict[str, LinearScales]
    kv_max: torch.Tensor


def smoothing_factors(x: torch.Tensor, rows: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_j [in] float32 from x_j and m_j; alpha 1 moves the whole range of the inputs into the weights, 0 none of it.

    A row of zeros counts as 1e-5, so that it does not make its factor infinite.  An input that was always zero has a
    factor of 1: one of 1e-5 would round its weights away, and it may not be zero in the next text.
    """
    wide, rows = x.double(), rows.double().clamp(min=_SMALLEST_ROW)
    factors = (wide.pow(alpha) / rows.pow(1.0 - alpha)).clamp(min=_SMALLEST_FACTOR)
    return factors.where(wide > 0, 1.0).float()


def layer_scales(
    weights: Dict[str, torch.Tensor],
    ranges: Dict[str, Ranges],
    kv_max: torch.Tensor,
    alpha: float | None,
    *,
    smooth_inner: bool,
) -> LayerScales:
    """weights: the layer's linear weights [in, out] float32 by name within the layer.  alpha None: no smoothing.
    smooth_inner: dense and proj too."""
    import torch

    factors: dict[str, torch.Tensor | None] = dict.fromkeys(weights)
    if alpha is not None:
        groups = [[QKV], [name for name in (FC, GATE) if name in weights]]
        groups += [[DENSE], [PROJ]] if smooth_inner else []
        for group in groups:
            rows = torch.stack([weights[name].abs().amax(dim=1) for name in group]).amax(dim=0)
            factors.update(dict.fromkeys(group, smoothing_factors(ranges[group[0]].x, rows, alpha)))
    linears = {}
    for name, weight in weights.items():
        s, x = factors[name], ranges[name].x
        columns = (weight if s is None else weight * s[:, None]).abs().amax(dim=0)
        linears[name] = LinearScales(
            factors=s,
            input_max=(x if s is None else x / s).amax().clamp(min=_SMALLEST_RANGE),
            output_max=ranges[name].y.amax().clamp(min=_SMALLEST_RANGE),
            column_max=columns.clamp(min=_SMALLEST_RANGE),
        )
    return LayerScales(linears, kv_max.clamp(min=_SMALLEST_RANGE))


def tensor_max(name: str, scales: LinearScales, model: ModelConfig) -> torch.Tensor:
    """max w of the per-tensor form: [1], or of the fused projection [out] with one value over each of Q, K and V."""
    import torch

    if name != QKV:
        return scales.column_max.amax().reshape(1)
    widths = [heads * model.head_size for heads in (model.n_head, model.n_kv_head, model.n_kv_head)]
    return torch.cat([part.amax().expand(len(part)) for part in scales.column_max.split(widths)])


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(weight * scale), half to even, clipped to [-127, 127], as int8; scale is 127 / max w, [1] or [out]."""
    import torch

    return (weight * scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def factor_values(name: str, scales: LinearScales, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every scale of one linear layer by the last part of its name in the table, float32."""
    mx, my = scales.input_max.reshape(1), scales.output_max.reshape(1)
    values = {"scale_x_orig_quant": LEVELS / mx, "scale_y_quant_orig": my / LEVELS}
    for suffix, mw in (("", tensor_max(name, scales, model)), (".col", scales.column_max)):
        values[f"scale_w_quant_orig{suffix}"] = mw / LEVELS
        values[f"scale_y_accum_quant{suffix}"] = (LEVELS / my) / ((LEVELS / mx) * (LEVELS / mw))
    if scales.factors is not None and name not in _NORMS:
        values["smoother"] = scales.factors
    return values


def quantized_pairs(
    model: ModelConfig, pairs: Sequence[Pair], layers: Sequence[LayerScales], files: QuantFiles
) -> list[Pair]:
    """What is written in place of `pairs`: the float tensors, smoothed where they are, and what `files` names."""
    sources = {tensor.name: source for tensor, source in pairs}
    result: list[Pair] = [(tensor, _smoothed(tensor, source, layers)) for tensor, source in pairs]
    values: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        for name in gemms(model):
            prefix = f"model.layers.{index}.{name}."
            values |= {prefix + key: value for key, value in factor_values(name, layer.linears[name], model).items()}
        values[f"model.layers.{index}.{QKV}.scale_kv_quant_orig"] = layer.kv_max / LEVELS
    for tensor in quant_tensors(model, files):
        if tensor.kind == "factor":
            result.append((tensor, LoadedTensor(_usable(tensor, values[tensor.name]))))
            continue
        number, local_name = tensor.place  # 3, attention.dense.weight.int8.col
        assert number is not None
        name = local_name.partition(".weight.")[0]
        scales = layers[number].linears[name]
        columns = scales.column_max if local_name.endswith(".col") else tensor_max(name, scales, model)
        source = sources[f"model.layers.{number}.{name}.weight"]
        result.append((tensor, _Quantized(copy.copy(source), scales.factors, LEVELS / columns)))
    return result


def _usable(tensor: Tensor, values: torch.Tensor) -> torch.Tensor:
    import torch

    if not (torch.isfinite(values) & (values > 0)).all():
        raise GptError(
            f"no scale comes out for {tensor.name}",
            found=f"{float(values.min()):g} to {float(values.max()):g}",
            allowed="finite numbers above 0",
            hint="the activations leave the range of float32; look at the model's weights with check.py",
        )
    return values


def _smoothed(tensor: Tensor, source: SourceTensor, layers: Sequence[LayerScales]) -> SourceTensor:
    """The float tensor as it is written: layernorms divided, the weights behind them multiplied."""
    layer, local_name = tensor.place
    if layer is None:
        return source
    linears = layers[layer].linears
    name, _, part = local_name.rpartition(".")
    for linear, norm in _NORMS.items():
        if linear not in linears or (s := linears[linear].factors) is None:
            continue
        if name == norm:
            return _Smoothed(source, s, divided=True)
        if name == linear and part == "weight":
            return _Smoothed(source, s, divided=False)
    return source


@dataclass(frozen=True)
class _Smoothed:
    """A vector divided by `factors`, or a matrix whose rows are multiplied by them."""

    source: SourceTensor
    factors: torch.Tensor
    divided: bool
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, first: int, last: int) -> torch.Tensor:
        values = self.source.read(first, last).float()
        return values / self.factors if self.divided else values * self.factors[first:last, None]


@dataclass(frozen=True)
class _Quantized:
    """Rows of a weight, smoothed and quantised as they are read."""

    source: SourceTensor
    factors: torch.Tensor | None
    scale: torch.Tensor  # [1] or [out]
    dtype = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, first: int, last: int) -> torch.Tensor:
        values = self.source.read(first, last).float()
        if self.factors is not None:
            values = values * self.factors[first:last, None]
        return quantize(values, self.scale)
