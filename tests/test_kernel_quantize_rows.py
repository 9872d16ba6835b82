"""gpt/kernels/quantize_rows.py beside the formulas of gpt.quant and float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.product import Norm
from gpt.kernels.quantize_rows import LARGEST, quantize_rows
from gpt.quant import row_scales, to_fp8, to_int8

FORMULAS = {torch.int8: to_int8, torch.float8_e4m3fn: to_fp8}
M, K = 5, 200


def quantized(x: torch.Tensor, steps: torch.dtype = torch.int8, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=steps, device=x.device)
    row_scale = torch.empty(len(x), device=x.device)
    quantize_rows(x, out, row_scale, **options)  # type: ignore[arg-type]
    return out, row_scale


@pytest.mark.parametrize("steps", FORMULAS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
def test_steps_equal_the_formulas(
    steps: torch.dtype, dtype: torch.dtype, static: bool, smoothed: bool, kernel_device: torch.device
) -> None:
    x = normal(M, K, device=kernel_device, dtype=dtype) * 3
    x[2] = 0  # a row without anything still has a scale
    x[3] *= torch.logspace(-6, 0, K, device=kernel_device).to(dtype)  # down to FP8's smallest steps and zero
    smoother = 0.5 + torch.rand(K, device=kernel_device) if smoothed else None
    # Some values lie beyond the largest step, on both sides.
    input_scale = torch.tensor(5 / LARGEST[steps], device=kernel_device) if static else None
    # On a CPU, where PyTorch rounds quotients correctly: on a GPU it multiplies by the inverse of a number.
    wide = x.float().cpu() if smoother is None else x.float().cpu() / smoother.cpu()
    scale = row_scales(wide, LARGEST[steps]) if input_scale is None else input_scale.cpu().expand(M, 1)
    out, row_scale = quantized(x, steps, input_scale=input_scale, smoother=smoother)
    assert torch.equal(row_scale.cpu(), scale[:, 0])
    assert torch.equal(out.float().cpu(), FORMULAS[steps](wide, scale).float())
    extremes = {torch.int8: (-128, 127), torch.float8_e4m3fn: (-448, 448)}[steps]
    assert not static or (float(out.float().min()), float(out.float().max())) == extremes


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("static", [False, True])
def test_sums_norm_and_integers_in_one_pass(kind: str, static: bool, kernel_device: torch.device) -> None:
    x, parts = normal(M, K, device=kernel_device), normal(3, M, K, device=kernel_device, dtype=torch.float16)
    bias, weight, shift = (normal(K, device=kernel_device, dtype=torch.float16) for _ in range(3))
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
