"""gpt/kernels/w8a8.py beside the formulas of gpt.quant and products in int64 and float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.product import Norm
from gpt.kernels.w8a8 import Int8Config, default_config, int8_gemm, quantize_rows, reference
from gpt.quant import row_scales, to_int8

M, K = 5, 200


def quantized(x: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(len(x), device=x.device)
    quantize_rows(x, out, row_scale, **options)  # type: ignore[arg-type]
    return out, row_scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
def test_integers_equal_the_formulas(
    dtype: torch.dtype, static: bool, smoothed: bool, kernel_device: torch.device
) -> None:
    x = normal(M, K, device=kernel_device, dtype=dtype) * 3
    x[2] = 0  # a row without anything still has a scale
    smoother = 0.5 + torch.rand(K, device=kernel_device) if smoothed else None
    # Some values lie beyond 127 steps, on both sides.
    input_scale = torch.tensor(0.04, device=kernel_device) if static else None
    wide = x.float() if smoother is None else x.float() / smoother
    scale = row_scales(wide, 127) if input_scale is None else input_scale.expand(M, 1)
    out, row_scale = quantized(x, input_scale=input_scale, smoother=smoother)
    assert torch.equal(row_scale, scale[:, 0])
    assert torch.equal(out, to_int8(wide, scale))
    assert not static or (int(out.min()), int(out.max())) == (-128, 127)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("static", [False, True])
def test_sums_norm_and_integers_in_one_pass(kind: str, static: bool, kernel_device: torch.device) -> None:
    x, parts = normal(M, K, device=kernel_device), normal(3, M, K, device=kernel_device, dtype=torch.float16)
    bias, weight, shift = (normal(K, device=kernel_device) for _ in range(3))
    stream = x.double() + parts.double().sum(0) + bias.double()
    norm = Norm(weight, shift if kind == "layernorm" else None, 1e-5)
    if kind == "layernorm":
        normed = F.layer_norm(stream, (K,), weight.double(), shift.double(), 1e-5)
    else:
        normed = F.rms_norm(stream, (K,), weight.double(), 1e-5)
    input_scale = torch.tensor(0.03, device=kernel_device) if static else None
    out, row_scale = quantized(x, norm=norm, parts=parts, bias=bias, input_scale=input_scale)
    scale = normed.abs().amax(1) / 127 if input_scale is None else input_scale.expand(M).double()
    assert relative_error(x, stream) < TOLERANCE[torch.float32]
    assert relative_error(row_scale, scale) < TOLERANCE[torch.float32]
    # The norm is computed in float32: only where 64 bits give about a half may the integer be the other one.
    steps = (normed / scale[:, None]).clamp(-128, 127)
    assert ((out.double() - steps).abs() < 0.5 + 1e-3).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("static", [False, True])
def test_overflow_shows_in_its_row_alone(bad: float, static: bool, kernel_device: torch.device) -> None:
    x = normal(3, K, device=kernel_device)
    x[1, 7] = bad
    _, row_scale = quantized(x, input_scale=torch.tensor(0.1, device=kernel_device) if static else None)
    assert row_scale.isnan().tolist() == [False, True, False]


def operands(
    num_tokens: int, num_rows: int, num_columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = (
        torch.randint(-128, 128, (size, num_columns), device=device, dtype=torch.int8)
        for size in (num_tokens, num_rows)
    )
    return x, torch.rand(num_tokens, device=device) + 0.1, weight, torch.rand(num_rows, device=device) + 0.1


# Decode and prompts; whole blocks of nothing, and of everything; more tiles of tokens than share a group.
SHAPES = {
    "one": (1, 50, 96, Int8Config(16, 32, 32, 4, 2)),
    "few": (20, 70, 200, Int8Config(32, 32, 64, 4, 2)),
    "whole": (64, 64, 128, Int8Config(64, 32, 64, 4, 2)),
    "many": (300, 70, 130, Int8Config(32, 32, 64, 4, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product_with_everything_fused(name: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    num_tokens, num_rows, num_columns, config = SHAPES[name]
    x, row_scale, weight, col_scale = operands(num_tokens, num_rows, num_columns, kernel_device)
    col_scale *= 1e-5  # so that the activation sees values of both kinds
    bias = normal(num_rows, device=kernel_device, dtype=dtype)
    out = torch.empty((num_tokens, num_rows), device=kernel_device, dtype=dtype)
    int8_gemm(x, row_scale, weight, col_scale, out, config=config, bias=bias, activation="gelu_tanh")
    expected = reference(x, row_scale, weight, col_scale, bias=bias, activation="gelu_tanh")
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("split_k", [1, 4])
def test_sums_are_exact(split_k: int, kernel_device: torch.device) -> None:
    """Beyond what a float16 sum holds, within what float32 holds: with scales of 1, equal to the integers."""
    x, _, weight, _ = operands(7, 40, 600, kernel_device)
    ones = [torch.ones(size, device=kernel_device) for size in (7, 40)]
    parts = torch.full((split_k, 7, 40), math.nan, device=kernel_device)
    int8_gemm(x, ones[0], weight, ones[1], parts, config=Int8Config(16, 32, 128, 4, 2, split_k))
    assert torch.equal(parts.sum(0).double(), reference(x, ones[0], weight, ones[1]))


def test_a_row_without_a_scale_is_no_number(kernel_device: torch.device) -> None:
    x, row_scale, weight, col_scale = operands(3, 40, 64, kernel_device)
    row_scale[1] = math.nan
    out = torch.empty((3, 40), device=kernel_device)
    int8_gemm(x, row_scale, weight, col_scale, out, config=Int8Config(16, 32, 64, 4, 2))
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert int(out.isnan().sum()) == 40


@pytest.mark.parametrize("change", ["x", "row_scale", "weight", "col_scale", "out", "bias", "split"])
def test_products_that_do_not_fit_are_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    with pytest.raises(ValueError, match="expected"):
        int8_gemm(
            zeros(2, 32, dtype=torch.float16 if change == "x" else torch.int8),
            zeros(3 if change == "row_scale" else 2),
            zeros(16, 33 if change == "weight" else 32, dtype=torch.int8),
            zeros(15 if change == "col_scale" else 16),
            zeros(2, 2, 16) if change == "split" else zeros(3 if change == "out" else 2, 16),
            config=Int8Config(16, 32, 32, 4, 2, 2 if change == "split" else 1),
            bias=zeros(17 if change == "bias" else 16),
        )


@pytest.mark.parametrize("change", ["out", "row_scale", "input_scale", "smoother", "parts", "dtype"])
def test_rows_that_do_not_fit_are_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    with pytest.raises(ValueError, match="expected"):
        quantize_rows(
            zeros(2, 8, dtype=torch.float16 if change == "dtype" else torch.float32),
            zeros(2, 8, dtype=torch.uint8 if change == "out" else torch.int8),
            zeros(1 if change == "row_scale" else 2),
            input_scale=zeros(2) if change == "input_scale" else zeros(),
            smoother=zeros(7 if change == "smoother" else 8),
            parts=zeros(1, 3 if change == "parts" else 2, 8),
        )


def test_default_config_divides_only_what_is_added_up(kernel_device: torch.device) -> None:
    for num_tokens in (1, 64, 200, 8192):
        assert default_config(num_tokens, 1600, 6400, kernel_device, splits=False).split_k == 1
    assert default_config(8, 64, 6400, kernel_device, splits=True).split_k > 1
