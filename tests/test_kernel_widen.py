"""gpt/kernels/widen.py beside gpt.quant.dequantize_weight: the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import normal

from gpt.engine.quant_linear import WidenedWeights
from gpt.kernels.launch import INTERPRETED
from gpt.kernels.widen import widen
from gpt.quant import dequantize_weight, unpack_int4

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Rows, columns and those that share a scale (0 for all): several programs, whose last is not full; groups, also for
# int8; columns that 8, 4 or 2 values at once do not divide, and rows of less than one vector.
SIZES = {
    torch.int8: [(7, 3000, 0), (33, 384, 128), (37, 77, 0), (5, 12, 0), (1, 1, 0)],
    torch.uint8: [(7, 3000, 0), (33, 384, 32), (37, 90, 0), (5, 12, 0), (3, 2, 0)],
}


def steps_and_scale(
    kind: torch.dtype, num_rows: int, num_columns: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value of a byte; scales of both signs, among them the type's smallest."""
    width = num_columns // 2 if kind == torch.uint8 else num_columns
    weight = torch.randint(0, 256, (num_rows, width), device=device, dtype=torch.uint8).view(kind)
    scale = normal(*((num_rows, num_columns // group) if group else (num_rows,)), device=device, dtype=dtype)
    scale.view(-1)[:1] = torch.finfo(dtype).tiny
    return weight, scale


def plain(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = dequantize_weight(unpack_int4(weight) if weight.dtype == torch.uint8 else weight, scale)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts float32 off where a GPU rounds it
        wide = (wide.view(torch.int32) >> 16 << 16).view(torch.float32)
    return wide.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "sizes"), [(kind, sizes) for kind, each in SIZES.items() for sizes in each])
def test_values_are_those_of_the_plain_form(
    kind: torch.dtype, sizes: tuple[int, int, int], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    weight, scale = steps_and_scale(kind, *sizes, dtype, kernel_device)
    num_values = sizes[0] * sizes[1]
    beyond = torch.zeros(num_values + 64, dtype=dtype, device=kernel_device)
    out = beyond[:num_values].view(sizes[:2])
    widen(weight, scale, out)
    assert torch.equal(out, plain(weight, scale, dtype))
    assert not beyond[num_values:].any()


def test_scales_of_another_type(kernel_device: torch.device) -> None:
    weight, scale = steps_and_scale(torch.int8, 9, 40, 0, torch.float32, kernel_device)
    out = torch.empty((9, 40), dtype=torch.float16, device=kernel_device)
    widen(weight, scale, out)
    assert torch.equal(out, plain(weight, scale, torch.float16))


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_products_with_widened_weights(kind: torch.dtype, biased: bool, kernel_device: torch.device) -> None:
    weight, _ = steps_and_scale(kind, 24, 64, 32, torch.float16, kernel_device)
    scale = torch.rand((24, 2), device=kernel_device).half()
    x = normal(5, 64, device=kernel_device)
    bias = normal(24, device=kernel_device, dtype=torch.float16) if biased else None
    linear = WidenedWeights(weight, scale, torch.float16)
    expected = F.linear(x.half(), plain(weight, scale, torch.float16))
    assert torch.equal(linear.multiply(linear.prepare(x), bias), expected if bias is None else expected + bias)


@pytest.mark.parametrize("change", ["weight", "strides", "out", "scale", "groups", "odd groups"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, device=kernel_device, dtype=dtype)

    weight = zeros(4, 15, dtype=torch.int32 if change == "weight" else torch.uint8)
    if change == "strides":
        weight = zeros(15, 4, dtype=torch.uint8).t()
    scale = zeros(3 if change == "scale" else 4, {"groups": 4, "odd groups": 10}.get(change, 5))
    with pytest.raises(ValueError, match="expected"):
        widen(weight, scale, zeros(4, 15 if change == "out" else 30))
