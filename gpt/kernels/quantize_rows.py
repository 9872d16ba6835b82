"""Rows of activations turned into int8 or FP8 with what comes before: a residual sum, a norm, a smoother.

out = x / scale, rounded and saturated; the scale is given or found per row; see gpt.quant.  One program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import launch_options, next_power_of_2, to_steps
from gpt.kernels.norm import check_rows, summed_row
from gpt.kernels.product import Norm, expect
from gpt.quant import FP8_MAX, INT8_MAX

# The largest step of each type.
LARGEST = {torch.int8: float(INT8_MAX), torch.float8_e4m3fn: FP8_MAX}


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K]
    parts_ptr,  # [PARTS, M, K]
    bias_ptr,  # [K]
    weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    smoother_ptr,  # [K] float32
    input_scale_ptr,  # [] float32
    out_ptr,  # [M, K] int8 or float8e4nv
    row_scale_ptr,  # [M] float32
    M,
    epsilon,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    SMOOTHED: tl.constexpr,
    STATIC: tl.constexpr,
    LARGEST: tl.constexpr,
    PADDED_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Each thread takes 16 bytes of x at a time, beside its neighbours' 16: what it then stores is narrower.  As one
    # dimension the store's 16 bytes would decide, and a warp's loads lie 64 bytes apart.
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    columns = tl.arange(0, PADDED_K // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    inside = columns < K
    # Asked for here, before the wait in `summed_row`, they have come when the row has been normalised.
    if SMOOTHED:
        smoother = tl.load(smoother_ptr + columns, mask=inside, other=1.0)
    if STATIC:
        scale = tl.load(input_scale_ptr)
    x = summed_row(
        x_ptr,
        parts_ptr,
        bias_ptr,
        weight_ptr,
        norm_bias_ptr,
        row,
        columns,
        M,
        epsilon,
        K,
        PARTS,
        HAS_BIAS,
        NORM,
        DEPENDENT,
    )
    if SMOOTHED:
        x = tl.div_rn(x, smoother)
    # No step tells of an overflow before; the scale does, and makes the whole row's results NaN.
    if STATIC:
        row_scale = scale + tl.sum(x * 0.0)  # of zeros, or of what is no number
    else:
        infinity: tl.constexpr = float("inf")
        largest = tl.max(tl.where(tl.abs(x) < infinity, tl.abs(x), infinity))
        scale = tl.div_rn(tl.maximum(largest, 1e-6), LARGEST)
        row_scale = tl.where(largest < infinity, scale, float("nan"))
    tl.store(out_ptr + row * K + columns, to_steps(x * tl.div_rn(1.0, scale), out_ptr), mask=inside)
    tl.store(row_scale_ptr + row, row_scale)


def quantize_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    norm: Norm | None = None,
    input_scale: torch.Tensor | None = None,
    smoother: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """x += sum of parts (+ bias); out = steps of norm(x) (/ smoother), row_scale = the value of one, in one pass.

    x [M, K] of any float type; float32 where `parts` [PARTS, M, K] are added to it (`bias` [K] only with them).  out
    [M, K] int8 or float8_e4m3fn.  row_scale [M] float32: input_scale [] float32 where it is given, else the largest
    magnitude of the row over 127 or 448; NaN for rows that hold NaN or infinity.  smoother [K] float32.

    Raises ValueError for shapes and types that do not fit.
    """
    num_rows, width = x.shape
    check_rows(x, norm, parts, bias)
    if out.dtype not in LARGEST:
        raise ValueError(f"out: found {out.dtype}, expected {' or '.join(map(str, LARGEST))}")
    expect("out", out, (num_rows, width), out.dtype)
    expect("row_scale", row_scale, (num_rows,), torch.float32)
    if input_scale is not None:
        expect("input_scale", input_scale, (), torch.float32)
    if smoother is not None:
        expect("smoother", smoother, (width,), torch.float32)
    if parts is not None and x.dtype != torch.float32:
        raise ValueError(f"x: found {x.dtype}, expected float32 where parts are added to it")
    padded = max(16, next_power_of_2(width))
    quantize_rows_kernel[(num_rows,)](
        x,
        parts if parts is not None else x,
        bias if bias is not None else x,
        norm.weight if norm else x,
        norm.bias if norm and norm.bias is not None else x,
        smoother if smoother is not None else x,
        input_scale if input_scale is not None else x,
        out,
        row_scale,
        num_rows,
        norm.epsilon if norm else 0.0,
        K=width,
        PARTS=0 if parts is None else len(parts),
        HAS_BIAS=bias is not None,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        SMOOTHED=smoother is not None,
        STATIC=input_scale is not None,
        LARGEST=LARGEST[out.dtype],
        PADDED_K=padded,
        num_warps=max(1, min(16, padded // 512)),  # fewer are as fast where there are many rows
        **launch_options(x.device),
    )
