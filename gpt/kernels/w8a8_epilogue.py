"""What products of int8 and FP8 make of a tile's sums, and where they store that.

`gpt.kernels.w8a8` and `gpt.kernels.w8a8_hopper` lay a tile out over threads in different ways: what depends on that,
the numbers of its tokens and rows and the vectors that belong to these, is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import activate, to_steps
from gpt.kernels.product import expect


@dataclass(frozen=True)
class NextInput:
    """The next product's input, as which a result is stored: steps of result (/ smoother) of the size scale [].

    row_scale [M] float32: where `scale` goes once per row, NaN for rows that have none now.  smoother [N] float32.
    """

    scale: torch.Tensor
    row_scale: torch.Tensor
    smoother: torch.Tensor | None = None

    def check(self, num_tokens: int, num_rows: int) -> None:
        """Raises ValueError naming what does not fit."""
        expect("next scale", self.scale, (), torch.float32)
        expect("next row_scale", self.row_scale, (num_tokens,), torch.float32)
        if self.smoother is not None:
            expect("smoother", self.smoother, (num_rows,), torch.float32)


@triton.jit
def tile_values(
    sums,  # [BLOCK_M, BLOCK_N] int32 or float32
    tokens,  # [BLOCK_M]
    rows,  # [BLOCK_N]
    first_row,
    row_scale,  # [BLOCK_M] float32
    col_scale,  # [BLOCK_N] float32
    bias,  # [BLOCK_N]
    next_scale_ptr,  # [] float32
    smoother_ptr,  # [N] float32
    M,
    N,
    out_ptr,  # of the result's type
    next_row_scale_ptr,  # [M] float32
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """The result [BLOCK_M, BLOCK_N] in the type in which it is stored."""
    y = sums.to(tl.float32) * col_scale[None, :] * row_scale[:, None]
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if QUANTIZES:
        scale = tl.load(next_scale_ptr)
        if SMOOTHED:
            y = tl.div_rn(y, tl.load(smoother_ptr + rows, mask=rows < N, other=1.0)[None, :])
        next_row_scale = tl.where(row_scale == row_scale, scale, row_scale)
        tl.store(next_row_scale_ptr + tokens, next_row_scale, mask=(tokens < M) & (first_row == 0))
        return to_steps(y * tl.div_rn(1.0, scale), out_ptr)
    else:
        return y.to(out_ptr.dtype.element_ty)


@triton.jit
def store_tile(
    values,  # [BLOCK_M, BLOCK_N] of the result's type
    tokens,  # [BLOCK_M]
    rows,  # [BLOCK_N]
    first_row,
    part,  # of SPLIT_K
    M,
    N,
    out_ptr,  # [SPLIT_K, M, N]; [M, N - KV_COLUMNS] of QUERIES_ALONE
    places_ptr,  # [M] int32
    blocks_ptr,  # [2, B, G, tokens_per_block, D]
    kv_scales_ptr,  # [2] float32
    part_stride,  # from K's blocks to V's
    tokens_per_block,
    ADD_TO_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERIES_ALONE: tl.constexpr,
    QUANTIZES_CACHE: tl.constexpr,
):
    """GROUPS: of the cache that takes the last columns, 0 where none does.  QUERIES_ALONE: `out` does without these."""
    KV_COLUMNS: tl.constexpr = 2 * GROUPS * HEAD_SIZE
    width = N - KV_COLUMNS if QUERIES_ALONE else N
    places = (part * M + tokens).to(tl.int64)[:, None] * width + rows[None, :]
    inside = (tokens < M)[:, None] & (rows < width)[None, :]
    if ADD_TO_OUT:  # in the L2 cache, 16 bytes at a time; a value gets one sum, so that their order is no question
        tl.atomic_add(out_ptr + places, values, mask=inside, sem="relaxed")
    else:
        if first_row < width:
            tl.store(out_ptr + places, values, mask=inside)
        if GROUPS > 0:
            _store_kv(
                values,
                tokens,
                rows,
                first_row,
                M,
                N,
                places_ptr,
                blocks_ptr,
                kv_scales_ptr,
                part_stride,
                tokens_per_block,
                GROUPS,
                HEAD_SIZE,
                QUANTIZES_CACHE,
            )


@triton.jit
def _store_kv(
    values,  # [BLOCK_M, BLOCK_N] of the result's type
    tokens,
    rows,
    first_row,
    M,
    N,
    places_ptr,  # [M] int32
    blocks_ptr,  # [2, B, GROUPS, tokens_per_block, HEAD_SIZE]
    kv_scales_ptr,  # [2] float32
    part_stride,  # from K's blocks to V's
    tokens_per_block,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUANTIZES_CACHE: tl.constexpr,
):
    """What of a tile is K or V, the last columns of N, to the cache."""
    first = N - 2 * GROUPS * HEAD_SIZE
    if first_row + values.shape[1] > first:
        column = rows - first
        in_columns = (column >= 0) & (rows < N)
        kind = column // (GROUPS * HEAD_SIZE)  # 0 for K, 1 for V
        head = column // HEAD_SIZE % GROUPS
        place = tl.load(places_ptr + tokens, mask=tokens < M, other=0).to(tl.int64)
        slot = place // tokens_per_block * (GROUPS * tokens_per_block) + place % tokens_per_block
        of_column = kind.to(tl.int64) * part_stride + head * tokens_per_block * HEAD_SIZE + column % HEAD_SIZE
        targets = blocks_ptr + (slot[:, None] * HEAD_SIZE + of_column[None, :])
        inside = (tokens < M)[:, None] & in_columns[None, :]
        if QUANTIZES_CACHE:
            kv_scale = tl.load(kv_scales_ptr + kind, mask=in_columns, other=1.0)
            # Of values rounded to the result's type, as `gpt.kernels.store_cache` reads them.
            steps = to_steps(values.to(tl.float32) * tl.div_rn(1.0, kv_scale)[None, :], blocks_ptr)
            tl.store(targets, steps, mask=inside)
        else:
            tl.store(targets, values, mask=inside)
