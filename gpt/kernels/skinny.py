"""A few tokens' product with a weight matrix on the matrix units: 2 to 128 rows.

Still a read of the weights, now with enough arithmetic that plain multiply-adds would be late.  Short weight rows are
asked for before the kernel waits for its inputs.  A program owns BLOCK_N weight rows, or with SPLIT_K part of their
length; parts are stored side by side and added in a fixed order by the kernel that reads them (gpt.kernels.norm), which
has to read the residual anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.choose import best_of
from gpt.kernels.launch import (
    activate,
    fetch_lines,
    launch_options,
    load_epilogue,
    num_multiprocessors,
    supports_dependent_launch,
    wait_for_inputs,
)
from gpt.kernels.product import Gate, check_product

MAX_BLOCK_M = 64
# Columns up to which fetching a program's weights into the L2 cache ahead of its inputs gains: with more it delays what
# is needed first (H100).
_AHEAD_COLUMNS = 1024


@dataclass(frozen=True)
class SkinnyConfig:
    """weights_first: the weights are the left operand, which the matrix units want 64 rows of; else the tokens.
    ahead: the weights are asked for before the kernel waits for its inputs, where the device can.
    block_m: tokens of a program, 16 to 64; 0 for what the number of tokens suggests."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 4
    split_k: int = 1
    weights_first: bool = True
    ahead: bool = False
    block_m: int = 0

    def rows_of(self, num_tokens: int) -> int:
        """Tokens that a program works on."""
        return self.block_m or min(MAX_BLOCK_M, max(16, triton.next_power_of_2(num_tokens)))


@triton.jit
def skinny_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    gate_ptr,  # [N, K]
    scale_ptr,  # [N]
    gate_scale_ptr,  # [N]
    bias_ptr,  # [N]
    gate_bias_ptr,  # [N]
    M,
    N,
    num_valid,
    out_ptr,  # [SPLIT_K, M, N]
    tile_max_ptr,  # [M, cdiv(N, BLOCK_N)] float32
    tile_argmax_ptr,  # [M, cdiv(N, BLOCK_N)] int32
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ARGMAX: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    length: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    begin = part * length
    end = tl.minimum(begin + length, K)
    if AHEAD:
        SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
        lines = begin * SIZE + 128 * tl.arange(0, triton.next_power_of_2((length * SIZE + 127) // 128))
        places = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * (K * SIZE) + tl.minimum(lines, end * SIZE - 1)[None, :]
        fetch_lines(weight_ptr, places)
        if GATED:
            fetch_lines(gate_ptr, places)
    bias, scale = load_epilogue(bias_ptr, scale_ptr, rows, rows < N, HAS_BIAS, HAS_SCALE)
    if GATED:
        gate_bias, gate_scale = load_epilogue(gate_bias_ptr, gate_scale_ptr, rows, rows < N, HAS_BIAS, HAS_SCALE)
    wait_for_inputs(DEPENDENT)
    if WEIGHTS_FIRST:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        gate_sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    # The last part may begin behind the end.
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        x = _load_tile(x_ptr, tokens, start + columns, M, K, WHOLE)
        weights = _load_tile(weight_ptr, rows, start + columns, N, K, WHOLE)
        sums = _multiply_add(x, weights, sums, WEIGHTS_FIRST)
        if GATED:
            gates = _load_tile(gate_ptr, rows, start + columns, N, K, WHOLE)
            gate_sums = _multiply_add(x, gates, gate_sums, WEIGHTS_FIRST)
    if WEIGHTS_FIRST:
        sums = tl.trans(sums)
        gate_sums = tl.trans(gate_sums)
    y = activate(finish(sums, scale, bias, HAS_SCALE, HAS_BIAS), ACTIVATION)
    if GATED:
        y *= finish(gate_sums, gate_scale, gate_bias, HAS_SCALE, HAS_BIAS)
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    places = (part * M + tokens).to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=inside)
    if ARGMAX:
        y = tl.where((rows < num_valid)[None, :], y, float("-inf"))
        value, index = best_of(y, 1)
        num_tiles = tl.num_programs(0)
        tl.store(tile_max_ptr + tokens * num_tiles + tile, value, mask=tokens < M)
        tl.store(
            tile_argmax_ptr + tokens * num_tiles + tile,
            tl.minimum(tile * BLOCK_N + index, num_valid - 1),
            mask=tokens < M,
        )


@triton.jit
def _multiply_add(x, weights, sums, WEIGHTS_FIRST: tl.constexpr):
    weights = weights.to(x.dtype)
    if WEIGHTS_FIRST:
        return tl.dot(weights, tl.trans(x), sums, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(weights), sums, input_precision="ieee")


@triton.jit
def _load_tile(ptr, rows, columns, num_rows, K: tl.constexpr, WHOLE: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * K + columns[None, :]
    if WHOLE:
        inside = (rows < num_rows)[:, None]
    else:
        inside = (rows < num_rows)[:, None] & (columns < K)[None, :]
    return tl.load(ptr + places, mask=inside, other=0.0)


@triton.jit
def finish(y, scale, bias, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_SCALE:
        y *= scale[None, :]
    if HAS_BIAS:
        y += bias[None, :]
    return y


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    config: SkinnyConfig,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    activation: str = "none",
    gate: Gate | None = None,
    tiles: tuple[torch.Tensor, torch.Tensor] | None = None,
    num_valid: int | None = None,
) -> None:
    """out = activation(x @ weight.T + bias) [* (x @ gate.T + gate bias)].

    x [M, K] of one float type with weight [N, K], which may also be int8 with `scale` [N]; both contiguous.  out:
    [M, N], or [SPLIT_K, M, N] of partial sums, which then take neither bias nor anything else.  tiles: where the
    largest of each BLOCK_N values of the first `num_valid` goes, and its index: [M, cdiv(N, BLOCK_N)] of each.

    Raises ValueError for shapes that do not fit and tensors that are not contiguous.
    """
    num_tokens = x.shape[0]
    num_rows, num_columns = weight.shape
    if out.dim() == 3 and (out.shape[0] != config.split_k or not out.is_contiguous()):
        raise ValueError(f"out: found {tuple(out.shape)}, expected {config.split_k} parts, contiguous")
    check_product(x, weight, out[0] if out.dim() == 3 else out, bias, scale)
    block_m = config.rows_of(num_tokens)
    tile_max, tile_argmax = tiles or (out, out)
    grid = (triton.cdiv(num_rows, config.block_n), config.split_k, triton.cdiv(num_tokens, block_m))
    skinny_kernel[grid](
        x,
        weight,
        gate.weight if gate else weight,
        scale if scale is not None else x,
        gate.scale if gate and gate.scale is not None else x,
        bias if bias is not None else x,
        gate.bias if gate and gate.bias is not None else x,
        num_tokens,
        num_rows,
        num_rows if num_valid is None else num_valid,
        out,
        tile_max,
        tile_argmax,
        K=num_columns,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        GATED=gate is not None,
        ARGMAX=tiles is not None,
        WEIGHTS_FIRST=config.weights_first,
        AHEAD=config.ahead and supports_dependent_launch(weight.device),
        SPLIT_K=config.split_k,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )


def default_config(
    num_tokens: int, num_rows: int, num_columns: int, device: torch.device, *, splits: bool, itemsize: int = 2
) -> SkinnyConfig:
    """What was fastest on an H100 for the shapes of GPT-2, SantaCoder and StarCoder (docs/performance.md).

    splits: whether the reader can add partial sums.  itemsize: bytes of a weight; only half-precision ones go to the
    matrix units straight from shared memory, as the right operand has to.
    """
    processors = num_multiprocessors(device)
    few = num_tokens <= 32 or itemsize != 2
    if itemsize != 2:
        enough, wide = processors, num_rows >= 45 * processors
    else:
        enough = 3 * processors // 4
        wide = num_rows >= 60 * processors or (splits and num_columns > 1024) if few else num_rows >= 45 * processors
    block_n = 64 if wide else 32
    num_tiles = triton.cdiv(num_rows, block_n)
    split_k = 1
    while splits and num_tiles * split_k < enough and num_columns >= 512 * split_k:
        split_k *= 2
    num_programs = num_tiles * split_k
    return SkinnyConfig(
        block_n,
        64 if itemsize == 4 else 128,
        num_warps=4,
        # More blocks on their way leave the programs no room side by side.
        num_stages=6 if split_k > 1 and num_programs <= processors and not few else 4,
        split_k=split_k,
        weights_first=few,
        ahead=num_columns <= _AHEAD_COLUMNS * split_k and num_programs <= 2 * processors,
    )
