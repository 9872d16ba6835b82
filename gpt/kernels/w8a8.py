"""Products of int8 activations with int8 weights: rows turned into integers, with what comes before, and their product.

y[m, n] = row_scale[m] * col_scale[n] * sum_k x[m, k] w[n, k], the sum in int32 and exact; see gpt.quant.  Decode steps
read the weights and little else, prompts keep the integer matrix units busy; one kernel serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import activate, launch_options, num_multiprocessors, wait_for_inputs
from gpt.kernels.norm import check_rows
from gpt.kernels.product import ACTIVATION_FUNCTIONS, Norm

# Tiles of neighbouring rows that run at the same time share the weights they read.
GROUP_M = 8


@dataclass(frozen=True)
class Int8Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K]
    parts_ptr,  # [PARTS, M, K]
    bias_ptr,  # [K]
    weight_ptr,  # [K] float32
    norm_bias_ptr,  # [K] float32
    smoother_ptr,  # [K] float32
    input_scale_ptr,  # [] float32
    out_ptr,  # [M, K] int8
    row_scale_ptr,  # [M] float32
    M,
    epsilon,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    SMOOTHED: tl.constexpr,
    STATIC: tl.constexpr,
    PADDED_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED_K)
    inside = columns < K
    wait_for_inputs(DEPENDENT)
    x = tl.load(x_ptr + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            x += tl.load(parts_ptr + (part * M + row) * K + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * K + columns, x, mask=inside)
    if NORM == "layernorm":
        centred = tl.where(inside, x - tl.sum(x, 0) / K, 0.0)
        x = centred * tl.rsqrt(tl.sum(centred * centred, 0) / K + epsilon)
        x = x * tl.load(weight_ptr + columns, mask=inside, other=0.0)
        x += tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
    elif NORM == "rmsnorm":
        x = x * tl.rsqrt(tl.sum(x * x, 0) / K + epsilon) * tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if SMOOTHED:
        x = tl.div_rn(x, tl.load(smoother_ptr + columns, mask=inside, other=1.0))
    if STATIC:
        scale = tl.load(input_scale_ptr)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1e-6), 127.0)
    steps = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -128.0), 127.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, half to even.
    tl.store(out_ptr + row * K + columns, ((steps + 12582912.0) - 12582912.0).to(tl.int8), mask=inside)
    # No integer tells of an overflow before; the scale does, and makes the whole row's results NaN.
    num_bad = tl.sum((x - x != 0.0).to(tl.int32), 0)
    tl.store(row_scale_ptr + row, tl.where(num_bad > 0, float("nan"), scale))


def quantize_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    norm: Norm | None = None,
    input_scale: torch.Tensor | None = None,
    smoother: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """x += sum of parts (+ bias); out = integers of norm(x) (/ smoother), row_scale = the value of one, in one pass.

    x [M, K] of any float type; float32 where `parts` [PARTS, M, K] are added to it (`bias` [K] only with them).  out
    [M, K] int8.  row_scale [M] float32: input_scale [] float32 where it is given, else the largest magnitude of the row
    over 127; NaN for rows that hold NaN or infinity.  smoother [K] float32.

    Raises ValueError for shapes and types that do not fit.
    """
    num_rows, width = x.shape
    check_rows(x, norm, parts, bias)
    _expect("out", out, (num_rows, width), torch.int8)
    _expect("row_scale", row_scale, (num_rows,), torch.float32)
    if input_scale is not None:
        _expect("input_scale", input_scale, (), torch.float32)
    if smoother is not None:
        _expect("smoother", smoother, (width,), torch.float32)
    if parts is not None and x.dtype != torch.float32:
        raise ValueError(f"x: found {x.dtype}, expected float32 where parts are added to it")
    padded = triton.next_power_of_2(width)
    quantize_rows_kernel[(num_rows,)](
        x,
        parts if parts is not None else x,
        bias if bias is not None else x,
        norm.weight if norm else x,
        norm.bias if norm and norm.bias is not None else x,
        smoother if smoother is not None else x,
        input_scale if input_scale is not None else x,
        out,
        row_scale,
        num_rows,
        norm.epsilon if norm else 0.0,
        K=width,
        PARTS=0 if parts is None else len(parts),
        HAS_BIAS=bias is not None,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        SMOOTHED=smoother is not None,
        STATIC=input_scale is not None,
        PADDED_K=padded,
        num_warps=max(1, min(16, padded // 512)),
        **launch_options(x.device),
    )


@triton.jit
def int8_gemm_kernel(
    x_ptr,  # [M, K] int8
    row_scale_ptr,  # [M] float32
    weight_ptr,  # [N, K] int8
    col_scale_ptr,  # [N] float32
    bias_ptr,  # [N]
    M,
    N,
    out_ptr,  # [SPLIT_K, M, N]
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // per_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    place = tl.program_id(0) % per_group
    tokens = (first_m + place % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = place // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    length: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    begin = part * length
    end = tl.minimum(begin + length, K)
    # Rows behind the last one repeat it: they are computed and not stored, and loads need no mask.
    x_rows = x_ptr + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * K
    weight_rows = weight_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K
    wait_for_inputs(DEPENDENT)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x = tl.load(x_rows + start + columns[None, :])
            weights = tl.load(weight_rows + start + columns[None, :])
        else:
            inside = (start + columns < K)[None, :]
            x = tl.load(x_rows + start + columns[None, :], mask=inside, other=0)
            weights = tl.load(weight_rows + start + columns[None, :], mask=inside, other=0)
        sums = tl.dot(x, tl.trans(weights), sums, out_dtype=tl.int32)
    in_tokens = tokens < M
    in_rows = rows < N
    y = sums.to(tl.float32) * tl.load(col_scale_ptr + rows, mask=in_rows, other=0.0)[None, :]
    y *= tl.load(row_scale_ptr + tokens, mask=in_tokens, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    places = (part * M + tokens).to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=in_tokens[:, None] & in_rows[None, :])


def int8_gemm(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    col_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    config: Int8Config,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> None:
    """out = activation(row_scale * col_scale * (x @ weight.T) + bias), the product in int32, the rest in float32.

    x [M, K] int8, row_scale [M] float32, as `quantize_rows` leaves them.  weight [N, K] int8, col_scale [N] float32.
    out: [M, N] of any float type, or [split_k, M, N] of partial sums, which take neither bias nor activation.

    Raises ValueError for shapes and types that do not fit, and for K at which int32 could overflow.
    """
    num_tokens, num_columns = x.shape
    num_rows = len(weight)
    _expect("x", x, (num_tokens, num_columns), torch.int8)
    _expect("row_scale", row_scale, (num_tokens,), torch.float32)
    _expect("weight", weight, (num_rows, num_columns), torch.int8)
    _expect("col_scale", col_scale, (num_rows,), torch.float32)
    parts = (config.split_k,) if config.split_k > 1 or out.dim() == 3 else ()
    _expect("out", out, (*parts, num_tokens, num_rows), out.dtype)
    if bias is not None:
        _expect("bias", bias, (num_rows,), bias.dtype)
    if config.split_k > 1 and (bias is not None or activation != "none"):
        raise ValueError("found a bias or an activation, expected none with partial sums")
    if num_columns >= 1 << 17:
        raise ValueError(f"x: found {num_columns} columns, expected less than {1 << 17}: the sums are 32 bits wide")
    grid = (triton.cdiv(num_tokens, config.block_m) * triton.cdiv(num_rows, config.block_n), config.split_k)
    int8_gemm_kernel[grid](
        x,
        row_scale,
        weight,
        col_scale,
        bias if bias is not None else col_scale,
        num_tokens,
        num_rows,
        out,
        K=num_columns,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SPLIT_K=config.split_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=GROUP_M,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: found {found}, expected {dtype} {shape}, contiguous")


def default_config(
    num_tokens: int, num_rows: int, num_columns: int, device: torch.device, *, splits: bool
) -> Int8Config:
    """splits: whether the reader can add partial sums."""
    if num_tokens > 128:
        return Int8Config(128, 256, 128, 8, 3) if num_tokens >= 1024 else Int8Config(128, 128, 128, 8, 4)
    block_m = max(16, min(64, triton.next_power_of_2(num_tokens)))
    programs = triton.cdiv(num_rows, 32) * triton.cdiv(num_tokens, block_m)
    split_k = 1
    while splits and programs * split_k < 2 * num_multiprocessors(device) and num_columns >= 1024 * split_k:
        split_k *= 2
    return Int8Config(block_m, 32, 256, 4, 4, split_k)


def reference(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    col_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """`int8_gemm` with sums in int64 and everything behind them in float64."""
    sums = (x.cpu().long() @ weight.cpu().long().t()).to(x.device)
    y = sums.double() * row_scale.double()[:, None] * col_scale.double()
    return ACTIVATION_FUNCTIONS[activation](y if bias is None else y + bias.double())
