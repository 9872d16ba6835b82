"""Matrix-vector products with packed 4-bit weights, bound by the memory; see gpt.kernels.int4.

One row has so little time per weight that turning integers into floats would be late.  Eight weights are read as a word
and each is moved to the upper bits of a float's mantissa: bits 0x41800000 + ((n + 8) << 19) are the float 24 + n.  The
24 is taken away again as 24 times the sum of the inputs, once for all rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.choose import best_of
from gpt.kernels.gemv import GemvConfig, load_joined, load_norm, moments
from gpt.kernels.int4 import check_int4
from gpt.kernels.launch import activate, launch_options, load_epilogue, num_multiprocessors, wait_for_inputs
from gpt.kernels.product import Gate, Norm


@triton.jit
def _int4_gemv_kernel(
    x_ptr,  # [K], or with SPLITS an attention's parts: [K / HEAD_SIZE, SPLITS, HEAD_SIZE] float32
    part_sum_ptr,  # [2, K / HEAD_SIZE, SPLITS] float32
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    weight_ptr,  # [N, K / 8] int32
    gate_ptr,  # [N, K / 8] int32
    scale_ptr,  # [N] or [N, K / GROUP]
    gate_scale_ptr,  # the same
    bias_ptr,  # [N]
    gate_bias_ptr,  # [N]
    out_ptr,  # [N]
    tile_max_ptr,  # [cdiv(N, BLOCK_N)] float32
    tile_argmax_ptr,  # [cdiv(N, BLOCK_N)] int32
    N,
    num_valid,
    epsilon,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD_TO_OUT: tl.constexpr,
    SETTLED: tl.constexpr,
    ARGMAX: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    columns = tl.arange(0, BLOCK_K)
    words = tl.arange(0, BLOCK_K // 8)
    first = _load_words(weight_ptr, rows, words, in_rows, K)
    first_scales = _load_scales(scale_ptr, rows, words, in_rows, K, GROUP)
    if GATED:
        first_gate = _load_words(gate_ptr, rows, words, in_rows, K)
        first_gate_scales = _load_scales(gate_scale_ptr, rows, words, in_rows, K, GROUP)
    bias, row_scale = load_epilogue(bias_ptr, scale_ptr, rows, in_rows, HAS_BIAS, GROUP == 0)
    if GATED:
        gate_bias, gate_row_scale = load_epilogue(gate_bias_ptr, gate_scale_ptr, rows, in_rows, HAS_BIAS, GROUP == 0)
    if ADD_TO_OUT and SETTLED:
        before = tl.load(out_ptr + rows, mask=in_rows, other=0.0, cache_modifier=".cg").to(tl.float32)
    wait_for_inputs(DEPENDENT)
    if ADD_TO_OUT and not SETTLED:
        before = tl.load(out_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    mean = 0.0
    inverse = 1.0
    if NORM != "none":
        whole = tl.arange(0, PADDED_K)
        mean, inverse = moments(tl.load(x_ptr + whole, mask=whole < K, other=0.0).to(tl.float32), epsilon, K, NORM)
    sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if SPLITS > 1:
            x = load_joined(x_ptr, part_sum_ptr, start, K, SPLITS, HEAD_SIZE, BLOCK_K)
        else:
            x = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        here = start // 8 + words
        if start == 0:
            weights, scales = first, first_scales
        else:
            weights = _load_words(weight_ptr, rows, here, in_rows, K)
            scales = _load_scales(scale_ptr, rows, here, in_rows, K, GROUP)
        if NORM != "none":
            # Asked for earlier, the norm's vectors would take registers in which more programs hold weights.
            stretch, shift = load_norm(norm_weight_ptr, norm_bias_ptr, start + columns, K, NORM)
            x = (x - mean) * inverse * stretch
            if NORM == "layernorm":
                x += shift
        sums = _multiply_add(x, weights, sums, scales, GROUP, BLOCK_K)
        if GATED:
            if start == 0:
                gates, gate_scales = first_gate, first_gate_scales
            else:
                gates = _load_words(gate_ptr, rows, here, in_rows, K)
                gate_scales = _load_scales(gate_scale_ptr, rows, here, in_rows, K, GROUP)
            gate_sums = _multiply_add(x, gates, gate_sums, gate_scales, GROUP, BLOCK_K)
    y = _row_result(sums, row_scale, bias, GROUP, HAS_BIAS)
    y = activate(y, ACTIVATION)
    if GATED:
        y *= _row_result(gate_sums, gate_row_scale, gate_bias, GROUP, HAS_BIAS)
    if ADD_TO_OUT:
        y += before
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=in_rows)
    if ARGMAX:
        y = tl.where(rows < num_valid, y, float("-inf"))
        value, index = best_of(y, 0)
        tl.store(tile_max_ptr + tl.program_id(0), value)
        tl.store(tile_argmax_ptr + tl.program_id(0), tl.minimum(tl.program_id(0) * BLOCK_N + index, num_valid - 1))


@triton.jit
def _load_words(ptr, rows, words, in_rows, K: tl.constexpr):
    inside = in_rows[:, None] & (words < K // 8)[None, :]
    places = rows.to(tl.int64)[:, None] * (K // 8) + words[None, :]
    return tl.load(ptr + places, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _load_scales(ptr, rows, words, in_rows, K: tl.constexpr, GROUP: tl.constexpr):
    """The scale of each word's group, [BLOCK_N, BLOCK_K / 8] in its own type; a zero where rows have one scale."""
    if GROUP == 0:
        return 0.0
    else:
        inside = in_rows[:, None] & (words < K // 8)[None, :]
        starts = rows.to(tl.int64)[:, None] * (K // GROUP)
        return tl.load(ptr + starts + (words // (GROUP // 8))[None, :], mask=inside, other=0.0)


@triton.jit
def _multiply_add(x, words, sums, scales, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums [BLOCK_N, BLOCK_K / 8] and the products of x [BLOCK_K] with eight weights in each word."""
    # Column 8w + 4a + 2b + c stands at [w, a, b, c]; a split takes the last axis apart.
    even, odd = tl.split(tl.reshape(x, (BLOCK_K // 8, 2, 2, 2)))
    x_0_4, x_2_6 = tl.split(even)
    x_1_5, x_3_7 = tl.split(odd)
    x0, x4 = tl.split(x_0_4)
    x1, x5 = tl.split(x_1_5)
    x2, x6 = tl.split(x_2_6)
    x3, x7 = tl.split(x_3_7)
    total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    products = sums if GROUP == 0 else tl.zeros_like(sums)
    products += (-24.0 * total)[None, :]
    products += _shifted(words << 19) * x0[None, :]
    products += _shifted(words << 15) * x1[None, :]
    products += _shifted(words << 11) * x2[None, :]
    products += _shifted(words << 7) * x3[None, :]
    products += _shifted(words << 3) * x4[None, :]
    products += _shifted(words >> 1) * x5[None, :]
    products += _shifted(words >> 5) * x6[None, :]
    products += _shifted(words >> 9) * x7[None, :]
    if GROUP == 0:
        return products
    else:
        return sums + products * scales.to(tl.float32)


@triton.jit
def _shifted(words):
    """24 + n of the weight n that bits 19 to 22 hold; flipping its sign bit adds 8."""
    return ((words & 0x00780000) ^ 0x41C00000).to(tl.float32, bitcast=True)


@triton.jit
def _row_result(sums, scale, bias, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = tl.sum(sums, 1)
    if GROUP == 0:
        y *= scale
    if HAS_BIAS:
        y += bias
    return y


def int4_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    config: GemvConfig,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    activation: str = "none",
    gate: Gate | None = None,
    add_to_out: bool = False,
    settled: bool = False,
    tiles: tuple[torch.Tensor, torch.Tensor] | None = None,
    num_valid: int | None = None,
    splits: int = 1,
    head_size: int = 0,
) -> None:
    """`gpt.kernels.gemv.gemv` with weight [N, K / 2] uint8 and scale [N] or [N, K / group] of a float type.

    The gate's weight and scale have the same shapes.  config.block_k counts columns.  Raises ValueError for shapes that
    do not fit, K that is no multiple of 8 and groups that are no power of two or below 32.
    """
    num_rows, num_columns = len(weight), 2 * weight.shape[1]
    part_sum = x
    if splits > 1:
        parts = num_columns * splits
        x, part_sum = x[:parts], x[parts : parts + 2 * num_columns // head_size * splits]
        group = check_int4(x[:num_columns].view(1, -1), weight, out.view(1, -1), bias, scale, gate)
    else:
        group = check_int4(x.view(1, -1), weight, out.view(1, -1), bias, scale, gate)
    tile_max, tile_argmax = tiles or (out, out)
    _int4_gemv_kernel[(triton.cdiv(num_rows, config.block_n),)](
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
        tile_max,
        tile_argmax,
        num_rows,
        num_rows if num_valid is None else num_valid,
        norm.epsilon if norm else 0.0,
        K=num_columns,
        GROUP=group,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        ADD_TO_OUT=add_to_out,
        SETTLED=settled,
        ARGMAX=tiles is not None,
        SPLITS=splits,
        HEAD_SIZE=head_size,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PADDED_K=triton.next_power_of_2(num_columns),
        num_warps=config.num_warps,
        **launch_options(x.device),
    )


def default_config(num_rows: int, num_columns: int, device: torch.device) -> GemvConfig:
    """Enough programs to fill the card; 128 weights, 64 bytes, per thread."""
    block_k = max(256, min(4096, triton.next_power_of_2(num_columns)))
    block_n = 8
    while block_n > 1 and triton.cdiv(num_rows, block_n) < num_multiprocessors(device):
        block_n //= 2
    return GemvConfig(block_n, block_k, max(1, min(8, block_n * block_k // 4096)))
