"""What `gpt.kernels.w8a8` makes of a tile's sums, and where it stores that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import activate, fetch_lines, to_steps
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
def fetch_tile(out_ptr, first_token, first_row, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Asks for the float32 values that a tile's sums will be added to."""
    tokens = tl.minimum(first_token + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_N // 32) * 32, N - 1)
    fetch_lines(out_ptr, (tokens[:, None] * N + rows[None, :]) * 4)


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
    out_ptr,  # [SPLIT_K, M, N]; [M, N - KV_COLUMNS] of QUERIES_ALONE
    next_row_scale_ptr,  # [M] float32
    places_ptr,  # [M] int32
    blocks_ptr,  # [2, B, G, TOKENS_PER_BLOCK, D]
    kv_scales_ptr,  # [2] float32
    part_stride,  # from K's blocks to V's
    tokens_per_block,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ADD_TO_OUT: tl.constexpr,
    REDUCES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERIES_ALONE: tl.constexpr,
    QUANTIZES_CACHE: tl.constexpr,
):
    """GROUPS: of the cache that takes the last columns, 0 where none does.  QUERIES_ALONE: `out` does without these."""
    tokens = first_token + tl.arange(0, sums.shape[0])
    rows = first_row + tl.arange(0, sums.shape[1])
    in_tokens = tokens < M
    in_rows = rows < N
    y = sums.to(tl.float32) * col_scale[None, :] * row_scale[:, None]
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    KV_COLUMNS: tl.constexpr = 2 * GROUPS * HEAD_SIZE
    width = N - KV_COLUMNS if QUERIES_ALONE else N
    places = (part * M + tokens).to(tl.int64)[:, None] * width + rows[None, :]
    inside = in_tokens[:, None] & (rows < width)[None, :]
    if QUANTIZES:
        scale = tl.load(next_scale_ptr)
        if SMOOTHED:
            y = tl.div_rn(y, tl.load(smoother_ptr + rows, mask=in_rows, other=1.0)[None, :])
        tl.store(out_ptr + places, to_steps(y * tl.div_rn(1.0, scale), out_ptr), mask=inside)
        next_row_scale = tl.where(row_scale == row_scale, scale, row_scale)
        tl.store(next_row_scale_ptr + tokens, next_row_scale, mask=in_tokens & (first_row == 0))
    elif ADD_TO_OUT:
        if REDUCES:  # in the L2 cache; a value gets one sum, so that their order is no question
            tl.atomic_add(out_ptr + places, y, mask=inside, sem="relaxed")
        else:
            _add_in_pieces(y, out_ptr, tokens, first_row, M, N)
    else:
        values = y.to(out_ptr.dtype.element_ty)
        if first_row < width:
            tl.store(out_ptr + places, values, mask=inside)
        if GROUPS > 0:
            _store_kv(
                values,
                tokens,
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
def _add_in_pieces(y, out_ptr, tokens, first_row, M, N):
    """out[tokens, first_row...] += y, some columns at a time: registers hold the sums and little else."""
    if y.shape[1] > 32:
        halves = tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)).permute(0, 2, 1)
        left, right = tl.split(halves)
        _add_in_pieces(left, out_ptr, tokens, first_row, M, N)
        _add_in_pieces(right, out_ptr, tokens, first_row + y.shape[1] // 2, M, N)
    else:
        rows = first_row + tl.arange(0, y.shape[1])
        places = out_ptr + tokens.to(tl.int64)[:, None] * N + rows[None, :]
        inside = (tokens < M)[:, None] & (rows < N)[None, :]
        tl.store(places, tl.load(places, mask=inside) + y, mask=inside)


@triton.jit
def _store_kv(
    values,  # [BLOCK_M, BLOCK_N] of the result's type
    tokens,
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
        column = first_row + tl.arange(0, values.shape[1]) - first
        in_columns = (column >= 0) & (column < 2 * GROUPS * HEAD_SIZE)
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
