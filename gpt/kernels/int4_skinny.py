"""Products of several rows with packed 4-bit weights on the matrix units; see gpt.kernels.int4."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.int4 import check_int4
from gpt.kernels.launch import activate, launch_options, load_epilogue, wait_for_inputs
from gpt.kernels.product import Gate
from gpt.kernels.skinny import SkinnyConfig, finish


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
    bias, scale = load_epilogue(bias_ptr, scale_ptr, rows, rows < N, HAS_BIAS, GROUP == 0)
    if GATED:
        gate_bias, gate_scale = load_epilogue(gate_bias_ptr, gate_scale_ptr, rows, rows < N, HAS_BIAS, GROUP == 0)
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
    y = activate(finish(sums, scale, bias, GROUP == 0, HAS_BIAS), ACTIVATION)
    if GATED:
        y *= finish(gate_sums, gate_scale, gate_bias, GROUP == 0, HAS_BIAS)
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

    x [M, K] float16, bfloat16 or float32.  Blocks longer than a group are cut to it.  Raises ValueError as
    `integer_gemv` does.
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
