"""How much of a layer INT8 loses: relative L2 errors of weights, outputs and cache, measured while calibrating."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from gpt.checkpoint.layout import QKV
from gpt.checkpoint.smoothquant import LEVELS, LayerScales, LinearScales, Ranges, quantize, tensor_max
from gpt.config import ModelConfig
from gpt.quant import SMALLEST_ROW_MAX

# The four ways to run a linear layer in INT8: scale of the input, scale of the weight.
STATIC_TENSOR, STATIC_CHANNEL = "per-tensor", "per-channel"
TOKEN_TENSOR, TOKEN_CHANNEL = "per-token", "per-token per-channel"


@dataclass(frozen=True)
class ErrorRow:
    """`relative_error` is |quantised - exact| / |exact|.  part: a linear layer's name, or "cache".

    quantity: "weight", "output" (without the bias, on samples of the calibration's activations), "K", "V".  variant:
    one of the modes above for weights and outputs, "shared" or "separate" for the cache.
    """

    layer: int
    part: str
    quantity: str
    variant: str
    relative_error: float


def linear_errors(
    model: ModelConfig,
    layer: int,
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    scales: LayerScales,
) -> Iterator[ErrorRow]:
    """weights [in, out] and inputs [rows, in] by linear layer, before smoothing."""
    for name, weight in weights.items():
        linear = scales.linears[name]
        x, w = inputs[name], weight
        if linear.factors is not None:
            x, w = x / linear.factors, weight * linear.factors[:, None]
        exact = x @ w
        columns = {STATIC_TENSOR: tensor_max(name, linear, model), STATIC_CHANNEL: linear.column_max}
        for mode, max_w in columns.items():
            quantized = quantize(w, LEVELS / max_w).float().mul_(max_w / LEVELS)
            yield ErrorRow(layer, name, "weight", mode, _relative(quantized, w))
            token_mode = TOKEN_TENSOR if mode == STATIC_TENSOR else TOKEN_CHANNEL
            for input_mode, rounded in ((mode, _static(x, linear)), (token_mode, _per_token(x))):
                yield ErrorRow(layer, name, "output", input_mode, _relative(rounded @ quantized, exact))


def cache_errors(layer: int, kv: torch.Tensor, scales: LayerScales, ranges: Mapping[str, Ranges]) -> Iterator[ErrorRow]:
    """kv [rows, 2G, D], K before V: with the original's scale, of the whole projection, and with their own."""
    shared = ranges[QKV].y.amax()
    for quantity, values, own in zip(("K", "V"), kv.chunk(2, dim=1), scales.kv_max, strict=True):
        for variant, largest in (("shared", shared), ("separate", own)):
            yield ErrorRow(layer, "cache", quantity, variant, _relative(_round(values, largest), values))


def _static(x: torch.Tensor, linear: LinearScales) -> torch.Tensor:
    return _round(x, linear.input_max)


def _per_token(x: torch.Tensor) -> torch.Tensor:
    return _round(x, x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ROW_MAX))


def _round(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What INT8 makes of x when `largest` is its range."""
    return (x * (LEVELS / largest)).round_().clamp_(-LEVELS - 1, LEVELS).mul_(largest / LEVELS)


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    size = exact.norm()
    return float((actual - exact).norm() / size) if size > 0 else 0.0
