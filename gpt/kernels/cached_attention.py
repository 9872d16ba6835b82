"""Attention of any number of new tokens per sequence over the cache and themselves, one launch for both phases.

A program takes a tile of queries that share a key/value head: tokens, and with grouped queries each token's heads
beside each other.  It reads the past from the cache, which older steps wrote, and the new tokens from the projection,
so that no program waits for another; the one that has a token's first query stores the token for later steps.  There
is no second launch and no scratch, which is what a compiled plugin may be (gpt.kernels.aot); `decode_attention`, which
divides the past, is the faster one for single tokens.

Tokens of a prompt attend to each other unquantised; later ones to what the quantised cache holds, themselves included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.attention_blocks import Rotary, attend, rotate_heads, rotated, stored
from gpt.quant import to_int8


@dataclass(frozen=True)
class CachedAttentionConfig:
    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


@triton.jit
def cached_attention_kernel(
    qkv_ptr,  # [B, S, H + 2G, D]
    past_ptr,  # [B] int32
    keys_ptr,  # [B, G, T, D]
    values_ptr,  # the same
    kv_scale_ptr,  # [2] float32
    cos_ptr,  # [T, ROTARY_DIM / 2] float32
    sin_ptr,
    S,
    out_ptr,  # [B, S, H, D]
    new_keys_ptr,  # the memory of keys_ptr
    new_values_ptr,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    first_query = tl.program_id(0) * BLOCK_M
    group = tl.program_id(1)
    row = tl.program_id(2)
    SHARED: tl.constexpr = H // G
    WIDTH: tl.constexpr = (H + 2 * G) * D
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < D)[None, :]
    past = tl.load(past_ptr + row)
    k_scale = 1.0
    v_scale = 1.0
    if QUANTIZED:
        k_scale = tl.load(kv_scale_ptr)
        v_scale = tl.load(kv_scale_ptr + 1)
    queries = first_query + tl.arange(0, BLOCK_M)
    tokens = queries // SHARED
    heads = group * SHARED + queries % SHARED
    in_queries = (tokens < S)[:, None] & in_head
    # Queries behind the last one repeat its position: the tables end there.
    positions = past + tl.minimum(tokens, S - 1)
    qkv_row = qkv_ptr + row.to(tl.int64) * S * WIDTH
    q_places = qkv_row + tokens.to(tl.int64)[:, None] * WIDTH + heads[:, None] * D
    q = rotated(q_places, dims[None, :], in_queries, positions[:, None], cos_ptr, sin_ptr, ROTARY_DIM)
    q *= SCALE * 1.4426950408889634  # exponentials are taken to base 2
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    cache = (row.to(tl.int64) * G + group) * T * D
    for start in tl.range(0, past, BLOCK_T, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK_T)
        places = cache + slots.to(tl.int64)[:, None] * D + dims[None, :]
        inside = (slots < past)[:, None] & in_head
        k = tl.load(keys_ptr + places, mask=inside, other=0.0)
        v = tl.load(values_ptr + places, mask=inside, other=0.0)
        seen = (slots < past)[None, :]
        largest, total, out = attend(q, k, v, seen, k_scale, v_scale, largest, total, out, BLOCK_M, qkv_ptr)
    if QUANTIZED:
        k_scale = tl.where(past == 0, 1.0, k_scale)
        v_scale = tl.where(past == 0, 1.0, v_scale)
    end = tl.minimum((first_query + BLOCK_M - 1) // SHARED + 1, S)
    # One at a time: the rotation's tables would take most of what memory a program has.
    for start in tl.range(0, end, BLOCK_T, num_stages=1):
        new = start + tl.arange(0, BLOCK_T)
        inside = (new < S)[:, None] & in_head
        new_positions = past + tl.minimum(new, S - 1)
        k_places = qkv_row + new.to(tl.int64)[:, None] * WIDTH + (H + group) * D
        k = rotated(k_places, dims[None, :], inside, new_positions[:, None], cos_ptr, sin_ptr, ROTARY_DIM)
        v = tl.load(k_places + G * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        own = (new * SHARED >= first_query) & (new * SHARED < first_query + BLOCK_M)
        places = cache + (past + new).to(tl.int64)[:, None] * D + dims[None, :]
        if QUANTIZED:
            k_steps = stored(k, tl.load(kv_scale_ptr), new_keys_ptr, QUANTIZED)
            v_steps = stored(v, tl.load(kv_scale_ptr + 1), new_values_ptr, QUANTIZED)
            tl.store(new_keys_ptr + places, k_steps, mask=inside & own[:, None])
            tl.store(new_values_ptr + places, v_steps, mask=inside & own[:, None])
            k = tl.where(past == 0, k, k_steps.to(tl.float32)).to(dtype)
            v = tl.where(past == 0, v, v_steps.to(tl.float32)).to(dtype)
        else:
            # What later steps will read is what this one uses.
            k = k.to(new_keys_ptr.dtype.element_ty)
            v = v.to(new_values_ptr.dtype.element_ty)
            tl.store(new_keys_ptr + places, k, mask=inside & own[:, None])
            tl.store(new_values_ptr + places, v, mask=inside & own[:, None])
        seen = (new[None, :] <= tokens[:, None]) & (new < S)[None, :]
        largest, total, out = attend(q, k, v, seen, k_scale, v_scale, largest, total, out, BLOCK_M, qkv_ptr)
    out = out / total[:, None]
    target = out_ptr + (row.to(tl.int64) * S + tokens)[:, None] * H * D + heads[:, None] * D + dims[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=in_queries)


def cached_attention(
    qkv: torch.Tensor,
    past: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    config: CachedAttentionConfig,
    rotary: Rotary | None = None,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Stores K and V of the new tokens behind each sequence's past and attends to both, causally.

    qkv [B, S, H + 2G, D].  past [B] int32: tokens each sequence has in the cache; past + S <= T.  keys, values
    [B, G, T, D] in qkv's dtype, or int8 with kv_scale [2]: the value of one step in K and in V.  out [B, S, H, D].

    Raises ValueError for shapes that do not fit.
    """
    batch_size, num_tokens, num_all_heads, head_size = qkv.shape
    num_kv_heads, num_slots = keys.shape[1:3]
    num_heads = num_all_heads - 2 * num_kv_heads
    expected = {
        "out": (out, (batch_size, num_tokens, num_heads, head_size)),
        "keys": (keys, (batch_size, num_kv_heads, num_slots, head_size)),
        "values": (values, tuple(keys.shape)),
        "past": (past, (batch_size,)),
        "qkv": (qkv, tuple(qkv.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: found {tuple(tensor.shape)}, expected {shape}, contiguous")
    if (keys.dtype == torch.int8) != (kv_scale is not None):
        raise ValueError(f"keys: found {keys.dtype} and {'a' if kv_scale is not None else 'no'} scale")
    num_queries = num_tokens * (num_heads // num_kv_heads)
    cached_attention_kernel[(triton.cdiv(num_queries, config.block_m), num_kv_heads, batch_size)](
        qkv,
        past,
        keys,
        values,
        kv_scale if kv_scale is not None else qkv,
        rotary.cos if rotary else qkv,
        rotary.sin if rotary else qkv,
        num_tokens,
        out,
        keys,
        values,
        SCALE=scale,
        H=num_heads,
        G=num_kv_heads,
        D=head_size,
        T=num_slots,
        ROTARY_DIM=rotary.cos.shape[1] * 2 if rotary else 0,
        QUANTIZED=kv_scale is not None,
        BLOCK_M=config.block_m,
        BLOCK_T=config.block_t,
        BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def default_config(head_size: int, itemsize: int, *, prompts: bool) -> CachedAttentionConfig:
    """Tiles whose queries, keys and values fit 48 KiB of shared memory together; head_size at most 256.

    prompts: many tokens per sequence; else one.
    """
    row_bytes = max(16, triton.next_power_of_2(head_size)) * itemsize
    block_m = min(64, 8192 // row_bytes) if prompts else 16
    num_stages = 2 if row_bytes <= 512 else 1
    return CachedAttentionConfig(max(16, block_m), max(16, min(64, 8192 // row_bytes)), 4, num_stages)


def reference(
    qkv: torch.Tensor,
    past: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    kv_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output [B, S, H, D] in float64, and copies of keys and values with the new tokens in."""
    num_tokens, num_kv_heads = qkv.shape[1], keys.shape[1]
    num_heads = qkv.shape[2] - 2 * num_kv_heads
    keys, values = keys.clone(), values.clone()
    outputs = []
    for row, begin in enumerate(past.tolist()):
        end = begin + num_tokens
        heads = qkv[row].double()  # [S, H + 2G, D]
        if rotary is not None:
            rotating = zip(heads, rotary.cos[begin:end].double(), rotary.sin[begin:end].double(), strict=True)
            heads = torch.stack([rotate_heads(token, num_heads + num_kv_heads, *angle) for token, *angle in rotating])
        q, *new = heads.transpose(0, 1).split([num_heads, num_kv_heads, num_kv_heads])  # [heads, S, D]
        attended = []
        for index, (cache, fresh) in enumerate(((keys[row], new[0]), (values[row], new[1]))):
            if kv_scale is None:
                cache[:, begin:end] = fresh.to(cache.dtype)
                attended.append(cache[:, :end].double())
                continue
            step = kv_scale[index].double()
            cache[:, begin:end] = to_int8(fresh, step)
            attended.append(cache[:, :end].double() * step if begin else fresh)
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, 0) for t in attended)
        scores = scale * (q @ k.mT)  # [H, S, past + S]
        slots = torch.arange(end, device=qkv.device)
        hidden = slots[None, :] > slots[begin:, None]
        outputs.append((torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v).transpose(0, 1))
    return torch.stack(outputs), keys, values
