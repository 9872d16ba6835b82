"""What kernels of attention consist of: rotated heads, values as a cache keeps them, a softmax that grows by blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import to_steps


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position's angles, [T, rotary_dim / 2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


@triton.jit
def rotated(ptr, dims, inside, position, cos_ptr, sin_ptr, ROTARY_DIM: tl.constexpr):
    """Heads at `ptr` as float32 of the shape of `ptr + dims`, the first ROTARY_DIM dims rotated by `position`, which is
    one for all of them or one for each row."""
    x = tl.load(ptr + dims, mask=inside, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        rotates = dims < ROTARY_DIM
        partner = tl.where(dims < half, dims + half, dims - half)
        other = tl.load(ptr + partner, mask=inside & rotates, other=0.0).to(tl.float32)
        angles = position.to(tl.int64) * half + dims % half
        cos = tl.load(cos_ptr + angles, mask=rotates, other=1.0)
        sin = tl.load(sin_ptr + angles, mask=rotates, other=0.0)
        x = x * cos + tl.where(dims < half, -other, other) * sin
    return x


@triton.jit
def stored(x, scale, ptr, QUANTIZED: tl.constexpr):
    """float32 values as the cache at `ptr` keeps them, scale: the value of one step."""
    if QUANTIZED:
        return to_steps(x * tl.div_rn(1.0, scale), ptr)
    else:
        return x.to(ptr.dtype.element_ty)


@triton.jit
def _relative(scores, largest):
    """Exponentials of scores, by the largest of them.  A part without any token stays at -inf, and -inf - -inf is not a
    number."""
    return tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest))


@triton.jit
def attend(q, k, v, inside, k_scale, v_scale, largest, total, out, BLOCK_H: tl.constexpr, dtype_ptr):
    """A block of keys joins the running softmaxes: q [BLOCK_H, D] float32, k and v [BLOCK_T, D], `inside` what each
    query sees, [BLOCK_H or 1, BLOCK_T].

    BLOCK_H 1: one query, R times, each with a softmax of its own over every R-th token until `join_spread`: q [R, D],
    inside [BLOCK_T / R, R].  Where the threads read R tokens at once, no warp waits for another.
    """
    AXIS: tl.constexpr = 0 if BLOCK_H == 1 else 1  # along which a softmax has its tokens
    if BLOCK_H == 1:
        spread: tl.constexpr = (k.shape[0] // q.shape[0], q.shape[0], q.shape[1])
        scores = tl.sum(k.reshape(spread).to(tl.float32) * q[None, :, :], 2) * k_scale  # [BLOCK_T / R, R]
    else:
        dtype: tl.constexpr = dtype_ptr.dtype.element_ty
        scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee") * k_scale  # [BLOCK_H, BLOCK_T]
    scores = tl.where(inside, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, AXIS))
    weights = _relative(scores, tl.expand_dims(new_largest, AXIS))
    shrink = _relative(largest, new_largest)
    total = total * shrink + tl.sum(weights, AXIS)
    if BLOCK_H == 1:
        mixed = tl.sum(weights[:, :, None] * v.reshape(spread).to(tl.float32), 0)
    else:
        value_dtype: tl.constexpr = dtype_ptr.dtype.element_ty
        mixed = tl.dot(weights.to(value_dtype), v.to(value_dtype), input_precision="ieee")
    out = out * shrink[:, None] + mixed * v_scale
    return new_largest, total, out


@triton.jit
def join_spread(largest, total, out):
    """One softmax of several over different tokens: largest [R], total [R], out [R, D] -> the same with R = 1."""
    all_largest, all_total = tl.reduce((largest, total), 0, _join_sums, keep_dims=True)
    weights = _relative(largest, all_largest)
    return all_largest, all_total, tl.sum(out * weights[:, None], 0, keep_dims=True)


@triton.jit
def _join_sums(largest, total, other_largest, other_total):
    joined = tl.maximum(largest, other_largest)
    return joined, total * _relative(largest, joined) + other_total * _relative(other_largest, joined)


def rotate_heads(heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first `num_rotated` of heads [heads, D], by one position's cos and sin [rotary_dim / 2]."""
    size = 2 * cos.shape[0]
    first, second, rest = heads.split([size // 2, size // 2, heads.shape[1] - size], dim=1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=1)
    return torch.cat([rotated[:num_rotated], heads[num_rotated:]])
