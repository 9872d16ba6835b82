"""The keys and values of prompts put into the cache, in its own numbers: K and V of every token in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import cdiv, launch_options, next_power_of_2, to_steps, wait_for_inputs
from gpt.kernels.product import expect

_VALUES = 1024  # per program


@dataclass(frozen=True)
class CacheSlots:
    """Where the keys and values of N tokens go.

    places [N] int32: block * T + slot.  blocks [2, B, G, T, D], K before V, of the values' type, or int8 or
    float8_e4m3fn with scales [2] float32, the value of one step of K and of V; each of the two contiguous, as in the
    part of a cache that one sequence has.
    """

    places: torch.Tensor
    blocks: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Of a token's keys and values."""
        _, _, groups, _, head_size = self.blocks.shape
        return 2 * groups * head_size

    def check(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Raises ValueError naming what does not fit."""
        expect("places", self.places, (num_tokens,), torch.int32)
        for name, part in zip(("K's blocks", "V's blocks"), self.blocks, strict=True):
            expect(name, part, tuple(self.blocks.shape[1:]), dtype if self.scales is None else part.dtype)
        if self.scales is not None:
            expect("scales", self.scales, (2,), torch.float32)


@triton.jit
def _store_cache_kernel(
    heads_ptr,  # [N, H + 2G, D]
    places_ptr,  # [N] int32
    scales_ptr,  # [2] float32
    blocks_ptr,  # [2, B, G, T, D]
    part_stride,  # from K's blocks to V's
    NUM_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    QUANTIZES: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # K heads, then V heads
    columns = tl.arange(0, PADDED_SIZE)[None, :]
    in_rows = rows < 2 * GROUPS
    inside = in_rows[:, None] & (columns < HEAD_SIZE)
    wait_for_inputs(DEPENDENT)
    place = tl.load(places_ptr + token).to(tl.int64)
    source = token * (NUM_HEADS + 2 * GROUPS) + NUM_HEADS + rows
    x = tl.load(heads_ptr + source[:, None] * HEAD_SIZE + columns, mask=inside, other=0.0)
    slot = (place // TOKENS_PER_BLOCK * GROUPS + rows % GROUPS) * TOKENS_PER_BLOCK + place % TOKENS_PER_BLOCK
    target = (slot * HEAD_SIZE + rows // GROUPS * part_stride)[:, None] + columns
    if QUANTIZES:
        scale = tl.load(scales_ptr + rows // GROUPS, mask=in_rows, other=1.0)
        steps = to_steps(x.to(tl.float32) * tl.div_rn(1.0, scale)[:, None], blocks_ptr)
        tl.store(blocks_ptr + target, steps, mask=inside)
    else:
        tl.store(blocks_ptr + target, x, mask=inside)


def store_cache(heads: torch.Tensor, slots: CacheSlots) -> None:
    """Writes the K and V of each token to its place.  heads [N, H + 2G, D], queries first.

    Raises ValueError for shapes and types that do not fit.
    """
    num_tokens, num_heads, _ = heads.shape
    _, _, groups, tokens_per_block, head_size = slots.blocks.shape
    expect("heads", heads, (num_tokens, num_heads, head_size), heads.dtype)
    slots.check(num_tokens, heads.dtype)
    padded = next_power_of_2(head_size)
    rows = min(max(1, _VALUES // padded), next_power_of_2(2 * groups))
    _store_cache_kernel[(num_tokens, cdiv(2 * groups, rows))](
        heads,
        slots.places,
        slots.scales if slots.scales is not None else slots.places,
        slots.blocks,
        slots.blocks.stride(0),
        NUM_HEADS=num_heads - 2 * groups,
        GROUPS=groups,
        HEAD_SIZE=head_size,
        TOKENS_PER_BLOCK=tokens_per_block,
        QUANTIZES=slots.scales is not None,
        ROWS=rows,
        PADDED_SIZE=padded,
        num_warps=max(1, rows * padded // 256),
        **launch_options(heads.device),
    )
