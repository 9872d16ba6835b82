"""A vector as gpt.kernels.integer_gemv multiplies it: read by the threads that hold the weights of its columns,
normalised, and turned into integers of 16 bits.

All is thread-local.  What is called start and STRETCH counts words of a row of weights, 32 / BITS columns each; word w
belongs to thread w % THREADS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpt.kernels.launch import INTERPRETED

# An interpreter knows no instructions.
HAS_INSTRUCTIONS = tl.constexpr(not INTERPRETED)


@triton.jit
def nothing():
    """A tuple for tensors to be added to."""
    return ()


@triton.jit
def load_values(
    ptr, start: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr, STRETCH: tl.constexpr
):
    """What belongs to the columns of `integer_gemv`'s words: for each four a [THREADS, 4] in its type."""
    STOP: tl.constexpr = min(start + STRETCH, K * BITS // 32)
    values = nothing()
    for first in tl.static_range(start, STOP, THREADS):
        for quad in tl.static_range(8 // BITS):
            columns = _quads(first, quad, BITS, THREADS)[:, None] + tl.arange(0, 4)[None, :]
            values = values + (tl.load(ptr + columns, mask=columns < K, other=0.0),)
    return values


@triton.jit
def _quads(first, quad, BITS: tl.constexpr, THREADS: tl.constexpr):
    """The first column of each word from `first` on, with quad 1 the fifth of its eight."""
    return (first + tl.arange(0, THREADS)) * (32 // BITS) + 4 * quad


@triton.jit
def load_inputs(
    x_ptr,
    part_sum_ptr,
    start: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    THREADS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """`load_values` of x; with SPLITS, of an attention's output from its parts and their softmax sums."""
    if SPLITS == 1:
        return load_values(x_ptr, start, K, BITS, THREADS, STRETCH)
    else:
        STOP: tl.constexpr = min(start + STRETCH, K * BITS // 32)
        values = nothing()
        for first in tl.static_range(start, STOP, THREADS):
            for quad in tl.static_range(8 // BITS):
                quads = _quads(first, quad, BITS, THREADS)
                values = values + (_join(x_ptr, part_sum_ptr, quads, K, SPLITS, HEAD_SIZE),)
        return values


@triton.jit
def _join(parts_ptr, part_sum_ptr, quads, K: tl.constexpr, SPLITS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Four columns from each of `quads` on, all of one head."""
    inside = quads < K
    places = quads // HEAD_SIZE * SPLITS
    maxima = nothing()
    for split in tl.static_range(SPLITS):
        maxima = maxima + (tl.load(part_sum_ptr + places + split, mask=inside, other=0.0),)
    largest = maxima[0]
    for split in tl.static_range(1, SPLITS):
        largest = tl.maximum(largest, maxima[split])
    total = tl.zeros_like(largest)
    joined = tl.zeros((quads.shape[0], 4), tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(maxima[split] - largest)
        total += share * tl.load(part_sum_ptr + K // HEAD_SIZE * SPLITS + places + split, mask=inside, other=1.0)
        starts = (places + split) * HEAD_SIZE + quads % HEAD_SIZE
        part = tl.load(parts_ptr + starts[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0.0)
        joined += share[:, None] * part
    return joined * (1.0 / total)[:, None]


@triton.jit
def sums_and_squares(values):
    """Of each thread's values the sum and the sum of their squares."""
    total = values[0].to(tl.float32)
    squares = total * total
    for i in tl.static_range(1, len(values)):
        value = values[i].to(tl.float32)
        total += value
        squares += value * value
    return tl.sum(total, 1), tl.sum(squares, 1)


@triton.jit
def load_norm(
    norm_weight_ptr,
    norm_bias_ptr,
    start: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    THREADS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """`load_values` of the norm's vectors, as far as there are any."""
    factors, shifts = nothing(), nothing()
    if NORM != "none":
        factors = load_values(norm_weight_ptr, start, K, BITS, THREADS, STRETCH)
    if NORM == "layernorm":
        shifts = load_values(norm_bias_ptr, start, K, BITS, THREADS, STRETCH)
    return factors, shifts


@triton.jit
def normalize(values, mean, inverse, factors, shifts, NORM: tl.constexpr):
    normed = nothing()
    for i in tl.static_range(len(values)):
        value = (values[i].to(tl.float32) * inverse - mean * inverse) * factors[i].to(tl.float32)
        if NORM == "layernorm":
            value += shifts[i].to(tl.float32)
        normed = normed + (value,)
    return normed


@triton.jit
def to_planes(values, BITS: tl.constexpr):
    """The value of a step for each thread, [THREADS], and of its inputs the high and the low bytes, a word of four for
    each word of four weights (BITS 4: even columns, odd columns, even ...): value = step * (256 * high + low), high
    with a sign."""
    largest = tl.abs(values[0].to(tl.float32))
    for i in tl.static_range(1, len(values)):
        largest = _larger(largest, tl.abs(values[i].to(tl.float32)))
    a, b, c, d = _split_quads(largest)
    # Zeros are no steps of any size; a number that small is none to divide by.
    largest = _larger(_larger(_larger(a, b), _larger(c, d)), 1e-30)
    inverse = (32767.0 / largest)[:, None]
    high, low = nothing(), nothing()
    for i in tl.static_range(0, len(values), 8 // BITS):
        a, b, c, d = _to_integers(values[i], inverse)
        if BITS == 8:
            upper, lower = _pack(a, b, c, d)
        else:
            e, f, g, h = _to_integers(values[i + 1], inverse)
            upper, lower = _pack(a, c, e, g)
            high, low = high + (upper,), low + (lower,)
            upper, lower = _pack(b, d, f, h)
        high, low = high + (upper,), low + (lower,)
    # Weights of four bits are multiplied by 16 where they are.
    return largest * (1.0 / 32767.0 if BITS == 8 else 1.0 / (16 * 32767.0)), high, low


@triton.jit
def _larger(a, b):
    """Not a number if one of them is not."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_integers(x, inverse):
    """[THREADS, 4] -> the four columns times `inverse`, rounded, in the lower 16 bits of int32."""
    # Adding 1.5 * 2^23 rounds to an integer, which the lower bits of the sum then are, without a conversion.
    return _split_quads((x.to(tl.float32) * inverse + 12582912.0).to(tl.int32, bitcast=True))


@triton.jit
def _split_quads(x):
    """[THREADS, 4] -> its columns"""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _pack(a, b, c, d):
    """The second bytes of four integers as a word, and the first ones."""
    if HAS_INSTRUCTIONS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 ab, cd;
            prmt.b32 ab, $2, $3, 0x5410;
            prmt.b32 cd, $4, $5, 0x5410;
            prmt.b32 $0, ab, cd, 0x7531;
            prmt.b32 $1, ab, cd, 0x6420;
            }""",
            "=&r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        high = (a >> 8 & 255) | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | (d >> 8 & 255) << 24
        return high, (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
