"""One token's product with int8 or packed 4-bit weights (gpt.kernels.int4): what gpt.kernels.gemv does for floats.

Half or a quarter of the bytes leave no time to turn each weight into a float.  Instead the input becomes integers of 16
bits in two planes of bytes, and an instruction adds four products of bytes (dp4a).  A step of these integers is the
largest input of the columns that one thread multiplies, over 32767: below a float16's rounding of that input, and a
large value costs no accuracy but in its thread's columns.

So few bytes also leave the memory idle while a layer's kernels wait for each other.  A kernel therefore lets the next
one start at once: weights of as many kernels are on their way as the multiprocessors have registers for.

All is thread-local along the row: thread t of T has the words t, T + t, 2T + t, ... of each of the program's rows and
the inputs that belong to them, from the loads to one sum over the threads at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.fixed_point import (
    HAS_INSTRUCTIONS,
    load_inputs,
    load_norm,
    load_values,
    normalize,
    nothing,
    sums_and_squares,
    to_planes,
)
from gpt.kernels.gemv import add_pairs, mean_and_inverse, sum_threads
from gpt.kernels.int4 import check_int4
from gpt.kernels.launch import (
    activate,
    cdiv,
    launch_options,
    load_epilogue,
    next_power_of_2,
    num_multiprocessors,
    start_dependents,
    wait,
)
from gpt.kernels.product import Gate, Norm, check_product

MOST_PIECES = 64  # more of a thread's products might not fit an int32


@dataclass(frozen=True)
class IntegerGemvConfig:
    """block_n: rows of a program.  num_pieces: words of a row, four bytes each, that a thread asks for at once."""

    block_n: int
    num_pieces: int
    num_warps: int


@triton.jit
def _integer_gemv_kernel(
    x_ptr,  # [K], or with SPLITS an attention's parts: [K / HEAD_SIZE, SPLITS, HEAD_SIZE] float32
    part_sum_ptr,  # [2, K / HEAD_SIZE, SPLITS] float32
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    weight_ptr,  # [N, K * BITS / 32] int32
    gate_ptr,  # the same
    scale_ptr,  # [N] or [N, K / GROUP]
    gate_scale_ptr,  # the same
    bias_ptr,  # [N]
    gate_bias_ptr,  # [N]
    out_ptr,  # [N]
    N,
    epsilon,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD_TO_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THREADS: tl.constexpr,
    STRETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    WORDS: tl.constexpr = K * BITS // 32
    # The last program begins early enough to be whole, so that all rows lie at fixed distances from its first one; what
    # belongs to the program before it, it leaves alone.
    own = tl.program_id(0) * BLOCK_N
    first_row = tl.minimum(own, N - BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_N)
    in_rows = rows >= own
    weight_ptr += first_row.to(tl.int64) * WORDS
    gate_ptr += first_row.to(tl.int64) * WORDS
    if GROUP > 0:
        scale_ptr += first_row.to(tl.int64) * (K // GROUP)
        gate_scale_ptr += first_row.to(tl.int64) * (K // GROUP)
    words, scales = _load_weights(weight_ptr, scale_ptr, 0, K, BITS, GROUP, BLOCK_N, THREADS, STRETCH)
    if GATED:
        gates, gate_scales = _load_weights(gate_ptr, gate_scale_ptr, 0, K, BITS, GROUP, BLOCK_N, THREADS, STRETCH)
    bias, row_scale = load_epilogue(bias_ptr, scale_ptr, rows, in_rows, HAS_BIAS, GROUP == 0)
    if GATED:
        gate_bias, gate_row_scale = load_epilogue(gate_bias_ptr, gate_scale_ptr, rows, in_rows, HAS_BIAS, GROUP == 0)
    factors, shifts = load_norm(norm_weight_ptr, norm_bias_ptr, 0, K, BITS, NORM, THREADS, STRETCH)
    wait(DEPENDENT)
    if ADD_TO_OUT:
        before = tl.load(out_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    x = load_inputs(x_ptr, part_sum_ptr, 0, K, BITS, SPLITS, HEAD_SIZE, THREADS, STRETCH)
    mean = 0.0
    inverse = 1.0
    if NORM != "none":
        total, squares = sums_and_squares(x)
        for start in tl.static_range(STRETCH, WORDS, STRETCH):
            more = sums_and_squares(load_values(x_ptr, start, K, BITS, THREADS, STRETCH))
            total, squares = add_pairs(total, squares, more[0], more[1])
        total, squares = tl.reduce((total, squares), 0, add_pairs)
        mean, inverse = mean_and_inverse(total, squares, epsilon, K, NORM)
    sums = tl.zeros((BLOCK_N, THREADS), tl.float32)
    gate_sums = tl.zeros((BLOCK_N, THREADS), tl.float32)
    for start in tl.static_range(STRETCH, WORDS + STRETCH, STRETCH):
        # The next stretch is on its way while this one is multiplied.
        if start < WORDS:
            next_words, next_scales = _load_weights(
                weight_ptr, scale_ptr, start, K, BITS, GROUP, BLOCK_N, THREADS, STRETCH
            )
            if GATED:
                next_gates, next_gate_scales = _load_weights(
                    gate_ptr, gate_scale_ptr, start, K, BITS, GROUP, BLOCK_N, THREADS, STRETCH
                )
            next_x = load_inputs(x_ptr, part_sum_ptr, start, K, BITS, SPLITS, HEAD_SIZE, THREADS, STRETCH)
            next_factors, next_shifts = load_norm(
                norm_weight_ptr, norm_bias_ptr, start, K, BITS, NORM, THREADS, STRETCH
            )
        if NORM != "none":
            x = normalize(x, mean, inverse, factors, shifts, NORM)
        step, high, low = to_planes(x, BITS)
        sums += _multiply(words, scales, high, low, BITS, GROUP) * step[None, :]
        if GATED:
            gate_sums += _multiply(gates, gate_scales, high, low, BITS, GROUP) * step[None, :]
        if start < WORDS:
            words, scales, x, factors, shifts = next_words, next_scales, next_x, next_factors, next_shifts
            if GATED:
                gates, gate_scales = next_gates, next_gate_scales
    y = activate(_row_result(sums, row_scale, bias, GROUP, HAS_BIAS, BLOCK_N, THREADS), ACTIVATION)
    if GATED:
        y *= _row_result(gate_sums, gate_row_scale, gate_bias, GROUP, HAS_BIAS, BLOCK_N, THREADS)
    if ADD_TO_OUT:
        y += before
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def _load_weights(
    ptr,
    scale_ptr,
    start: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THREADS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Of each row the words from `start` on, at most STRETCH: for each THREADS of them an int32 [BLOCK_N, THREADS], and
    with groups the scales of their groups, in their own type."""
    WORDS: tl.constexpr = K * BITS // 32
    STOP: tl.constexpr = min(start + STRETCH, WORDS)
    words, scales = nothing(), nothing()
    for first in tl.static_range(start, STOP, THREADS):
        columns = first + tl.arange(0, THREADS)
        # Triton shall not count on aligned rows: it would give a thread four neighbours of one row, not one of each.
        places = tl.multiple_of(tl.arange(0, BLOCK_N)[:, None] * WORDS + columns[None, :], [1, 1])
        # What lies past the row's end meets a zero.
        loaded = tl.load(ptr + places, mask=(columns < WORDS)[None, :], eviction_policy="evict_first")
        words = words + (loaded,)
        if GROUP > 0:
            # Threads first, or Triton gives neighbouring threads the rows.
            places = (columns // (GROUP // 8))[:, None] + tl.arange(0, BLOCK_N)[None, :] * (K // GROUP)
            loaded_scales = tl.load(scale_ptr + places, mask=(columns < WORDS)[:, None], other=0.0)
            scales = scales + (tl.trans(loaded_scales),)
    return words, scales


@triton.jit
def _add_products(a, b, sums, SIGNED: tl.constexpr):
    """sums + the products of the four bytes of `a`, signed, with those of `b`."""
    if HAS_INSTRUCTIONS:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.s32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(4):
            byte = b << (24 - 8 * i) >> 24
            sums += (a << (24 - 8 * i) >> 24) * (byte if SIGNED else byte & 255)
        return sums


@triton.jit
def _multiply(words, scales, high, low, BITS: tl.constexpr, GROUP: tl.constexpr):
    """[rows, THREADS]: each thread's sum of products, float32, in steps of the input (BITS 4: 16 times as much)."""
    # A product is at most 2^15 * 2^7, and a thread adds 4 or 8 for each word: 64 words stay below 2^31.
    integers = tl.zeros_like(words[0])
    if BITS == 8:
        for i in tl.static_range(len(words)):
            integers = _add_products(words[i], high[i][None, :], integers, True)
        integers *= 256
        for i in tl.static_range(len(words)):
            integers = _add_products(words[i], low[i][None, :], integers, False)
        return integers.to(tl.float32)
    elif GROUP == 0:
        for i in tl.static_range(len(words)):
            integers = _add_nibbles(words[i], high, 2 * i, integers, True)
        integers *= 256
        for i in tl.static_range(len(words)):
            integers = _add_nibbles(words[i], low, 2 * i, integers, False)
        return integers.to(tl.float32)
    else:
        sums = tl.zeros(words[0].shape, tl.float32)
        for i in tl.static_range(len(words)):
            integers = _add_nibbles(words[i], high, 2 * i, tl.zeros_like(words[0]), True)
            integers = _add_nibbles(words[i], low, 2 * i, integers * 256, False)
            sums += integers.to(tl.float32) * scales[i].to(tl.float32)
        return sums


@triton.jit
def _add_nibbles(words, inputs, i: tl.constexpr, sums, SIGNED: tl.constexpr):
    # A byte's upper four bits with zeros below are 16 times the weight with its sign.
    sums = _add_products(words << 4 & -0x0F0F0F10, inputs[i][None, :], sums, SIGNED)
    return _add_products(words & -0x0F0F0F10, inputs[i + 1][None, :], sums, SIGNED)


@triton.jit
def _row_result(
    sums, scale, bias, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr
):
    y = sum_threads(sums, BLOCK_N, THREADS)
    if GROUP == 0:
        y *= scale
    if HAS_BIAS:
        y += bias
    return y


def integer_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    config: IntegerGemvConfig,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    activation: str = "none",
    gate: Gate | None = None,
    add_to_out: bool = False,
    splits: int = 1,
    head_size: int = 0,
) -> None:
    """`gpt.kernels.gemv.gemv` with weight [N, K] int8 and scale [N], or weight [N, K / 2] uint8 (packed) and scale [N]
    or [N, K / group].  The next kernel may start at once: see gpt.kernels.launch.

    The gate's weight and scale have the same shapes.  Raises ValueError for shapes that do not fit, for K that is no
    multiple of 4 (packed: 8), for heads of no multiple of 4, for groups that are no power of two or below 32, and for
    more pieces than MOST_PIECES.
    """
    if config.num_pieces > MOST_PIECES:
        raise ValueError(f"num_pieces: found {config.num_pieces}, expected at most {MOST_PIECES}")
    bits = 4 if weight.dtype == torch.uint8 else 8
    num_rows, num_columns = len(weight), weight.shape[1] * 8 // bits
    inputs, part_sum = x, x
    if splits > 1:
        if head_size % 4:
            raise ValueError(f"head_size: found {head_size}, expected a multiple of 4")
        parts = num_columns * splits
        x, part_sum = x[:parts], x[parts : parts + 2 * num_columns // head_size * splits]
        inputs = x[:num_columns]
    group = _check(inputs.view(1, -1), weight, out.view(1, -1), bias, scale, gate)
    block_n = min(config.block_n, next_power_of_2(num_rows + 1) // 2)
    _integer_gemv_kernel[(cdiv(num_rows, block_n),)](
        x,
        part_sum,
        norm.weight if norm else x,
        norm.bias if norm and norm.bias is not None else x,
        weight.view(torch.int32),
        gate.weight.view(torch.int32) if gate else weight.view(torch.int32),
        scale,
        gate.scale if gate else scale,
        bias if bias is not None else x,
        gate.bias if gate and gate.bias is not None else x,
        out,
        num_rows,
        norm.epsilon if norm else 0.0,
        K=num_columns,
        BITS=bits,
        GROUP=group,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        ADD_TO_OUT=add_to_out,
        SPLITS=splits,
        HEAD_SIZE=head_size,
        BLOCK_N=block_n,
        THREADS=32 * config.num_warps,
        STRETCH=min(config.num_pieces, cdiv(num_columns * bits // 32, 32 * config.num_warps)) * 32 * config.num_warps,
        num_warps=config.num_warps,
        **launch_options(x.device),
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    gate: Gate | None,
) -> int:
    """The columns that share a scale, 0 for all of them; ValueError names what does not fit."""
    if weight.dtype == torch.uint8:
        return check_int4(x, weight, out, bias, scale, gate)
    if weight.dtype != torch.int8 or weight.shape[1] % 4:
        raise ValueError(
            f"weight: found {weight.dtype} {tuple(weight.shape)}, expected int8 [N, K], K a multiple of 4, or uint8"
        )
    check_product(x, weight, out, bias, scale)
    if gate is not None:
        if (gate.bias is None) != (bias is None):
            raise ValueError("gate: expected a bias where the first product has one")
        check_product(x, gate.weight, out, gate.bias, gate.scale)
    return 0


def default_config(
    num_rows: int, num_columns: int, bits: int, device: torch.device, *, gated: bool = False
) -> IntegerGemvConfig:
    """What was fastest on an H100 for the shapes of GPT-2 and SantaCoder (docs/performance.md).  num_rows, num_columns:
    N and K.

    What a thread does for each of its columns costs as much as several rows' products, so that programs have many rows
    where there are many; where there are few, many threads share a row.  A thread's words, with the scales of their
    groups, have at most 128 registers, and there are programs for every multiprocessor.
    """
    wide = num_rows > num_columns
    block_n = (32 if wide else 16 if num_rows == num_columns else 8) // (2 if gated else 1)
    while block_n > 1 and cdiv(num_rows, block_n) < 3 * num_multiprocessors(device) // 4:
        block_n //= 2
    num_warps = 4 if num_columns <= 2048 else 8
    # Not more threads than a row has words.
    num_warps = min(num_warps, next_power_of_2(cdiv(num_columns * bits, 32 * 32)))
    registers = 64 if gated else 128
    return IntegerGemvConfig(block_n, min(bits, max(1, registers * bits // 8 // block_n)), num_warps)
