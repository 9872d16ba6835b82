"""Attention of one new token per sequence over the cache, with rotation and the cache's update inside.

A program takes the heads that share one key/value head (one with multi-head, all with multi-query attention, so that K
and V are read once) and a part of the past; parts are joined by their softmax sums (flash-decoding, Dao et al. 2023).
The past is requested before the kernel waits for the query: older steps wrote it.  The new token never makes the trip
through the cache: the last part takes it from the projection and stores it for later steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.attention_blocks import Rotary, attend, join_spread, rotate_heads, rotated, stored
from gpt.kernels.launch import (
    fetch_before,
    fetch_share,
    launch_options,
    num_multiprocessors,
    start_dependents,
    wait_for_inputs,
)
from gpt.quant import to_fp8, to_int8


@dataclass(frozen=True)
class AttentionConfig:
    block_t: int
    num_splits: int
    num_warps: int


@triton.jit
def _attention_kernel(
    qkv_ptr,  # [B, H + 2G, D]
    positions_ptr,  # [B] int32
    table_ptr,  # [B, table_width] int32
    keys_ptr,  # [num_blocks, G, TOKENS_PER_BLOCK, D]
    values_ptr,  # the same
    kv_scale_ptr,  # [2] float32
    cos_ptr,  # [T, ROTARY_DIM / 2] float32
    sin_ptr,
    out_ptr,  # [B, H, D]
    part_out_ptr,  # [B, H, NUM_SPLITS, D] float32
    part_sum_ptr,  # [2, B, H, NUM_SPLITS] float32: largest score, sum of exponentials
    scale,
    table_width,
    next_weight_ptr,  # what the kernels after this one will read
    next_lines,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEXT_SHARE: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(EARLY)
    split = tl.program_id(0)
    if NEXT_SHARE > 0 and split >= NUM_SPLITS:
        # Attention leaves the memory idle: these programs fetch weights meanwhile.
        program = (split - NUM_SPLITS) * tl.num_programs(1) + tl.program_id(1)
        fetch_share(next_weight_ptr, next_lines, program, NEXT_SHARE)
        return
    group = tl.program_id(1)
    row = tl.program_id(2)
    heads_per_group: tl.constexpr = H // G
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < D
    past = tl.load(positions_ptr + row)
    tokens_per_split = tl.cdiv(tl.cdiv(past, BLOCK_T), NUM_SPLITS) * BLOCK_T
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, past)
    k_scale = 1.0
    v_scale = 1.0
    if QUANTIZED:
        k_scale = tl.load(kv_scale_ptr)
        v_scale = tl.load(kv_scale_ptr + 1)
    k, v = _load_past(
        keys_ptr,
        values_ptr,
        table_ptr,
        row,
        group,
        begin,
        end,
        table_width,
        G,
        TOKENS_PER_BLOCK,
        ONE_BLOCK,
        D,
        BLOCK_T,
        BLOCK_D,
    )
    # A single head's tokens are spread over SPREAD softmaxes, each with its own copy of the query and the new token.
    copies = tl.zeros((SPREAD, 1), tl.int32)
    place = _places(table_ptr, row, group, past + copies, past + 1, table_width, G, TOKENS_PER_BLOCK, ONE_BLOCK, D)
    wait_for_inputs(DEPENDENT, EARLY)
    heads = tl.arange(0, BLOCK_H)
    in_group = heads < heads_per_group
    qkv_row = qkv_ptr + row.to(tl.int64) * (H + 2 * G) * D
    rows = tl.arange(0, BLOCK_H * SPREAD)
    query = qkv_row + (group * heads_per_group + rows // SPREAD)[:, None] * D
    in_query = (rows // SPREAD < heads_per_group)[:, None] & in_head[None, :]
    q = rotated(query, dims[None, :], in_query, past + copies, cos_ptr, sin_ptr, ROTARY_DIM)  # [rows, BLOCK_D]
    q *= scale * 1.4426950408889634  # exponentials are taken to base 2
    largest = tl.full((BLOCK_H * SPREAD,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H * SPREAD,), tl.float32)
    out = tl.zeros((BLOCK_H * SPREAD, BLOCK_D), tl.float32)
    # The last part is the shortest one.
    if split == NUM_SPLITS - 1:
        new_key = qkv_row + (H + group) * D + copies
        new_value = new_key + G * D
        in_copy = (copies == 0) & in_head[None, :]
        k_new = rotated(new_key, dims[None, :], in_copy, past + copies, cos_ptr, sin_ptr, ROTARY_DIM)
        v_new = tl.load(new_value + dims[None, :], mask=in_copy, other=0.0).to(tl.float32)
        k_stored = stored(k_new, k_scale, keys_ptr, QUANTIZED)
        v_stored = stored(v_new, v_scale, values_ptr, QUANTIZED)
        is_first = in_copy & (tl.arange(0, SPREAD) == 0)[:, None]
        tl.store(keys_ptr + place + dims[None, :], k_stored, mask=is_first)
        tl.store(values_ptr + place + dims[None, :], v_stored, mask=is_first)
        # What later steps will read is what this one uses.
        k_new = k_stored.to(tl.float32) * k_scale
        v_new = v_stored.to(tl.float32) * v_scale
        has_new = rows % SPREAD == 0
        largest = tl.where(has_new, tl.sum(q * k_new, 1), float("-inf"))
        total = tl.where(has_new, 1.0, 0.0)
        out = tl.where(has_new[:, None], v_new, 0.0)
    # Where a part is never more than a block there is no next one, which would take half of the registers.
    SINGLE: tl.constexpr = ONE_BLOCK and TOKENS_PER_BLOCK <= BLOCK_T * NUM_SPLITS
    for block in range(1 if SINGLE else tl.cdiv(end - begin, BLOCK_T)):
        start = begin + block * BLOCK_T
        if not SINGLE:  # it is on its way while this one is worked on
            next_k, next_v = _load_past(
                keys_ptr,
                values_ptr,
                table_ptr,
                row,
                group,
                start + BLOCK_T,
                end,
                table_width,
                G,
                TOKENS_PER_BLOCK,
                ONE_BLOCK,
                D,
                BLOCK_T,
                BLOCK_D,
            )
        if BLOCK_H == 1:
            slots = tl.arange(0, BLOCK_T // SPREAD)[:, None] * SPREAD + rows[None, :]
        else:
            slots = tl.arange(0, BLOCK_T)[None, :]
        inside = start + slots < end
        largest, total, out = attend(q, k, v, inside, k_scale, v_scale, largest, total, out, BLOCK_H, qkv_ptr)
        if not SINGLE:
            k = next_k
            v = next_v
    if BLOCK_H == 1:
        largest, total, out = join_spread(largest, total, out)
    in_out = in_group[:, None] & in_head[None, :]
    if NUM_SPLITS == 1:
        out = out / total[:, None]
        target = out_ptr + (row * H + group * heads_per_group + heads).to(tl.int64)[:, None] * D + dims[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=in_out)
    else:
        parts = (row * H + group * heads_per_group + heads).to(tl.int64) * NUM_SPLITS + split
        tl.store(part_out_ptr + parts[:, None] * D + dims[None, :], out, mask=in_out)
        tl.store(part_sum_ptr + parts, largest, mask=in_group)
        num_parts = tl.num_programs(2) * H * NUM_SPLITS
        tl.store(part_sum_ptr + num_parts + parts, total, mask=in_group)


@triton.jit
def _load_past(
    keys_ptr,
    values_ptr,
    table_ptr,
    row,
    group,
    start,
    end,
    table_width,
    G: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K and V of BLOCK_T slots from `start`, zeros from `end`: [BLOCK_T, BLOCK_D] each, as stored."""
    slots = start + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    places = _places(table_ptr, row, group, slots, end, table_width, G, TOKENS_PER_BLOCK, ONE_BLOCK, D)
    inside = (slots < end)[:, None] & (dims < D)[None, :]
    k = tl.load(keys_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
    v = tl.load(values_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
    return k, v


@triton.jit
def _places(
    table_ptr,
    row,
    group,
    slots,
    end,
    table_width,
    G: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """Where in the cache the slots of a sequence start, in values."""
    if ONE_BLOCK:
        return ((tl.load(table_ptr + row).to(tl.int64) * G + group) * TOKENS_PER_BLOCK + slots) * D
    block = tl.load(table_ptr + row * table_width + slots // TOKENS_PER_BLOCK, mask=slots < end, other=0)
    return ((block.to(tl.int64) * G + group) * TOKENS_PER_BLOCK + slots % TOKENS_PER_BLOCK) * D


@triton.jit
def _join_kernel(
    part_out_ptr,  # [rows, NUM_SPLITS, D] float32
    part_sum_ptr,  # [2, rows, NUM_SPLITS] float32
    out_ptr,  # [rows, D]
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    present = splits < NUM_SPLITS
    largest = tl.load(part_sum_ptr + row * NUM_SPLITS + splits, mask=present, other=float("-inf"))
    totals = tl.load(part_sum_ptr + (tl.num_programs(0) + row) * NUM_SPLITS + splits, mask=present, other=0.0)
    weights = tl.exp2(largest - tl.max(largest, 0))
    inside = present[:, None] & (dims < D)[None, :]
    parts = tl.load(part_out_ptr + (row * NUM_SPLITS + splits)[:, None] * D + dims[None, :], mask=inside, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


def decode_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    config: AttentionConfig,
    rotary: Rotary | None = None,
    kv_scale: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    join: bool = True,
    next_weight: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """Stores the new K and V in the cache and attends to the past and them.

    qkv [B, H + 2G, D].  positions [B] int32: how many tokens each sequence has already.  table [B, blocks] int32: the
    cache blocks of each sequence.  keys, values [num_blocks, G, tokens_per_block, D], in qkv's dtype, or int8 or
    float8_e4m3fn with kv_scale [2]: the value of one step in K and in V.  out [B, H, D].  parts: float32 scratch of
    `scratch_size` values where the past is divided; with `join` off they are the result, for a product that joins them
    itself (gpt.kernels.gemv).  next_weight: what a kernel to come will read; some of it is fetched into the L2 cache
    meanwhile.  early: the next kernel may start at once, see gpt.kernels.launch.

    Raises ValueError for shapes that do not fit.
    """
    batch_size, num_all_heads, head_size = qkv.shape
    num_kv_heads, tokens_per_block = keys.shape[1:3]
    num_heads = num_all_heads - 2 * num_kv_heads
    if out.shape != (batch_size, num_heads, head_size) or keys.shape != values.shape or keys.shape[3] != head_size:
        raise ValueError(f"found out {tuple(out.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}")
    if not (keys.is_contiguous() and values.is_contiguous() and qkv.is_contiguous() and out.is_contiguous()):
        raise ValueError("found strides, expected contiguous tensors")
    if (keys.itemsize == 1) != (kv_scale is not None):
        raise ValueError(f"keys: found {keys.dtype} and {'a' if kv_scale is not None else 'no'} scale")
    num_parts = batch_size * num_heads * config.num_splits
    part_out = part_sum = out
    if config.num_splits > 1:
        if parts is None or parts.numel() < num_parts * (head_size + 2):
            raise ValueError(f"parts: expected {num_parts * (head_size + 2)} values")
        part_out, part_sum = parts[: num_parts * head_size], parts[num_parts * head_size :]
    per_group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_size))
    options = launch_options(qkv.device)
    # The pasts of several sequences leave the memory no time.
    fetch = fetch_before(next_weight if batch_size == 1 else None, qkv, multiple=num_kv_heads)
    _attention_kernel[(config.num_splits + fetch.num_programs // num_kv_heads, num_kv_heads, batch_size)](
        qkv,
        positions,
        table,
        keys,
        values,
        kv_scale if kv_scale is not None else qkv,
        rotary.cos if rotary else qkv,
        rotary.sin if rotary else qkv,
        out,
        part_out,
        part_sum,
        scale,
        table.shape[1],
        fetch.weight,
        fetch.num_lines,
        H=num_heads,
        G=num_kv_heads,
        D=head_size,
        ROTARY_DIM=rotary.cos.shape[1] * 2 if rotary else 0,
        TOKENS_PER_BLOCK=tokens_per_block,
        ONE_BLOCK=table.shape[1] == 1,
        QUANTIZED=kv_scale is not None,
        NUM_SPLITS=config.num_splits,
        BLOCK_H=1 if per_group == 1 else max(16, triton.next_power_of_2(per_group)),
        SPREAD=_spread(config.block_t, config.num_warps, block_d * keys.itemsize) if per_group == 1 else 1,
        BLOCK_T=config.block_t,
        BLOCK_D=block_d,
        NEXT_SHARE=fetch.share,
        EARLY=early and options["DEPENDENT"],
        num_warps=config.num_warps,
        **options,
    )
    if config.num_splits > 1 and join:
        _join_kernel[(batch_size * num_heads,)](
            part_out,
            part_sum,
            out,
            D=head_size,
            NUM_SPLITS=config.num_splits,
            PADDED_SPLITS=triton.next_power_of_2(config.num_splits),
            BLOCK_D=block_d,
            num_warps=1,
            **launch_options(qkv.device),
        )


def _spread(block_t: int, num_warps: int, token_bytes: int) -> int:
    """How many tokens of `token_bytes` the threads read at once, 16 bytes each."""
    return max(1, min(block_t, num_warps * 512 // token_bytes))


def scratch_size(batch_size: int, num_heads: int, head_size: int, config: AttentionConfig) -> int:
    """float32 values `decode_attention` needs in `parts`."""
    return batch_size * num_heads * config.num_splits * (head_size + 2) if config.num_splits > 1 else 0


def default_config(
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_slots: int,
    device: torch.device,
    *,
    integers: bool = False,
) -> AttentionConfig:
    """As many programs as fill the card, none with less than a block of the past.

    integers: an `integer_gemv` joins the parts, anew for each thread's inputs, so that few parts are faster (gpt2 on an
    H100: 10.8 us a layer with 4 of them, 13.9 with 16).
    """
    processors = num_multiprocessors(device)
    programs, shared = batch_size * num_kv_heads, num_heads > num_kv_heads
    if batch_size > 1 and num_slots <= 1024 and programs >= 2 * processors // 5:
        # Joining costs a launch of its own.
        if shared:
            return AttentionConfig(64, 1, 4)
        return AttentionConfig(128, 1, 4) if programs < 4 * processors else AttentionConfig(64, 1, 2)
    wanted = triton.cdiv(2 * processors, programs)
    block_t, num_warps = (64 if batch_size == 1 else 32, 4) if shared else (64, 2)
    if batch_size == 1 and not shared and num_slots <= 256:
        # The fewer the heads, the smaller the parts; with 16 of them few programs with many warps are faster still.
        if integers or 16 <= wanted < 20:
            block_t, num_warps = 128, 4
        else:
            block_t, num_warps = (16, 1) if wanted >= 20 else (64, 1)
    num_splits = triton.next_power_of_2(max(1, min(wanted, num_slots // block_t, 16)))
    return AttentionConfig(block_t, num_splits, num_warps)


def invariant_config(num_heads: int, num_kv_heads: int) -> AttentionConfig:
    """One division of the past for all batches: a compromise between many short sequences and a long one."""
    return AttentionConfig(32, 4, 4) if num_heads > num_kv_heads else AttentionConfig(64, 4, 2)


def reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    kv_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output [B, H, D] in float64, and copies of keys and values with the new token in."""
    num_kv_heads, tokens_per_block = keys.shape[1:3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    keys, values = keys.clone(), values.clone()
    steps = torch.ones(2, dtype=torch.float64) if kv_scale is None else kv_scale.double().cpu()
    outputs = []
    for row, position in enumerate(positions.tolist()):
        heads = qkv[row].double()
        if rotary is not None:
            heads = rotate_heads(heads, num_heads + num_kv_heads, rotary.cos[position], rotary.sin[position])
        q, new_k, new_v = heads.split([num_heads, num_kv_heads, num_kv_heads])
        block, offset = table[row, position // tokens_per_block], position % tokens_per_block
        for cache, new, step in ((keys, new_k, steps[0]), (values, new_v, steps[1])):
            if kv_scale is not None:
                new = (to_int8 if keys.dtype == torch.int8 else to_fp8)(new, step)
            cache[block, :, offset] = new.to(cache.dtype)
        slots = torch.arange(position + 1, device=qkv.device)
        blocks = table[row, slots // tokens_per_block].long()
        k = keys[blocks, :, slots % tokens_per_block].double().transpose(0, 1) * steps[0]  # [G, T, D]
        v = values[blocks, :, slots % tokens_per_block].double().transpose(0, 1) * steps[1]
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, 0) for t in (k, v))
        weights = torch.softmax(scale * (q[:, None] @ k.transpose(1, 2)), -1)
        outputs.append((weights @ v)[:, 0])
    return torch.stack(outputs), keys, values
