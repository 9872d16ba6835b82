"""Attention of the new tokens of many sequences in one launch, each behind a past of its own in a cache of blocks.

Sequences stand one after the other, of any lengths: whole prompts, later parts of prompts, drafts.  A program takes a
tile of queries that share a key/value head, as in `gpt.kernels.cached_attention`, from a list of tiles that the host
made.  K and V come from the blocks, the new tokens' too: `gpt.kernels.store_cache` has put them there.  Only where the
cache is quantised, tokens without a past attend to each other as they were projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import launch_options, next_power_of_2, wait_for_inputs
from gpt.kernels.product import expect


@dataclass(frozen=True)
class PagedAttentionConfig:
    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["table_width"])  # which is another one from step to step
def _paged_attention_kernel(
    qkv_ptr,  # [N, WIDTH]
    tiles_ptr,  # [tiles, 2] int32: sequence, first query
    sequences_ptr,  # [B, 3] int32: first token, new tokens, tokens of the past
    table_ptr,  # [B, table_width] int32
    keys_ptr,  # [num_blocks, G, TOKENS_PER_BLOCK, D]
    values_ptr,  # the same
    kv_scale_ptr,  # [2] float32
    out_ptr,  # [N, H, D]
    scale,
    table_width,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    group = tl.program_id(1)
    SHARED: tl.constexpr = H // G
    wait_for_inputs(DEPENDENT)
    row = tl.load(tiles_ptr + 2 * tile)
    first_query = tl.load(tiles_ptr + 2 * tile + 1)
    begin = tl.load(sequences_ptr + 3 * row).to(tl.int64)
    num_new = tl.load(sequences_ptr + 3 * row + 1)
    past = tl.load(sequences_ptr + 3 * row + 2)
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < D)[None, :]
    queries = first_query + tl.arange(0, BLOCK_M)
    tokens = queries // SHARED
    heads = group * SHARED + queries % SHARED
    in_queries = (tokens < num_new)[:, None] & in_head
    qkv_row = qkv_ptr + begin * WIDTH
    places = qkv_row + tokens.to(tl.int64)[:, None] * WIDTH + heads[:, None] * D + dims[None, :]
    q = tl.load(places, mask=in_queries, other=0.0)
    score_scale = scale * 1.4426950408889634  # exponentials are taken to base 2
    value_scale = 1.0
    first_position = past + first_query // SHARED  # what all queries of the tile see ends here
    positions = past + tl.minimum(tokens, num_new - 1)
    end = past + tl.minimum((first_query + BLOCK_M - 1) // SHARED + 1, num_new)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    stored_end = end
    if QUANTIZED:
        stored_end = tl.where(past > 0, end, 0)
        score_scale *= tl.where(past > 0, tl.load(kv_scale_ptr), 1.0)
        value_scale = tl.where(past > 0, tl.load(kv_scale_ptr + 1), 1.0)
    seen_by_all = tl.minimum((first_position + 1) // BLOCK_T * BLOCK_T, stored_end)
    table_row = table_ptr + row * table_width
    for start in tl.range(0, seen_by_all, BLOCK_T, num_stages=STAGES):
        k, v = _load_slots(keys_ptr, values_ptr, table_row, group, start, end, G, TOKENS_PER_BLOCK, D, BLOCK_T, BLOCK_D)
        largest, total, out = _attend(q, k, v, start, positions, score_scale, largest, total, out, False)
    for start in tl.range(seen_by_all, stored_end, BLOCK_T, num_stages=STAGES):
        k, v = _load_slots(keys_ptr, values_ptr, table_row, group, start, end, G, TOKENS_PER_BLOCK, D, BLOCK_T, BLOCK_D)
        largest, total, out = _attend(q, k, v, start, positions, score_scale, largest, total, out, True)
    if QUANTIZED:
        for start in tl.range(stored_end, tl.where(past > 0, 0, end), BLOCK_T, num_stages=STAGES):
            new = start + tl.arange(0, BLOCK_T)
            inside = (new < end)[:, None] & in_head
            k_places = qkv_row + new.to(tl.int64)[:, None] * WIDTH + (H + group) * D + dims[None, :]
            k = tl.load(k_places, mask=inside, other=0.0)
            v = tl.load(k_places + G * D, mask=inside, other=0.0)
            largest, total, out = _attend(q, k, v, start, positions, score_scale, largest, total, out, True)
    out = out * (value_scale / total)[:, None]
    target = out_ptr + (begin + tokens)[:, None] * (H * D) + heads[:, None] * D + dims[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=in_queries)


@triton.jit
def _load_slots(
    keys_ptr,
    values_ptr,
    table_row,
    group,
    start,
    end,
    G: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K and V of BLOCK_T slots of a sequence from `start`, zeros from `end`: [BLOCK_T, BLOCK_D] each, as stored."""
    slots = start + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    if TOKENS_PER_BLOCK % BLOCK_T == 0:  # one look at the table for all of them
        block = tl.load(table_row + start // TOKENS_PER_BLOCK).to(tl.int64)
        places = ((block * G + group) * TOKENS_PER_BLOCK + start % TOKENS_PER_BLOCK) * D + tl.arange(0, BLOCK_T) * D
    else:
        blocks = tl.load(table_row + slots // TOKENS_PER_BLOCK, mask=slots < end, other=0).to(tl.int64)
        places = ((blocks * G + group) * TOKENS_PER_BLOCK + slots % TOKENS_PER_BLOCK) * D
    inside = (slots < end)[:, None] & (dims < D)[None, :]
    k = tl.load(keys_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
    v = tl.load(values_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
    return k, v


@triton.jit
def _attend(q, k, v, start, positions, score_scale, largest, total, out, MASKED: tl.constexpr):
    """Slots from `start` on join the running softmax of the queries at `positions`: q [M, D], k and v [T, D].  Every
    query sees the first slot of all, so that nothing is ever the sum of no exponentials."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * score_scale  # [M, T]
    if MASKED:
        slots = start + tl.arange(0, k.shape[0])
        scores = tl.where(slots[None, :] <= positions[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(q.dtype), v.to(q.dtype), out * shrink[:, None], input_precision="ieee")
    return new_largest, total, out


def paged_attention(
    qkv: torch.Tensor,
    tiles: torch.Tensor,
    sequences: torch.Tensor,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    config: PagedAttentionConfig,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Attends causally to each sequence's past and its new tokens, whose K and V are in the cache by now.

    qkv [N, H + 2G, D], sequence after sequence; without kv_scale queries alone [N, H, D] are enough.  tiles [tiles, 2]
    int32: what `query_tiles` lists, each once.  sequences [B, 3] int32: first token of N, new tokens (at least one),
    tokens of the past.  table [B, blocks] int32: each one's cache blocks.  keys, values [num_blocks, G,
    tokens_per_block, D], in qkv's dtype, or int8 or float8_e4m3fn with kv_scale [2] float32: the value of one step in K
    and in V.  out [N, H, D].

    Raises ValueError for shapes and types that do not fit.
    """
    num_tokens, num_all_heads, head_size = qkv.shape
    num_blocks, num_kv_heads, tokens_per_block, _ = keys.shape
    num_heads = out.shape[1]
    if kv_scale is not None or num_all_heads != num_heads:
        num_all_heads = num_heads + 2 * num_kv_heads
    cache = (num_blocks, num_kv_heads, tokens_per_block, head_size)
    expect("qkv", qkv, (num_tokens, num_all_heads, head_size), qkv.dtype)
    expect("tiles", tiles, (len(tiles), 2), torch.int32)
    expect("sequences", sequences, (len(table), 3), torch.int32)
    expect("table", table, tuple(table.shape), torch.int32)
    expect("out", out, (num_tokens, num_heads, head_size), qkv.dtype)
    for name, part in (("keys", keys), ("values", values)):
        expect(name, part, cache, qkv.dtype if kv_scale is None else keys.dtype)
    if kv_scale is not None:
        expect("kv_scale", kv_scale, (2,), torch.float32)
    _paged_attention_kernel[(len(tiles), num_kv_heads)](
        qkv,
        tiles,
        sequences,
        table,
        keys,
        values,
        kv_scale if kv_scale is not None else sequences,
        out,
        scale,
        table.shape[1],
        H=num_heads,
        G=num_kv_heads,
        D=head_size,
        WIDTH=num_all_heads * head_size,
        TOKENS_PER_BLOCK=tokens_per_block,
        QUANTIZED=kv_scale is not None,
        BLOCK_M=config.block_m,
        BLOCK_T=config.block_t,
        BLOCK_D=_padded(head_size),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(qkv.device),
    )


def query_tiles(
    num_new: Sequence[int], num_past: Sequence[int], queries_per_token: int, block_m: int
) -> list[tuple[int, int]]:
    """(sequence, first query) of every tile, those with most to read first, so that the last ones end together.

    queries_per_token: the heads that share a key/value head, H / G.
    """
    tiles = [
        (num_past[row] + first // queries_per_token, row, first)
        for row, count in enumerate(num_new)
        for first in range(0, count * queries_per_token, block_m)
    ]
    return [(row, first) for _, row, first in sorted(tiles, reverse=True)]


def default_config(head_size: int, itemsize: int) -> PagedAttentionConfig:
    """Tiles that fit 96 KiB of shared memory with those on their way; float32, which has no matrix units, is for
    comparing."""
    row_bytes = _padded(head_size) * itemsize
    if itemsize == 4:
        size = max(16, min(32, 8192 // row_bytes))
        return PagedAttentionConfig(size, size, 4, 1)
    block_m, block_t = max(32, min(128, 32768 // row_bytes)), max(16, min(64, 16384 // row_bytes))
    return PagedAttentionConfig(block_m, block_t, 4 if row_bytes <= 128 else 8, 3 if row_bytes <= 128 else 2)


def _padded(head_size: int) -> int:
    return max(16, next_power_of_2(head_size))


def reference(
    qkv: torch.Tensor,
    sequences: torch.Tensor,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    kv_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output [N, H, D] in float64."""
    num_kv_heads, tokens_per_block = keys.shape[1:3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    out = qkv.new_empty((qkv.shape[0], num_heads, qkv.shape[2]), dtype=torch.float64)
    for (begin, num_new, past), blocks in zip(sequences.tolist(), table.long(), strict=True):
        q, *new = qkv[begin : begin + num_new].double().transpose(0, 1).split([num_heads, *[num_kv_heads] * 2])
        slots = torch.arange(past + num_new, device=qkv.device)
        parts = []
        for index, (cache, fresh) in enumerate(((keys, new[0]), (values, new[1]))):
            stored = cache[blocks[slots // tokens_per_block], :, slots % tokens_per_block].double().transpose(0, 1)
            step = 1.0 if kv_scale is None else kv_scale[index].double()
            attended = stored * step if past or kv_scale is None else fresh  # [G, T, D]
            parts.append(attended.repeat_interleave(num_heads // num_kv_heads, 0))
        scores = scale * (q @ parts[0].mT)  # [H, S, T]
        hidden = slots[None, :] > slots[past:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        out[begin : begin + num_new] = (weights @ parts[1]).transpose(0, 1)
    return out
