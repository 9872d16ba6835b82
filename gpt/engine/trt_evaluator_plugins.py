"""What each plugin computes, by the plain reference of its kernel's file.

A function takes the attributes and the inputs of the layer and returns its outputs in any float type; caches are
updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Dict
from typing import Any

import torch
import torch.nn.functional as F

from gpt.quant import INT8_MAX, dequantize_weight, row_scales, to_int8, unpack_int4

Attributes = Dict[str, Any]
Outputs = tuple[torch.Tensor, ...]


def _attention(
    a: Attributes,
    qkv: torch.Tensor,
    past: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_scale: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Outputs:
    from gpt.kernels.attention_blocks import Rotary
    from gpt.kernels.cached_attention import reference

    heads = qkv.unflatten(-1, (a["num_heads"] + 2 * a["num_kv_heads"], a["head_size"]))
    out, new_keys, new_values = reference(
        heads,
        past,
        keys,
        values,
        scale=a["scale"],
        rotary=Rotary(cos, sin) if a["rotary_dim"] else None,
        kv_scale=kv_scale if a["quantized"] else None,
    )
    return out.flatten(2), keys.copy_(new_keys), values.copy_(new_values)


def _normalized(a: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if a["kind"] == "none":
        return x.float()
    if a["kind"] == "rmsnorm":
        return F.rms_norm(x.float(), (a["width"],), weight, a["epsilon"])
    return F.layer_norm(x.float(), (a["width"],), weight, bias, a["epsilon"])


def _norm(a: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Outputs:
    return (_normalized(a, x, weight, bias),)


def _quantize_rows(
    a: Attributes,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    smoother: torch.Tensor,
    input_scale: torch.Tensor,
) -> Outputs:
    y = _normalized(a, x, weight, bias)
    y = y / smoother if a["smoothed"] else y
    scale = input_scale.expand(*y.shape[:-1], 1) if a["static"] else row_scales(y, INT8_MAX)
    return to_int8(y, scale), scale[..., 0]


def _int8_gemm(
    a: Attributes,
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    col_scale: torch.Tensor,
    bias: torch.Tensor,
) -> Outputs:
    from gpt.kernels.w8a8 import reference

    y = reference(
        x.flatten(0, -2),
        row_scale.flatten(),
        weight,
        col_scale,
        bias=bias if a["has_bias"] else None,
        activation=a["activation"],
    )
    return (y.unflatten(0, x.shape[:-1]),)


def _weight_only_gemm(
    a: Attributes, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> Outputs:
    from gpt.kernels.product import reference

    steps = unpack_int4(weight.view(torch.uint8)) if a["bits"] == 4 else weight
    wide = dequantize_weight(steps, scale)
    y = reference(x.flatten(0, -2), wide, bias=bias if a["has_bias"] else None, activation=a["activation"])
    return (y.unflatten(0, x.shape[:-1]),)


def _lookup(a: Attributes, ids: torch.Tensor, words: torch.Tensor) -> Outputs:
    return (F.embedding(ids, words),)


PLUGINS: dict[str, Callable[..., Outputs]] = {
    "attention": _attention,
    "norm": _norm,
    "quantize_rows": _quantize_rows,
    "int8_gemm": _int8_gemm,
    "weight_only_gemm": _weight_only_gemm,
    "lookup": _lookup,
}
