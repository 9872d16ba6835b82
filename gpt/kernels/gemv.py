"""One token's product with a weight matrix, with normalisation before and bias, activation, gate and residual after.

At batch 1 a product is a read of its weights: N * K values that nothing else needs.  Each program multiplies BLOCK_N
whole rows, so that sums stay inside it and their order never depends on the launch; its first weights are on their way
before the kernel waits for the vector, and so is all else that is known by then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from gpt.kernels.choose import best_of
from gpt.kernels.launch import (
    activate,
    launch_options,
    load_epilogue,
    load_vector,
    num_multiprocessors,
    wait_for_inputs,
)
from gpt.kernels.product import Gate, Norm, check_product

MOST_IN_PARTS = 1 << 16  # values


@dataclass(frozen=True)
class GemvConfig:
    block_n: int
    block_k: int
    num_warps: int


@triton.jit
def _gemv_kernel(
    x_ptr,  # [K], or with SPLITS an attention's parts: [K / HEAD_SIZE, SPLITS, HEAD_SIZE] float32
    part_sum_ptr,  # [2, K / HEAD_SIZE, SPLITS] float32
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    weight_ptr,  # [N, K]
    gate_ptr,  # [N, K]
    scale_ptr,  # [N]
    gate_scale_ptr,  # [N]
    bias_ptr,  # [N]
    gate_bias_ptr,  # [N]
    out_ptr,  # [N]
    tile_max_ptr,  # [cdiv(N, BLOCK_N)] float32
    tile_argmax_ptr,  # [cdiv(N, BLOCK_N)] int32
    N,
    num_valid,
    epsilon,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ADD_TO_OUT: tl.constexpr,
    SETTLED: tl.constexpr,
    ARGMAX: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    THREADS: tl.constexpr,
    CROWDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    in_rows = rows < N
    first = _load_weights(weight_ptr, rows, columns, in_rows, K)
    if GATED:
        first_gate = _load_weights(gate_ptr, rows, columns, in_rows, K)
    bias, scale = load_epilogue(bias_ptr, scale_ptr, rows, in_rows, HAS_BIAS, HAS_SCALE)
    if GATED:
        gate_bias, gate_scale = load_epilogue(gate_bias_ptr, gate_scale_ptr, rows, in_rows, HAS_BIAS, HAS_SCALE)
    if ADD_TO_OUT and SETTLED and not CROWDED:
        # Around the first-level cache, which may hold what was there before.
        before = tl.load(out_ptr + rows, mask=in_rows, other=0.0, cache_modifier=".cg").to(tl.float32)
    stretch, shift = load_norm(norm_weight_ptr, norm_bias_ptr, columns, K, NORM)
    wait_for_inputs(DEPENDENT)
    if ADD_TO_OUT and (CROWDED or not SETTLED):
        before = tl.load(out_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    mean = 0.0
    inverse = 1.0
    if NORM != "none":
        whole = tl.arange(0, PADDED_K)
        mean, inverse = moments(tl.load(x_ptr + whole, mask=whole < K, other=0.0).to(tl.float32), epsilon, K, NORM)
    # What a thread loads at once it adds at once: a sum per weight would take half of its registers.
    LOADED: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = LOADED if LOADED < BLOCK_K else BLOCK_K
    # All of a row is written out, tile by tile; of a long one, whose tiles would not fit the registers, a stretch.
    STRETCH: tl.constexpr = K if K <= 6 * BLOCK_K else 4 * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for begin in tl.range(0, K, STRETCH):
        for piece in tl.static_range(0, STRETCH, BLOCK_K):
            start = begin + piece
            if SPLITS > 1:
                x = load_joined(x_ptr, part_sum_ptr, start, K, SPLITS, HEAD_SIZE, BLOCK_K)
            else:
                x = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            if piece == 0 and STRETCH >= K:
                weights = first
            else:
                weights = _load_weights(weight_ptr, rows, start + columns, in_rows, K)
                stretch, shift = load_norm(norm_weight_ptr, norm_bias_ptr, start + columns, K, NORM)
            if NORM != "none":
                x = (x - mean) * inverse * stretch
            if NORM == "layernorm":
                x += shift
            sums += _sum_vectors(weights.to(tl.float32) * x[None, :], VECTOR)
            if GATED:
                if piece == 0 and STRETCH >= K:
                    gates = first_gate
                else:
                    gates = _load_weights(gate_ptr, rows, start + columns, in_rows, K)
                gate_sums += _sum_vectors(gates.to(tl.float32) * x[None, :], VECTOR)
    y = _sum_rows(sums, BLOCK_N, BLOCK_K // VECTOR, THREADS, CROWDED)
    if HAS_SCALE:
        y *= scale
    if HAS_BIAS:
        y += bias
    y = activate(y, ACTIVATION)
    if GATED:
        gate = _sum_rows(gate_sums, BLOCK_N, BLOCK_K // VECTOR, THREADS, CROWDED)
        if HAS_SCALE:
            gate *= gate_scale
        if HAS_BIAS:
            gate += gate_bias
        y *= gate
    if ADD_TO_OUT:
        y += before
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=in_rows)
    if ARGMAX:
        y = tl.where(rows < num_valid, y, float("-inf"))
        value, index = best_of(y, 0)
        tl.store(tile_max_ptr + tl.program_id(0), value)
        tl.store(tile_argmax_ptr + tl.program_id(0), tl.minimum(tl.program_id(0) * BLOCK_N + index, num_valid - 1))


@triton.jit
def _sum_vectors(x, VECTOR: tl.constexpr):
    """[N, K] -> [N, K / VECTOR]"""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // VECTOR, VECTOR)), 2)


@triton.jit
def _sum_rows(sums, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr, CROWDED: tl.constexpr):
    """[BLOCK_N, WIDTH] -> [BLOCK_N]"""
    # With fewer columns than threads, some of them have some of the rows; of more rows a lane would have several.
    if CROWDED or WIDTH < THREADS or BLOCK_N > 32:
        return tl.sum(sums, 1)
    else:
        return sum_threads(tl.sum(tl.reshape(sums, (BLOCK_N, WIDTH // THREADS, THREADS)), 1), BLOCK_N, THREADS)


@triton.jit
def sum_threads(sums, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """[BLOCK_N, THREADS] -> [BLOCK_N], for sums of which each thread has one of every row.

    Neighbours exchange halves of their rows, then of what is left: BLOCK_N - 1 shuffles where a sum for each row would
    take 5 * BLOCK_N, and at the end a row's lane alone has its sum to work on.
    """
    lanes = tl.arange(0, 32)[None, None, :]
    sums = tl.reshape(sums, (BLOCK_N, THREADS // 32, 32))
    for level in tl.static_range(5):
        if BLOCK_N >> level > 1:
            pairs = tl.reshape(sums, (BLOCK_N >> level + 1, 2, THREADS // 32, 32))
            even, odd = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            upper = (lanes >> level & 1) == 1
            others = tl.broadcast_to(lanes ^ 1 << level, even.shape)
            sums = tl.where(upper, odd, even) + tl.gather(tl.where(upper, even, odd), others, 2)
    # Row r is now with the threads t of t % BLOCK_N = r.
    return tl.sum(tl.reshape(sums, (THREADS // BLOCK_N, BLOCK_N)), 0)


@triton.jit
def add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def moments(x, epsilon, K: tl.constexpr, NORM: tl.constexpr):
    """Mean and inverse deviation of K values, the rest of `x` zeros, in one reduction over the program."""
    total, squares = tl.reduce((x, x * x), 0, add_pairs)
    return mean_and_inverse(total, squares, epsilon, K, NORM)


@triton.jit
def mean_and_inverse(total, squares, epsilon, K: tl.constexpr, NORM: tl.constexpr):
    """`moments` from the sums of K values and of their squares."""
    mean = 0.0
    if NORM == "layernorm":
        mean = total / K
    return mean, tl.rsqrt(squares / K - mean * mean + epsilon)


@triton.jit
def load_norm(norm_weight_ptr, norm_bias_ptr, columns, K: tl.constexpr, NORM: tl.constexpr):
    stretch = load_vector(norm_weight_ptr, columns, columns < K, NORM != "none")
    shift = load_vector(norm_bias_ptr, columns, columns < K, NORM == "layernorm")
    return stretch, shift


@triton.jit
def load_joined(
    parts_ptr,
    part_sum_ptr,
    start,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K values of an attention's output from its parts and their softmax sums."""
    num_heads: tl.constexpr = K // HEAD_SIZE
    heads = start // HEAD_SIZE + tl.arange(0, BLOCK_K // HEAD_SIZE)
    splits = tl.arange(0, SPLITS)
    inside = (heads < num_heads)[:, None]
    places = heads[:, None] * SPLITS + splits[None, :]
    largest = tl.load(part_sum_ptr + places, mask=inside, other=0.0)
    totals = tl.load(part_sum_ptr + num_heads * SPLITS + places, mask=inside, other=1.0)
    weights = tl.exp2(largest - tl.max(largest, 1)[:, None])
    weights = weights / tl.sum(totals * weights, 1)[:, None]
    values = places[:, :, None] * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, None, :]
    parts = tl.load(parts_ptr + values, mask=inside[:, :, None], other=0.0)
    return tl.reshape(tl.sum(parts * weights[:, :, None], 1), (BLOCK_K,))


@triton.jit
def _load_weights(weight_ptr, rows, columns, in_rows, K: tl.constexpr):
    inside = in_rows[:, None] & (columns < K)[None, :]
    starts = rows.to(tl.int64)[:, None] * K
    return tl.load(weight_ptr + starts + columns[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    config: GemvConfig,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
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
    """out = [out +] activation(norm(x) @ weight.T + bias) [* (norm(x) @ gate.T + gate bias)].

    x: K values, float32 or the weight's dtype.  weight [N, K], contiguous: a float type, or int8 with `scale` [N].
    bias [N].  out: N values of any float type.  tiles: where the largest of each BLOCK_N values of the first
    `num_valid` goes, and its index: float32 and int32, cdiv(N, BLOCK_N) of each.  splits: x holds the parts of an
    attention over heads of `head_size` (a power of two), as `decode_attention` leaves them; the block of K must be a
    multiple of the head.  settled: what is in `out` was there before the launch before this one began, so that it may
    be read while that one still runs.

    Raises ValueError for shapes that do not fit and weights that are not contiguous.
    """
    num_rows, num_columns = weight.shape
    part_sum = x
    if splits > 1:
        parts = num_columns * splits
        x, part_sum = x[:parts], x[parts : parts + 2 * num_columns // head_size * splits]
        check_product(x[:num_columns].view(1, -1), weight, out.view(1, -1), bias, scale)
    else:
        check_product(x.view(1, -1), weight, out.view(1, -1), bias, scale)
    tile_max, tile_argmax = tiles or (out, out)
    # Threads that hold 128 weights of a longer row have no register left: with one more value, or to exchange sums,
    # SantaCoder's FC2 takes more than 128 of them (float16, Triton 3.6, compute capability 9.0), and half as many
    # programs would fit.
    crowded = num_columns > config.block_k and config.block_n * config.block_k >= 128 * 32 * config.num_warps
    grid = (triton.cdiv(num_rows, config.block_n),)
    _gemv_kernel[grid](
        x,
        part_sum,
        norm.weight if norm else x,
        norm.bias if norm and norm.bias is not None else x,
        weight,
        gate.weight if gate else weight,
        scale if scale is not None else x,
        gate.scale if gate and gate.scale is not None else x,
        bias if bias is not None else x,
        gate.bias if gate and gate.bias is not None else x,
        out,
        tile_max,
        tile_argmax,
        num_rows,
        num_rows if num_valid is None else num_valid,
        norm.epsilon if norm else 0.0,
        K=num_columns,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        GATED=gate is not None,
        ADD_TO_OUT=add_to_out,
        SETTLED=settled,
        ARGMAX=tiles is not None,
        SPLITS=splits,
        HEAD_SIZE=head_size,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PADDED_K=triton.next_power_of_2(num_columns),
        THREADS=32 * config.num_warps,
        CROWDED=crowded,
        num_warps=config.num_warps,
        **launch_options(x.device),
    )


def default_config(num_rows: int, num_columns: int, device: torch.device, itemsize: int = 2) -> GemvConfig:
    """What was fastest on an H100 for the shapes of GPT-2, SantaCoder and StarCoder (docs/performance.md).  num_rows,
    num_columns: N and K.  itemsize: bytes of a weight.

    Blocks of several rows, since each program reads the vector and the norm's anew: at most 128 values per thread are
    in flight, and there are programs for most multiprocessors.
    """
    processors = num_multiprocessors(device)
    many = num_rows >= 20 * processors
    if num_columns <= 1024:
        wide = num_rows > num_columns
        block_n, block_k = (16 if many else 8) if wide else 4, 1024
        per_thread = 128 if many or (num_columns <= 768 and not wide) else 64
    elif num_rows > num_columns:
        block_n, block_k = 8, 1024 if num_columns <= 2048 and many else 2048
        per_thread = 64 if num_columns <= 2048 and many else 128
    elif num_rows == num_columns:
        block_n, block_k, per_thread = (4, 2048, 128) if num_columns <= 2048 else (16, 1024, 64)
    elif num_columns <= 4096 or num_columns % 4096 == 0:
        block_n, block_k, per_thread = 8, 4096, 128
    else:
        block_n, block_k, per_thread = 4, 2048, 64
    block_k = min(block_k, triton.next_power_of_2(num_columns))
    if itemsize == 4:
        block_n, per_thread = block_n // 2, 64
    while block_n > 1 and triton.cdiv(num_rows, block_n) < 2 * processors // 3:
        block_n //= 2
    return GemvConfig(block_n, block_k, min(8, max(1, block_n * block_k // (32 * per_thread))))


def takes_parts(num_heads: int, head_size: int, num_splits: int) -> bool:
    """Whether a product shall join an attention's parts itself.  All of its programs read all parts, so that of large
    attentions a launch of its own joins them sooner."""
    is_power_of_2 = head_size & (head_size - 1) == 0
    return num_splits > 1 and head_size >= 4 and is_power_of_2 and num_heads * head_size * num_splits <= MOST_IN_PARTS


def config_for_parts(config: GemvConfig, splits: int, head_size: int) -> GemvConfig:
    """For an attention's parts: whole heads in a block, and at most 128 of their values in a thread's registers."""
    block_k = max(config.block_k, head_size)
    return replace(config, block_k=block_k, num_warps=max(config.num_warps, min(8, block_k * splits // (32 * 128))))
