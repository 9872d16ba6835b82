"""Products with packed 4-bit weights: one row, bound by the memory, and 2 to 128 rows on the matrix units.

A byte holds two neighbours of a row, the even column in its low four bits, in two's complement; a scale is the value of
one step, of a whole row or of each group of its columns.  See gpt.quant.

One row has so little time per weight that turning integers into floats would be late.  Eight weights are read as a word
and each is moved to the upper bits of a float's mantissa: bits 0x41800000 + ((n + 8) << 19) are the float 24 + n.  The
24 is taken away again as 24 times the sum of the inputs, once for all rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.choose import best_of
from gpt.kernels.gemv import GemvConfig, add_pairs, load_joined, load_norm
from gpt.kernels.launch import activate, launch_options, num_multiprocessors, wait_for_inputs
from gpt.kernels.product import Gate, Norm
from gpt.kernels.skinny import SkinnyConfig, finish
from gpt.quant import dequantize_weight, unpack_int4


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
    if GATED:
        first_gate = _load_words(gate_ptr, rows, words, in_rows, K)
    wait_for_inputs(DEPENDENT)
    mean = 0.0
    inverse = 1.0
    if NORM != "none":
        whole = tl.arange(0, PADDED_K)
        x = tl.load(x_ptr + whole, mask=whole < K, other=0.0).to(tl.float32)
        total, squares = tl.reduce((x, x * x), 0, add_pairs)
        if NORM == "layernorm":
            mean = total / K
        inverse = tl.rsqrt(squares / K - mean * mean + epsilon)
    sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if SPLITS > 1:
            x = load_joined(x_ptr, part_sum_ptr, start, K, SPLITS, HEAD_SIZE, BLOCK_K)
        else:
            x = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        if NORM != "none":
            stretch, shift = load_norm(norm_weight_ptr, norm_bias_ptr, start + columns, K, NORM)
            x = (x - mean) * inverse * stretch
            if NORM == "layernorm":
                x += shift
        here = start // 8 + words
        weights = first if start == 0 else _load_words(weight_ptr, rows, here, in_rows, K)
        sums = _multiply_add(x, weights, sums, scale_ptr, rows, here, in_rows, K, GROUP, BLOCK_K)
        if GATED:
            gates = first_gate if start == 0 else _load_words(gate_ptr, rows, here, in_rows, K)
            gate_sums = _multiply_add(x, gates, gate_sums, gate_scale_ptr, rows, here, in_rows, K, GROUP, BLOCK_K)
    y = _row_result(sums, scale_ptr, bias_ptr, rows, in_rows, GROUP, HAS_BIAS)
    y = activate(y, ACTIVATION)
    if GATED:
        y *= _row_result(gate_sums, gate_scale_ptr, gate_bias_ptr, rows, in_rows, GROUP, HAS_BIAS)
    if ADD_TO_OUT:
        y += tl.load(out_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
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
def _multiply_add(
    x, words, sums, scale_ptr, rows, places, in_rows, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
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
        inside = in_rows[:, None] & (places < K // 8)[None, :]
        starts = rows.to(tl.int64)[:, None] * (K // GROUP)
        scales = tl.load(scale_ptr + starts + (places // (GROUP // 8))[None, :], mask=inside, other=0.0)
        return sums + products * scales.to(tl.float32)


@triton.jit
def _shifted(words):
    """24 + n of the weight n that bits 19 to 22 hold; flipping its sign bit adds 8."""
    return ((words & 0x00780000) ^ 0x41C00000).to(tl.float32, bitcast=True)


@triton.jit
def _row_result(sums, scale_ptr, bias_ptr, rows, in_rows, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = tl.sum(sums, 1)
    if GROUP == 0:
        y *= tl.load(scale_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
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
        ARGMAX=tiles is not None,
        SPLITS=splits,
        HEAD_SIZE=head_size,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PADDED_K=triton.next_power_of_2(num_columns),
        num_warps=config.num_warps,
        **launch_options(x.device),
    )


@triton.jit
def int4_skinny_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K / 2] uint8
    gate_ptr,  # [N, K / 2] uint8
    scale_ptr,  # [N] or [N, K / GROUP]
    gate_scale_ptr,  # the same
    bias_ptr,  # [N]
    gate_bias_ptr,  # [N]
    M,
    N,
    out_ptr,  # [SPLIT_K, M, N]
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    length: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    begin = part * length
    end = tl.minimum(begin + length, K)
    wait_for_inputs(DEPENDENT)
    if WEIGHTS_FIRST:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        gate_sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = (tokens < M)[:, None] & (start + columns < K)[None, :]
        x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * K + start + columns[None, :], mask=inside, other=0.0)
        sums = _add_tile(x, weight_ptr, scale_ptr, rows, start, N, sums, K, GROUP, WEIGHTS_FIRST, BLOCK_K)
        if GATED:
            gate_sums = _add_tile(
                x, gate_ptr, gate_scale_ptr, rows, start, N, gate_sums, K, GROUP, WEIGHTS_FIRST, BLOCK_K
            )
    if WEIGHTS_FIRST:
        sums = tl.trans(sums)
        gate_sums = tl.trans(gate_sums)
    y = activate(finish(sums, scale_ptr, bias_ptr, rows, N, GROUP == 0, HAS_BIAS), ACTIVATION)
    if GATED:
        y *= finish(gate_sums, gate_scale_ptr, gate_bias_ptr, rows, N, GROUP == 0, HAS_BIAS)
    places = (part * M + tokens).to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


@triton.jit
def _add_tile(
    x,
    weight_ptr,
    scale_ptr,
    rows,
    start,
    N,
    sums,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The matrix units get the steps, which every float type holds; a block lies within a group: its scale follows."""
    pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
    inside = (rows < N)[:, None] & (pairs < K // 2)[None, :]
    packed = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * (K // 2) + pairs[None, :], mask=inside, other=0)
    packed = packed.to(tl.int32)
    weights = tl.join((packed << 28) >> 28, (packed << 24) >> 28).to(x.dtype)
    weights = tl.reshape(weights, (rows.shape[0], BLOCK_K))
    if GROUP == 0:
        if WEIGHTS_FIRST:
            return tl.dot(weights, tl.trans(x), sums, input_precision="ieee")
        else:
            return tl.dot(x, tl.trans(weights), sums, input_precision="ieee")
    else:
        places = rows.to(tl.int64) * (K // GROUP) + start // GROUP
        scales = tl.load(scale_ptr + places, mask=rows < N, other=0.0).to(tl.float32)
        if WEIGHTS_FIRST:
            return sums + tl.dot(weights, tl.trans(x), input_precision="ieee") * scales[:, None]
        else:
            return sums + tl.dot(x, tl.trans(weights), input_precision="ieee") * scales[None, :]


def int4_skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    config: SkinnyConfig,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    gate: Gate | None = None,
) -> None:
    """`gpt.kernels.skinny.skinny` with weight [N, K / 2] uint8 and scale [N] or [N, K / group] of a float type.

    x [M, K] float16, bfloat16 or float32.  Blocks longer than a group are cut to it.  Raises ValueError as `int4_gemv`
    does.
    """
    num_tokens = x.shape[0]
    num_rows, num_columns = len(weight), 2 * weight.shape[1]
    if out.dim() == 3 and (out.shape[0] != config.split_k or not out.is_contiguous()):
        raise ValueError(f"out: found {tuple(out.shape)}, expected {config.split_k} parts, contiguous")
    group = check_int4(x, weight, out[0] if out.dim() == 3 else out, bias, scale, gate)
    block_m = config.rows_of(num_tokens)
    int4_skinny_kernel[(triton.cdiv(num_rows, config.block_n), config.split_k, triton.cdiv(num_tokens, block_m))](
        x,
        weight,
        gate.weight if gate else weight,
        scale,
        gate.scale if gate else scale,
        bias if bias is not None else x,
        gate.bias if gate and gate.bias is not None else x,
        num_tokens,
        num_rows,
        out,
        K=num_columns,
        GROUP=group,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        WEIGHTS_FIRST=config.weights_first,
        SPLIT_K=config.split_k,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=min(config.block_k, group) if group else config.block_k,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )


def check_int4(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    gate: Gate | None = None,
) -> int:
    """The columns that share a scale, 0 for all of them; ValueError names what does not fit."""
    if weight.dtype != torch.uint8 or weight.dim() != 2 or not weight.is_contiguous() or weight.shape[1] % 4:
        raise ValueError(
            f"weight: found {weight.dtype} {tuple(weight.shape)}, expected uint8 [N, K / 2], K a multiple of 8"
        )
    num_rows, num_columns = len(weight), 2 * weight.shape[1]
    groups = scale.shape[1] if scale.dim() == 2 else 0
    group = num_columns // groups if groups else 0
    if groups and (group * groups != num_columns or group < 32 or group & (group - 1)):
        raise ValueError(f"scale: found {groups} groups in {num_columns} columns, expected groups of 32, 64, 128, ...")
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "x": (x, (x.shape[0], num_columns)),
        "out": (out, (x.shape[0], num_rows)),
        "bias": (bias, (num_rows,)),
        "scale": (scale, (num_rows, groups) if groups else (num_rows,)),
    }
    if gate is not None:
        expected["gate"] = (gate.weight, tuple(weight.shape))
        expected["gate scale"] = (gate.scale, tuple(scale.shape))
        if gate.scale is None or (gate.bias is None) != (bias is None):
            raise ValueError("gate: expected a scale, and a bias where the first product has one")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
            raise ValueError(f"{name}: found {tuple(tensor.shape)}, expected {shape}, contiguous")
    return group


def default_gemv_config(num_rows: int, num_columns: int, device: torch.device) -> GemvConfig:
    """Enough programs to fill the card; 128 weights, 64 bytes, per thread."""
    block_k = max(256, min(4096, triton.next_power_of_2(num_columns)))
    block_n = 8
    while block_n > 1 and triton.cdiv(num_rows, block_n) < num_multiprocessors(device):
        block_n //= 2
    return GemvConfig(block_n, block_k, max(1, min(8, block_n * block_k // 4096)))


def widened(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, K] float32, for `gpt.kernels.product.reference`."""
    return dequantize_weight(unpack_int4(weight), scale)
