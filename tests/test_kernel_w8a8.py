"""gpt/kernels/w8a8.py beside products in int64 and float64, and the formulas of gpt.quant."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_inputs import TOLERANCE, operands
from w8a8_checks import check_fused, check_next_input

from gpt.kernels.quantize_rows import LARGEST
from gpt.kernels.w8a8 import reference, w8a8
from gpt.kernels.w8a8_config import W8a8Config, default_config
from gpt.kernels.w8a8_epilogue import NextInput

# Decode and prompts; whole blocks of nothing, and of everything; more tiles of tokens than share a group.
SHAPES = {
    "one": ((1, 50, 96), W8a8Config(16, 32, 32, 4, 2)),
    "few": ((20, 70, 200), W8a8Config(32, 32, 64, 4, 2)),
    "whole": ((64, 64, 128), W8a8Config(64, 32, 64, 4, 2)),
    "many": ((300, 70, 130), W8a8Config(32, 32, 64, 4, 2)),
    "descriptors": ((70, 50, 144), W8a8Config(32, 32, 64, 4, 2, descriptors=True)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("steps", LARGEST)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product_with_everything_fused(
    name: str, steps: torch.dtype, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    shape, config = SHAPES[name]
    check_fused(shape, config, steps, dtype, kernel_device)


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("steps", LARGEST)
@pytest.mark.parametrize("smoothed", [False, True])
def test_result_as_the_next_product_takes_it(
    name: str, steps: torch.dtype, smoothed: bool, kernel_device: torch.device
) -> None:
    shape, config = SHAPES[name]
    check_next_input(shape, config, steps, smoothed, kernel_device)


@pytest.mark.parametrize("split_k", [1, 4])
def test_sums_are_exact(split_k: int, kernel_device: torch.device) -> None:
    """Beyond what a float16 sum holds, within what float32 holds: with scales of 1, equal to the integers."""
    x, _, weight, _ = operands(7, 40, 600, kernel_device)
    ones = [torch.ones(size, device=kernel_device) for size in (7, 40)]
    parts = torch.full((split_k, 7, 40), math.nan, device=kernel_device)
    w8a8(x, ones[0], weight, ones[1], parts, config=W8a8Config(16, 32, 128, 4, 2, split_k))
    assert torch.equal(parts.sum(0).double(), reference(x, ones[0], weight, ones[1]))


def test_a_row_without_a_scale_is_no_number(kernel_device: torch.device) -> None:
    x, row_scale, weight, col_scale = operands(3, 40, 64, kernel_device)
    row_scale[1] = math.nan
    out = torch.empty((3, 40), device=kernel_device)
    w8a8(x, row_scale, weight, col_scale, out, config=W8a8Config(16, 32, 64, 4, 2))
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert int(out.isnan().sum()) == 40


@pytest.mark.parametrize("change", ["x", "row_scale", "weight", "col_scale", "out", "bias", "split", "next", "columns"])
def test_products_that_do_not_fit_are_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    width = 40 if change == "columns" else 32
    config = W8a8Config(16, 32, 32, 4, 2, 2 if change == "split" else 1, descriptors=change == "columns")
    next_input = NextInput(zeros(), zeros(2)) if change == "next" else None
    with pytest.raises(ValueError, match="expected"):
        w8a8(
            zeros(2, width, dtype=torch.float16 if change == "x" else torch.int8),
            zeros(3 if change == "row_scale" else 2),
            zeros(16, 33 if change == "weight" else width, dtype=torch.int8),
            zeros(15 if change == "col_scale" else 16),
            zeros(2, 2, 16) if change == "split" else zeros(3 if change == "out" else 2, 16),
            config=config,
            bias=zeros(17 if change == "bias" else 16),
            next_input=next_input,
        )


def test_default_config_divides_only_what_is_added_up(kernel_device: torch.device) -> None:
    for num_tokens in (1, 64, 200, 8192):
        assert default_config(num_tokens, 1600, 6400, kernel_device, splits=False).split_k == 1
    assert default_config(8, 64, 6400, kernel_device, splits=True).split_k > 1
