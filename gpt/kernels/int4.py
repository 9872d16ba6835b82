"""Packed 4-bit weights, as the kernels integer_gemv.py (one row) and int4_skinny.py (several) read them.

A byte holds two neighbours of a row, the even column in its low four bits, in two's complement; a scale is the value of
one step, of a whole row or of each group of its columns.  See gpt.quant.
"""

from __future__ import annotations

import torch

from gpt.kernels.product import Gate
from gpt.quant import dequantize_weight, unpack_int4


def check_int4(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    gate: Gate | None = None,
) -> int:
    """The columns that share a scale, 0 for all of them; ValueError names what does not fit."""
    if weight.dtype != torch.uint8 or weight.dim() != 2 or not weight.is_contiguous() or weight.shape[1] % 4:
        raise ValueError(
            f"weight: found {weight.dtype} {tuple(weight.shape)}, expected uint8 [N, K / 2], K a multiple of 8"
        )
    num_rows, num_columns = len(weight), 2 * weight.shape[1]
    groups = scale.shape[1] if scale.dim() == 2 else 0
    group = num_columns // groups if groups else 0
    if groups and (group * groups != num_columns or group < 32 or group & (group - 1)):
        raise ValueError(f"scale: found {groups} groups in {num_columns} columns, expected groups of 32, 64, 128, ...")
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "x": (x, (x.shape[0], num_columns)),
        "out": (out, (x.shape[0], num_rows)),
        "bias": (bias, (num_rows,)),
        "scale": (scale, (num_rows, groups) if groups else (num_rows,)),
    }
    if gate is not None:
        expected["gate"] = (gate.weight, tuple(weight.shape))
        expected["gate scale"] = (gate.scale, tuple(scale.shape))
        if gate.scale is None or (gate.bias is None) != (bias is None):
            raise ValueError("gate: expected a scale, and a bias where the first product has one")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
            raise ValueError(f"{name}: found {tuple(tensor.shape)}, expected {shape}, contiguous")
    return group


def widened(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, K] float32, for `gpt.kernels.product.reference`."""
    return dequantize_weight(unpack_int4(weight), scale)
