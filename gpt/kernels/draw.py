"""Drawing the next tokens of a decode step: temperature, top-k, top-p, min-p and the draw, one program per sequence.

Nothing is sorted.  A filter keeps what is not below a threshold, and the threshold is found bit by bit: each pass over
the logits counts them, or adds up their probabilities, from trial values on.  With top-k most passes see few tokens:
at least k logits are as large as the k-th largest of the tiles' maxima that the head has left, and what is smaller is
out.  The same written plainly is `gpt.runtime.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import launch_options, wait_for_inputs

# Logits that a program looks at together: of all, and of the few that top-k leaves.
_BLOCK, _FEW_BLOCK = 8192, 1024


@dataclass(frozen=True)
class Filters:
    """top_k: tokens that stay, 0 for all.  top_p: the probability that stays, 1 for all.  min_p: the part of the
    likeliest token's probability that a token needs."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@triton.jit
def _draw_kernel(
    logits_ptr,  # [M, V], rows `row_stride` apart
    tile_max_ptr,  # [M, num_tiles] float32
    uniforms_ptr,  # [T, M] float64
    positions_ptr,  # [M] int32
    first_ptr,  # [M] int32
    best_ptr,  # [M] float32
    token_ptr,  # [M] int32
    values_ptr,  # [M, V] float32
    ids_ptr,  # [M, V] int32
    V,
    row_stride,
    num_tiles,
    temperature,
    top_p,
    min_p,
    TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_TILES: tl.constexpr,
    FEW: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    values_ptr += row * V
    ids_ptr += row * V
    lanes = tl.arange(0, BLOCK)
    if HAS_TILES:
        tiles = tl.arange(0, PADDED_TILES)
        in_row = tiles < num_tiles
        tile_max = tl.load(tile_max_ptr + row * num_tiles + tiles, mask=in_row, other=float("-inf"))
        largest = tl.max(tile_max, 0)
        is_bad = tl.sum((tile_max != tile_max).to(tl.int32), 0) > 0
    else:
        largest = float("-inf")
        num_bad = 0
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + lanes, mask=start + lanes < V, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(x, 0))
            num_bad += tl.sum((x != x).to(tl.int32), 0)
        is_bad = num_bad > 0
    tl.store(best_ptr + row, tl.where(is_bad, float("nan"), largest))
    source = logits_ptr
    count = V
    STEP: tl.constexpr = FEW_BLOCK if FEW else BLOCK
    if FEW:
        lowest = _nothing()
        for bit in range(32):
            trial = lowest | (_top_bit() >> bit)
            lowest = tl.where(tl.sum((_rank(tile_max) >= trial).to(tl.int32), 0) >= TOP_K, trial, lowest)
        count = V * 0
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + lanes, mask=start + lanes < V, other=float("-inf"))
            stays = (_rank(x) >= lowest) & (start + lanes < V)
            places = count + tl.cumsum(stays.to(tl.int32), 0) - 1
            tl.store(values_ptr + places, x, mask=stays)
            tl.store(ids_ptr + places, start + lanes, mask=stays)
            count += tl.sum(stays.to(tl.int32), 0)
        tl.debug_barrier()  # other threads of the program read what was stored
        source = values_ptr
    lanes = tl.arange(0, STEP)
    threshold = _nothing()
    if TOP_K > 0:
        for bit in range(32):
            trial = threshold | (_top_bit() >> bit)
            above = tl.zeros((STEP,), tl.int32)
            for start in range(0, count, STEP):
                x = tl.load(source + start + lanes, mask=start + lanes < count, other=float("-inf"))
                above += ((_rank(x) >= trial) & (start + lanes < count)).to(tl.int32)
            threshold = tl.where(tl.sum(above, 0) >= TOP_K, trial, threshold)
    if HAS_TOP_P:
        wanted = _mass(source, count, threshold, largest, temperature, 0.0, lanes, STEP) * top_p
        after_top_k = threshold
        threshold = _nothing()
        for digit in range(16):  # two bits a pass: exponentials cost more than sums
            unit = (_top_bit() >> 1) >> (2 * digit)
            trial = threshold | unit
            mass, mass_2, mass_3 = _masses(source, count, trial, unit, after_top_k, largest, temperature, lanes, STEP)
            threshold = tl.where(mass >= wanted, trial, threshold)
            threshold = tl.where(mass_2 >= wanted, trial + unit, threshold)
            threshold = tl.where(mass_3 >= wanted, trial + 2 * unit, threshold)
        threshold = tl.maximum(threshold, after_top_k)
    # The inverse of the distribution function: a mass above 0 and up to the whole.
    step = (tl.load(positions_ptr + row) - tl.load(first_ptr + row)).to(tl.int64)
    uniform = tl.load(uniforms_ptr + step * tl.num_programs(0) + row)
    target = (1.0 - uniform) * _mass(source, count, threshold, largest, temperature, min_p, lanes, STEP)
    before = target * 0.0
    found = count * 0 + 2147483647
    last = count * 0
    for start in range(0, count, STEP):
        weights = _weights(source, start + lanes, count, threshold, largest, temperature, min_p)
        sums = before + tl.cumsum(weights.to(tl.float64), 0)
        reached = (sums >= target) & (weights > 0)
        found = tl.minimum(found, tl.min(tl.where(reached, start + lanes, 2147483647), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, start + lanes, 0), 0))
        before += tl.sum(weights.to(tl.float64), 0)
    place = tl.minimum(found, last)  # where rounding leaves the target above all sums, the last token that stays
    token = place
    if FEW:
        token = tl.load(ids_ptr + place)
    tl.store(token_ptr + row, token)


@triton.jit
def _nothing():
    """The lowest rank."""
    return tl.full((), 0, tl.uint32)


@triton.jit
def _top_bit():
    return tl.full((), 2147483648, tl.uint32)


@triton.jit
def _rank(x):
    """Integers in the order of float32 values."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 2147483648, bits ^ 4294967295, bits | 2147483648)


@triton.jit
def _weights(source, places, count, threshold, largest, temperature, min_p):
    """exp((x - largest) / temperature) of those that stay, 0 for the others."""
    x = tl.load(source + places, mask=places < count, other=float("-inf"))
    weights = tl.exp((x - largest) / temperature)
    return tl.where((_rank(x) >= threshold) & (places < count) & (weights >= min_p), weights, 0.0)


@triton.jit
def _mass(source, count, threshold, largest, temperature, min_p, lanes, STEP: tl.constexpr):
    total = tl.zeros((STEP,), tl.float64)
    for start in range(0, count, STEP):
        total += _weights(source, start + lanes, count, threshold, largest, temperature, min_p).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _masses(source, count, threshold, unit, lowest, largest, temperature, lanes, STEP: tl.constexpr):
    """`_mass` from `threshold`, from one and from two units above it on, of what is not below `lowest`."""
    total = tl.zeros((STEP,), tl.float64)
    total_2 = tl.zeros((STEP,), tl.float64)
    total_3 = tl.zeros((STEP,), tl.float64)
    for start in range(0, count, STEP):
        x = tl.load(source + start + lanes, mask=start + lanes < count, other=float("-inf"))
        weights = tl.where(_rank(x) >= lowest, tl.exp((x - largest) / temperature), 0.0).to(tl.float64)
        total += tl.where(_rank(x) >= threshold, weights, 0.0)
        total_2 += tl.where(_rank(x) >= threshold + unit, weights, 0.0)
        total_3 += tl.where(_rank(x) >= threshold + 2 * unit, weights, 0.0)
    return tl.sum(total, 0), tl.sum(total_2, 0), tl.sum(total_3, 0)


def draw_tokens(
    logits: torch.Tensor,
    filters: Filters,
    uniforms: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    tile_max: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of logits [M, V] float32 (rows may lie apart) the largest, NaN where one is NaN, [M, 1], and a token
    drawn with the number uniforms[positions - first], [M, 1] int32.

    uniforms [T, M] float64 in [0, 1); positions, first [M] int32.  tile_max: [M, tiles] float32, the largest logits of
    parts of each row that make up the whole of it.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = 0 if tile_max is None else tile_max.shape[1]
    few = 0 < filters.top_k <= num_tiles
    best = torch.empty((num_rows, 1), dtype=torch.float32, device=logits.device)
    token = torch.empty((num_rows, 1), dtype=torch.int32, device=logits.device)
    values = torch.empty((num_rows, vocab_size) if few else (0,), dtype=torch.float32, device=logits.device)
    _draw_kernel[(num_rows,)](
        logits,
        logits if tile_max is None else tile_max,
        uniforms,
        positions,
        first,
        best,
        token,
        values,
        torch.empty_like(values, dtype=torch.int32),
        vocab_size,
        logits.stride(0),
        num_tiles,
        filters.temperature,
        filters.top_p,
        filters.min_p,
        TOP_K=filters.top_k,
        HAS_TOP_P=filters.top_p < 1,
        HAS_TILES=tile_max is not None,
        FEW=few,
        PADDED_TILES=triton.next_power_of_2(max(1, num_tiles)),
        BLOCK=min(_BLOCK, max(128, triton.next_power_of_2(vocab_size))),
        FEW_BLOCK=_FEW_BLOCK,
        num_warps=16 if vocab_size > 4096 else 4,
        **launch_options(logits.device),
    )
    return best, token
