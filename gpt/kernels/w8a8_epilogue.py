"""What `gpt.kernels.w8a8` makes of a tile's sums, and where it stores that."""

from __future__ import annotations

import triton
import triton.language as tl

from gpt.kernels.launch import activate, to_steps


@triton.jit
def finish_tile(
    sums,  # [BLOCK_M, BLOCK_N] int32 or float32
    row_scale,  # [BLOCK_M] float32
    col_scale,  # [BLOCK_N] float32
    bias,  # [BLOCK_N]
    part,  # of SPLIT_K
    first_token,
    first_row,
    next_scale_ptr,  # [] float32
    smoother_ptr,  # [N] float32
    M,
    N,
    out_ptr,  # [SPLIT_K, M, N]
    next_row_scale_ptr,  # [M] float32
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    tokens = first_token + tl.arange(0, sums.shape[0])
    rows = first_row + tl.arange(0, sums.shape[1])
    in_tokens = tokens < M
    in_rows = rows < N
    y = sums.to(tl.float32) * col_scale[None, :] * row_scale[:, None]
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    places = (part * M + tokens).to(tl.int64)[:, None] * N + rows[None, :]
    inside = in_tokens[:, None] & in_rows[None, :]
    if QUANTIZES:
        scale = tl.load(next_scale_ptr)
        if SMOOTHED:
            y = tl.div_rn(y, tl.load(smoother_ptr + rows, mask=in_rows, other=1.0)[None, :])
        tl.store(out_ptr + places, to_steps(y * tl.div_rn(1.0, scale), out_ptr), mask=inside)
        next_row_scale = tl.where(row_scale == row_scale, scale, row_scale)
        tl.store(next_row_scale_ptr + tokens, next_row_scale, mask=in_tokens & (first_row == 0))
    else:
        tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=inside)
