"""Prompts' products for `gpt.kernels.w8a8` on compute capability 9.0: programs that stay, warps that fetch or multiply.

As many programs as there are multiprocessors take tile after tile.  One warp of a program, the producer, has the copy
engine bring x and the weight, step after step along K, into a ring of slots in shared memory.  It does not wait for
what becomes of a tile's sums: the next tile's operands come meanwhile.  Two groups of four warps, the consumers,
multiply, each its 128 tokens of a tile of 256 x 128; with 128 x 128 the L2 cache would have to deliver a third more.
Last tiles for no more than half of the programs are cut into halves of 128 x 128, of which a consumer has 64 tokens.

Two barriers per slot: `ready` counts the bytes that have come, `empty` the consumers that are through with them.  The
k-th use of a slot waits for the phase of k's parity; the slots are empty before their first use.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gpt.kernels.launch import cdiv, num_multiprocessors, place_of_tile, wait_for_inputs
from gpt.kernels.w8a8_epilogue import store_tile, tile_values

# Tokens of a consumer, rows of the weight, and values of both along K.
BLOCK: gl.constexpr = gl.constexpr(128)
STAGES: gl.constexpr = gl.constexpr(4)
_TYPES = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def _place(index, work, BY_TOKENS: gl.constexpr):
    """First token and row of a piece of work, and whether that is half of a tile."""
    num_m, num_n, num_whole, _ = work
    half = index >= num_whole
    tile = gl.where(half, num_whole + (index - num_whole) // 2, index)
    # What runs at the same time: 8 tiles of tokens and many of rows, or all tokens and 4 tiles of rows.
    if BY_TOKENS:
        m, n = place_of_tile(tile, num_m, num_n, 8)
    else:
        n, m = place_of_tile(tile, num_n, num_m, 4)
    return m * 2 * BLOCK + gl.where(half, (index - num_whole) % 2 * BLOCK, 0), n * BLOCK, half


@gluon.jit
def _produce(ring, work, x_desc, weight_desc, K: gl.constexpr, BY_TOKENS: gl.constexpr, DEPENDENT: gl.constexpr):
    wait_for_inputs(DEPENDENT)
    x_slots, weight_slots, ready, empty = ring
    step = 0
    for index in range(gl.program_id(0), work[3], gl.num_programs(0)):
        first_token, first_row, half = _place(index, work, BY_TOKENS)
        for k in range(0, K, BLOCK):
            slot = step % STAGES
            bar = ready.index(slot)
            mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
            if half:
                mbarrier.expect(bar, 2 * BLOCK * BLOCK)
            else:
                mbarrier.expect(bar, 3 * BLOCK * BLOCK)
            tma.async_copy_global_to_shared(x_desc, [first_token, k], bar, x_slots.index(slot * 2))
            tma.async_copy_global_to_shared(weight_desc, [first_row, k], bar, weight_slots.index(slot))
            if not half:
                tma.async_copy_global_to_shared(x_desc, [first_token + BLOCK, k], bar, x_slots.index(slot * 2 + 1))
            step += 1


@gluon.jit
def _sums(
    ring,
    first_step,
    X_BLOCK: gl.constexpr,
    FIRST: gl.constexpr,
    ROWS: gl.constexpr,
    K: gl.constexpr,
    dtype: gl.constexpr,
):
    """Sums [ROWS, BLOCK] of rows FIRST... of one of the slots' two blocks of x.

    Slots follow from the step alone: Triton 3.6 takes `before = slot`, in front of a loop and in it, for a value that
    the loop does not change.
    """
    x_slots, weight_slots, ready, empty = ring
    NUM_STEPS: gl.constexpr = (K + BLOCK - 1) // BLOCK
    NUM_WHOLE: gl.constexpr = K // BLOCK
    sums = gl.zeros((ROWS, BLOCK), dtype, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32]))
    for k in range(NUM_WHOLE):
        slot = (first_step + k) % STAGES
        mbarrier.wait(ready.index(slot), (first_step + k) // STAGES & 1)
        x = x_slots.index(slot * 2 + X_BLOCK).slice(FIRST, ROWS, 0)
        sums = warpgroup_mma(x, weight_slots.index(slot).permute((1, 0)), sums, use_acc=k > 0, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(empty.index((first_step + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
    if NUM_WHOLE < NUM_STEPS:
        # Zeros behind K are multiplied as far as the next size that there is.
        REST: gl.constexpr = K - NUM_WHOLE * BLOCK
        WIDTH: gl.constexpr = 32 if REST <= 32 else (64 if REST <= 64 else 128)
        slot = (first_step + NUM_WHOLE) % STAGES
        mbarrier.wait(ready.index(slot), (first_step + NUM_WHOLE) // STAGES & 1)
        x = x_slots.index(slot * 2 + X_BLOCK).slice(FIRST, ROWS, 0).slice(0, WIDTH, 1)
        weight = weight_slots.index(slot).slice(0, WIDTH, 1)
        sums = warpgroup_mma(x, weight.permute((1, 0)), sums, is_async=True)
        if NUM_WHOLE > 0:
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index((first_step + NUM_WHOLE + STAGES - 1) % STAGES), count=1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(empty.index((first_step + NUM_STEPS - 1) % STAGES), count=1)
    return sums


@gluon.jit
def _in_pieces(x, WIDTH: gl.constexpr):
    """x's columns in pieces of WIDTH."""
    if x.shape[1] == WIDTH:
        return (x,)
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        return _in_pieces(left, WIDTH) + _in_pieces(right, WIDTH)


@gluon.jit
def _finish(sums, first_token, first_row, M, N, out_ptr, vectors, cache, MAKES, STORES):
    """Stores a tile in pieces of 128 bytes a row, of which a thread has 16 side by side; sums lie in it two by two."""
    row_scale_ptr, col_scale_ptr, bias_ptr, next_scale_ptr, smoother_ptr, next_row_scale_ptr = vectors
    BYTES: gl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth // 8
    WIDTH: gl.constexpr = 128 // BYTES
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    # A warp keeps its 16 rows.
    store_layout: gl.constexpr = gl.BlockedLayout([4, 16 // BYTES], [4, 8], [4, 1], [1, 0])
    tokens = first_token + gl.arange(0, sums.shape[0], gl.SliceLayout(1, sums_layout))
    row_scale = gl.load(row_scale_ptr + tokens, mask=tokens < M, other=0.0)
    store_tokens = first_token + gl.arange(0, sums.shape[0], gl.SliceLayout(1, store_layout))
    pieces = _in_pieces(sums, WIDTH)
    for i in gl.static_range(len(pieces)):
        first = first_row + i * WIDTH
        rows = first + gl.arange(0, WIDTH, gl.SliceLayout(0, sums_layout))
        col_scale = gl.load(col_scale_ptr + rows, mask=rows < N, other=0.0)
        bias = gl.load(bias_ptr + rows, mask=rows < N, other=0.0)
        values = tile_values(
            gl.convert_layout(pieces[i], sums_layout, assert_trivial=True),
            tokens,
            rows,
            first,
            row_scale,
            col_scale,
            bias,
            next_scale_ptr,
            smoother_ptr,
            M,
            N,
            out_ptr,
            next_row_scale_ptr,
            *MAKES,
        )
        store_rows = first + gl.arange(0, WIDTH, gl.SliceLayout(0, store_layout))
        values = gl.convert_layout(values, store_layout)
        store_tile(values, store_tokens, store_rows, first, 0, M, N, out_ptr, *cache, *STORES)


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    ring,
    work,
    M,
    N,
    out_ptr,
    vectors,
    cache,
    MAKES,
    STORES,
    K: gl.constexpr,
    dtype: gl.constexpr,
    BY_TOKENS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The consumer's share of each of the program's tiles, whole ones first."""
    wait_for_inputs(DEPENDENT)
    NUM_STEPS: gl.constexpr = (K + BLOCK - 1) // BLOCK
    step = 0
    for index in range(gl.program_id(0), work[2], gl.num_programs(0)):
        first_token, first_row, _ = _place(index, work, BY_TOKENS)
        sums = _sums(ring, step, WHICH, 0, BLOCK, K, dtype)
        _finish(sums, first_token + WHICH * BLOCK, first_row, M, N, out_ptr, vectors, cache, MAKES, STORES)
        step += NUM_STEPS
    for index in range(work[2] + gl.program_id(0), work[3], gl.num_programs(0)):
        first_token, first_row, _ = _place(index, work, BY_TOKENS)
        sums = _sums(ring, step, 0, WHICH * (BLOCK // 2), BLOCK // 2, K, dtype)
        _finish(sums, first_token + WHICH * (BLOCK // 2), first_row, M, N, out_ptr, vectors, cache, MAKES, STORES)
        step += NUM_STEPS


@gluon.jit
def w8a8_hopper_kernel(
    x_ptr,  # descriptor of [M, K] int8 or float8e4nv in blocks of BLOCK x BLOCK
    weight_ptr,  # likewise, [N, K]; all others as of `w8a8_kernel`
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    next_scale_ptr,
    smoother_ptr,
    M,
    N,
    out_ptr,
    next_row_scale_ptr,
    places_ptr,
    blocks_ptr,
    kv_scales_ptr,
    part_stride,
    tokens_per_block,
    K: gl.constexpr,
    INTEGER: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    QUANTIZES: gl.constexpr,
    SMOOTHED: gl.constexpr,
    ADD_TO_OUT: gl.constexpr,
    GROUPS: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    QUERIES_ALONE: gl.constexpr,
    QUANTIZES_CACHE: gl.constexpr,
    BY_TOKENS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    x_slots = gl.allocate_shared_memory(x_ptr.dtype, [STAGES * 2, BLOCK, BLOCK], x_ptr.layout)
    weight_slots = gl.allocate_shared_memory(weight_ptr.dtype, [STAGES, BLOCK, BLOCK], weight_ptr.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    num_m = gl.cdiv(M, 2 * BLOCK)
    num_n = gl.cdiv(N, BLOCK)
    num_whole = num_m * num_n
    num_pieces = num_whole
    rest = num_whole % gl.num_programs(0)
    if rest * 2 <= gl.num_programs(0):
        num_whole -= rest
        num_pieces += rest
    dtype: gl.constexpr = gl.int32 if INTEGER else gl.float32
    ring = (x_slots, weight_slots, ready, empty)
    work = (num_m, num_n, num_whole, num_pieces)
    vectors = (row_scale_ptr, col_scale_ptr, bias_ptr, next_scale_ptr, smoother_ptr, next_row_scale_ptr)
    cache = (places_ptr, blocks_ptr, kv_scales_ptr, part_stride, tokens_per_block)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    ring,
                    work,
                    M,
                    N,
                    out_ptr,
                    vectors,
                    cache,
                    (ACTIVATION, HAS_BIAS, QUANTIZES, SMOOTHED),
                    (ADD_TO_OUT, GROUPS, HEAD_SIZE, QUERIES_ALONE, QUANTIZES_CACHE),
                    K,
                    dtype,
                    BY_TOKENS,
                    DEPENDENT,
                ),
            ),
            (
                _consume,
                (
                    1,
                    ring,
                    work,
                    M,
                    N,
                    out_ptr,
                    vectors,
                    cache,
                    (ACTIVATION, HAS_BIAS, QUANTIZES, SMOOTHED),
                    (ADD_TO_OUT, GROUPS, HEAD_SIZE, QUERIES_ALONE, QUANTIZES_CACHE),
                    K,
                    dtype,
                    BY_TOKENS,
                    DEPENDENT,
                ),
            ),
            (_produce, (ring, work, x_ptr, weight_ptr, K, BY_TOKENS, DEPENDENT)),
        ],
        [4, 1],
        [240, 24],
    )


def launch_hopper(x: torch.Tensor, weight: torch.Tensor, *, by_tokens: bool, arguments: dict[str, Any]) -> None:
    """x [M, K], weight [N, K], K a multiple of 16.  arguments: what `gpt.kernels.w8a8.w8a8_kernel` takes as well."""
    size = BLOCK.value
    layout = gl.NVMMASharedLayout.get_default_for([size, size], _TYPES[x.dtype])
    x_ptr, weight_ptr = (TensorDescriptor.from_tensor(each, [size, size], layout) for each in (x, weight))
    num_tiles = cdiv(len(x), 2 * size) * cdiv(len(weight), size)
    num_programs = min(num_multiprocessors(x.device), 2 * num_tiles)
    w8a8_hopper_kernel[(num_programs,)](
        x_ptr=x_ptr, weight_ptr=weight_ptr, **arguments, BY_TOKENS=by_tokens, num_warps=4
    )
