"""The last kernel of a decode step: the chosen tokens become the next step's inputs, without the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import launch_options, wait_for_inputs


@triton.jit
def best_of(values, AXIS: tl.constexpr):
    """The largest along an axis and its index, the first of equals; NaN where there is one, which comparisons drop."""
    best, index = tl.max(values, AXIS, return_indices=True)
    num_nans = tl.sum((values != values).to(tl.int32), AXIS)
    return tl.where(num_nans > 0, float("nan"), best), index


@triton.jit
def _choose_kernel(
    tile_max_ptr,  # [M, num_tiles] float32
    tile_argmax_ptr,  # [M, num_tiles] int32
    ids_ptr,  # [M] int32
    positions_ptr,  # [M] int32
    first_ptr,  # [M] int32
    tokens_ptr,  # [T, 2, M] int32
    num_tiles,
    PADDED_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0)
    tiles = tl.arange(0, PADDED_TILES)
    values = tl.load(tile_max_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    best, tile = best_of(values, 0)
    tile = tl.minimum(tile, num_tiles - 1)  # among NaN the index means nothing
    token = tl.load(tile_argmax_ptr + row * num_tiles + tile)
    position = tl.load(positions_ptr + row) + 1
    tl.store(ids_ptr + row, token)
    tl.store(positions_ptr + row, position)
    num_rows = tl.num_programs(0)
    place = (position - 1 - tl.load(first_ptr + row)).to(tl.int64) * 2 * num_rows + row
    tl.store(tokens_ptr + place, token)
    tl.store(tokens_ptr + place + num_rows, best.to(tl.int32, bitcast=True))


def choose_greedy(
    tiles: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Of each row's tile maxima [M, num_tiles] the largest, the first of equals.

    It becomes `ids` [M]; it and the bits of its logit go to tokens[position - first] ([T, 2, M] int32), where `first`
    [M] is the position a sequence began to generate at; `positions` [M] move on by one.
    """
    tile_max, tile_argmax = tiles
    num_rows, num_tiles = tile_max.shape
    padded_tiles = triton.next_power_of_2(num_tiles)
    _choose_kernel[(num_rows,)](
        tile_max,
        tile_argmax,
        ids,
        positions,
        first,
        tokens,
        num_tiles,
        PADDED_TILES=padded_tiles,
        num_warps=max(4, min(16, padded_tiles // 256)),
        **launch_options(ids.device),
    )
