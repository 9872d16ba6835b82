"""What every launch of `gpt.kernels.w8a8` has to do: beside exact products and the formulas of gpt.quant.

shape: tokens, rows, columns.
"""

from __future__ import annotations

import math

import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, normal, operands

from gpt.kernels.quantize_rows import LARGEST
from gpt.kernels.store_cache import CacheSlots, store_cache
from gpt.kernels.w8a8 import reference, w8a8
from gpt.kernels.w8a8_config import HopperConfig, W8a8Config
from gpt.kernels.w8a8_epilogue import NextInput
from gpt.quant import to_fp8, to_int8

Config = W8a8Config | HopperConfig
SLOTS = 8  # of a block of the cache


def tolerance_of(steps: torch.dtype, dtype: torch.dtype) -> float:
    """The matrix units add FP8 products in fewer bits than float32 has."""
    return TOLERANCE[dtype] if steps == torch.int8 else max(1e-3, TOLERANCE[dtype])


def check_fused(
    shape: tuple[int, int, int], config: Config, steps: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Scales, bias and activation."""
    num_tokens, num_rows, _ = shape
    x, row_scale, weight, col_scale = operands(*shape, device, steps)
    col_scale *= 1e-5  # so that the activation sees values of both kinds
    bias = normal(num_rows, device=device, dtype=dtype)
    out = torch.empty((num_tokens, num_rows), device=device, dtype=dtype)
    w8a8(x, row_scale, weight, col_scale, out, config=config, bias=bias, activation="gelu_tanh")
    expected = reference(x, row_scale, weight, col_scale, bias=bias, activation="gelu_tanh")
    assert relative_error(out, expected) < tolerance_of(steps, dtype)


def check_next_input(
    shape: tuple[int, int, int], config: Config, steps: torch.dtype, smoothed: bool, device: torch.device
) -> None:
    """The steps are those that the formulas make of the same product stored in float32."""
    num_tokens, num_rows, _ = shape
    x, row_scale, weight, col_scale = operands(*shape, device, steps)
    row_scale[0] = math.nan
    col_scale *= 1e-5
    wide = torch.empty((num_tokens, num_rows), device=device)
    w8a8(x, row_scale, weight, col_scale, wide, config=config, activation="relu")
    smoother = 0.5 + torch.rand(num_rows, device=device) if smoothed else None
    scale = torch.tensor(3 / LARGEST[steps], device=device)
    next_input = NextInput(scale, torch.empty_like(row_scale), smoother)
    out = torch.empty((num_tokens, num_rows), device=device, dtype=steps)
    w8a8(x, row_scale, weight, col_scale, out, config=config, activation="relu", next_input=next_input)
    expected = (to_int8 if steps == torch.int8 else to_fp8)(wide if smoother is None else wide / smoother, scale)
    assert torch.equal(out[1:].float(), expected[1:].float())
    # A row that is no number stays one.
    assert next_input.row_scale[0].isnan()
    assert torch.equal(next_input.row_scale[1:], scale.expand(num_tokens - 1))


def check_stream(shape: tuple[int, int, int], config: Config, steps: torch.dtype, device: torch.device) -> None:
    """Added to the rows of a stream, and to no others."""
    num_tokens, num_rows, _ = shape
    x, row_scale, weight, col_scale = operands(*shape, device, steps)
    col_scale *= 1e-5
    bias = normal(num_rows, device=device, dtype=torch.float16)
    whole = normal(num_tokens + 2, num_rows, device=device)
    before = whole.clone()
    w8a8(x, row_scale, weight, col_scale, whole[1:-1], config=config, bias=bias, add_to_out=True)
    expected = before[1:-1] + reference(x, row_scale, weight, col_scale, bias=bias)
    assert relative_error(whole[1:-1], expected) < tolerance_of(steps, torch.float32)
    assert torch.equal(whole[[0, -1]], before[[0, -1]])


def check_cache(
    num_tokens: int,
    heads: tuple[int, int, int],
    config: Config,
    stored: torch.dtype | None,
    queries_alone: bool,
    device: torch.device,
) -> None:
    """The same bits as those of a product that is stored and then read by the kernel that fills caches.

    heads: query heads, K/V heads, head size.
    """
    num_heads, groups, size = heads
    num_rows, num_blocks = (num_heads + 2 * groups) * size, num_tokens // SLOTS + 8
    x, row_scale, weight, col_scale = operands(num_tokens, num_rows, 96, device)
    col_scale *= 1e-5
    bias = normal(num_rows, device=device, dtype=torch.float16)
    plain = torch.empty((num_tokens, num_rows), device=device, dtype=torch.float16)
    w8a8(x, row_scale, weight, col_scale, plain, config=config, bias=bias)
    places = torch.randperm(num_blocks * SLOTS, device=device)[:num_tokens].int()
    scales = None if stored is None else torch.tensor([0.01, 0.02], device=device)
    # Blocks of a larger cache, whose K and V stand apart.
    shape = (2, num_blocks + 1, groups, SLOTS, size)
    caches = [torch.zeros(shape).to(stored or torch.float16).to(device) for _ in range(2)]
    filled, written = (CacheSlots(places, cache[:, 1:], scales) for cache in caches)
    store_cache(plain.view(num_tokens, -1, size), filled)
    out = torch.zeros((num_tokens, num_heads * size if queries_alone else num_rows), device=device).half()
    w8a8(x, row_scale, weight, col_scale, out, config=config, bias=bias, cache=written)
    assert torch.equal(out, plain[:, : out.shape[1]])
    assert torch.equal(caches[1].float(), caches[0].float())
    assert caches[1].float().any()
