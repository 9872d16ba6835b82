"""Products of int8 activations with int8 weights, and of FP8 with FP8; rows as `gpt.kernels.quantize_rows` leaves them.

y[m, n] = row_scale[m] * col_scale[n] * sum_k x[m, k] w[n, k], integer sums in int32 and exact; see gpt.quant.  Decode
steps read the weights and little else, prompts keep the matrix units busy; one kernel serves both.  Large tiles come
through tensor descriptors: the card's copy engine fetches whole tiles and fills in zeros behind the edges.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt.kernels.launch import (
    APPROXIMATIONS,
    cdiv,
    launch_options,
    load_vector,
    place_of_tile,
    wait_for_inputs,
)
from gpt.kernels.product import ACTIVATION_FUNCTIONS, expect
from gpt.kernels.quantize_rows import LARGEST
from gpt.kernels.store_cache import CacheSlots
from gpt.kernels.w8a8_config import HopperConfig, W8a8Config
from gpt.kernels.w8a8_epilogue import NextInput, store_tile, tile_values

# Tiles of tokens that share the weights they read.
GROUP_M = 8


@triton.jit
def w8a8_kernel(
    x_ptr,  # [M, K] int8 or float8e4nv, pointer or descriptor
    row_scale_ptr,  # [M] float32
    weight_ptr,  # [N, K] of the same type and kind
    col_scale_ptr,  # [N] float32
    bias_ptr,  # [N]
    next_scale_ptr,  # [] float32
    smoother_ptr,  # [N] float32
    M,
    N,
    out_ptr,  # [SPLIT_K, M, N]; what of it there is, see `store_tile`
    next_row_scale_ptr,  # [M] float32
    places_ptr,  # [M] int32
    blocks_ptr,  # [2, B, G, tokens_per_block, D]
    kv_scales_ptr,  # [2] float32
    part_stride,
    tokens_per_block,
    K: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ADD_TO_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERIES_ALONE: tl.constexpr,
    QUANTIZES_CACHE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    m, n = place_of_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_token = m * BLOCK_M
    first_row = n * BLOCK_N
    dtype: tl.constexpr = tl.int32 if INTEGER else tl.float32
    length: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, K)
    columns = tl.arange(0, BLOCK_K)
    tokens = first_token + tl.arange(0, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_N)
    # Rows behind the last one repeat it: they are computed and not stored, and loads need no mask.
    x_places = tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * K + columns[None, :]
    weight_places = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K + columns[None, :]
    in_tokens = tokens < M
    in_rows = rows < N
    # Asked for here, the vectors have come when the sums are done.
    row_scale = tl.load(row_scale_ptr + tokens, mask=in_tokens, other=0.0)
    col_scale = tl.load(col_scale_ptr + rows, mask=in_rows, other=0.0)
    bias = load_vector(bias_ptr, rows, in_rows, HAS_BIAS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if DESCRIPTORS:
            a = x_ptr.load([first_token, start])
            b = weight_ptr.load([first_row, start])
        elif K % BLOCK_K == 0:
            a = tl.load(x_ptr + x_places + start)
            b = tl.load(weight_ptr + weight_places + start)
        else:
            inside_k = (start + columns < K)[None, :]
            a = tl.load(x_ptr + x_places + start, mask=inside_k, other=0.0)
            b = tl.load(weight_ptr + weight_places + start, mask=inside_k, other=0.0)
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=dtype)
    values = tile_values(
        sums,
        tokens,
        rows,
        first_row,
        row_scale,
        col_scale,
        bias,
        next_scale_ptr,
        smoother_ptr,
        M,
        N,
        out_ptr,
        next_row_scale_ptr,
        ACTIVATION,
        HAS_BIAS,
        QUANTIZES,
        SMOOTHED,
    )
    store_tile(
        values,
        tokens,
        rows,
        first_row,
        tl.program_id(1),
        M,
        N,
        out_ptr,
        places_ptr,
        blocks_ptr,
        kv_scales_ptr,
        part_stride,
        tokens_per_block,
        ADD_TO_OUT,
        GROUPS,
        HEAD_SIZE,
        QUERIES_ALONE,
        QUANTIZES_CACHE,
    )


def w8a8(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    col_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    config: W8a8Config | HopperConfig,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    next_input: NextInput | None = None,
    add_to_out: bool = False,
    cache: CacheSlots | None = None,
) -> None:
    """out = activation(row_scale * col_scale * (x @ weight.T) + bias), int8 products in int32, the rest in float32.

    x [M, K] int8 or float8_e4m3fn, row_scale [M] float32, as `quantize_rows` leaves them.  weight [N, K] of x's type,
    col_scale [N] float32.  out: [M, N] of any float type; [M, N] of x's type with `next_input`; [M, N] float32, which
    the result is added to, with `add_to_out`; or [split_k, M, N] of partial sums, which take neither bias nor
    activation.  cache: takes the last 2 * G * D columns, keys and values, which `out` may do without: [M, N - 2*G*D].

    Raises ValueError for shapes and types that do not fit, and for K at which int32 could overflow.
    """
    num_tokens, num_columns = x.shape
    num_rows = len(weight)
    if x.dtype not in LARGEST:
        raise ValueError(f"x: found {x.dtype}, expected {' or '.join(map(str, LARGEST))}")
    expect("x", x, (num_tokens, num_columns), x.dtype)
    expect("row_scale", row_scale, (num_tokens,), torch.float32)
    expect("weight", weight, (num_rows, num_columns), x.dtype)
    expect("col_scale", col_scale, (num_rows,), torch.float32)
    parts = (config.split_k,) if config.split_k > 1 or out.dim() == 3 else ()
    num_kept = num_rows
    if cache is not None and out.shape[-1] != num_rows:
        num_kept -= cache.num_columns
    dtype = x.dtype if next_input else torch.float32 if add_to_out else out.dtype
    expect("out", out, (*parts, num_tokens, num_kept), dtype)
    if bias is not None:
        expect("bias", bias, (num_rows,), bias.dtype)
    if next_input is not None:
        next_input.check(num_tokens, num_rows)
    if cache is not None:
        cache.check(num_tokens, out.dtype)
    if sum((next_input is not None, add_to_out, cache is not None, config.split_k > 1)) > 1:
        raise ValueError("found several of next_input, add_to_out, cache and partial sums, expected one of them")
    if config.split_k > 1 and (bias is not None or activation != "none"):
        raise ValueError("found a bias or an activation, expected none with partial sums")
    if num_columns >= 1 << 17:
        raise ValueError(f"x: found {num_columns} columns, expected less than {1 << 17}: the sums are 32 bits wide")
    if config.descriptors and num_columns % 16:
        raise ValueError(f"x: found {num_columns} columns, expected a multiple of 16 for tensor descriptors")
    smoother = next_input.smoother if next_input else None
    arguments = {
        "row_scale_ptr": row_scale,
        "col_scale_ptr": col_scale,
        "bias_ptr": bias if bias is not None else col_scale,
        "next_scale_ptr": next_input.scale if next_input else col_scale,
        "smoother_ptr": smoother if smoother is not None else col_scale,
        "M": num_tokens,
        "N": num_rows,
        "out_ptr": out,
        "next_row_scale_ptr": next_input.row_scale if next_input else col_scale,
        "places_ptr": cache.places if cache else col_scale,
        "blocks_ptr": cache.blocks if cache else col_scale,
        "kv_scales_ptr": cache.scales if cache and cache.scales is not None else col_scale,
        "part_stride": cache.blocks.stride(0) if cache else 0,
        "tokens_per_block": cache.blocks.shape[3] if cache else 0,
        "K": num_columns,
        "INTEGER": x.dtype == torch.int8,
        "ACTIVATION": activation if out.dtype == torch.float32 else APPROXIMATIONS.get(activation, activation),
        "HAS_BIAS": bias is not None,
        "QUANTIZES": next_input is not None,
        "SMOOTHED": smoother is not None,
        "ADD_TO_OUT": add_to_out,
        "GROUPS": cache.blocks.shape[2] if cache else 0,
        "HEAD_SIZE": cache.blocks.shape[4] if cache else 0,
        "QUERIES_ALONE": num_kept < num_rows,
        "QUANTIZES_CACHE": cache is not None and cache.scales is not None,
        **launch_options(x.device),
    }
    if isinstance(config, HopperConfig):
        from gpt.kernels.w8a8_hopper import launch_hopper  # what not every version of Triton has

        launch_hopper(x, weight, by_tokens=config.by_tokens, arguments=arguments)
        return
    operands: list[Any] = [x, weight]
    if config.descriptors:
        blocks = ([config.block_m, config.block_k], [config.block_n, config.block_k])
        operands = [TensorDescriptor.from_tensor(*each) for each in zip(operands, blocks, strict=True)]
    num_programs = cdiv(num_tokens, config.block_m) * cdiv(num_rows, config.block_n)
    w8a8_kernel[(num_programs, config.split_k)](
        x_ptr=operands[0],
        weight_ptr=operands[1],
        **arguments,
        SPLIT_K=config.split_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=GROUP_M,
        STAGES=config.num_stages,
        DESCRIPTORS=config.descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def reference(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    col_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """`w8a8` with integer sums in int64 and everything else in float64."""
    wide = torch.int64 if x.dtype == torch.int8 else torch.float64
    sums = (x.cpu().to(wide) @ weight.cpu().to(wide).t()).to(x.device)
    y = sums.double() * row_scale.double()[:, None] * col_scale.double()
    return ACTIVATION_FUNCTIONS[activation](y if bias is None else y + bias.double())
