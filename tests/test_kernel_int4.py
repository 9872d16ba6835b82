"""gpt/kernels/int4_skinny.py beside the widened weights' product."""

from __future__ import annotations

import math

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.int4 import widened
from gpt.kernels.int4_skinny import int4_skinny
from gpt.kernels.product import Gate, reference
from gpt.kernels.skinny import SkinnyConfig

N, K = 50, 320


def packed(device: torch.device, group: int, num_columns: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value of a byte, and the value of a step."""
    shape = (N, num_columns // group) if group else (N,)
    weight = torch.randint(0, 256, (N, num_columns // 2), device=device, dtype=torch.uint8)
    return weight, (torch.rand(shape, device=device) * 0.02 + 0.001).half()


def make_gate(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> tuple[Gate, Gate]:
    """A second product, packed and widened."""
    parts = [tensor.flip(0).contiguous() for tensor in (weight, scale, bias)]
    return Gate(parts[0], parts[2], parts[1]), Gate(widened(parts[0], parts[1]), parts[2])


@pytest.mark.parametrize("num_tokens", [2, 20, 70])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("weights_first", [False, True])
def test_several_rows(num_tokens: int, group: int, weights_first: bool, kernel_device: torch.device) -> None:
    weight, scale = packed(kernel_device, group)
    x = normal(num_tokens, K, device=kernel_device, dtype=torch.float16)
    bias = normal(N, device=kernel_device, dtype=torch.float16)
    gate, wide_gate = make_gate(weight, scale, bias)
    out = torch.empty((num_tokens, N), device=kernel_device)
    config = SkinnyConfig(32, 128, 4, 2, 1, weights_first)
    int4_skinny(x, weight, out, config=config, scale=scale, bias=bias, activation="silu", gate=gate)
    expected = reference(x, widened(weight, scale), bias=bias, activation="silu", gate=wide_gate)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("group", [0, 32])
def test_parts_of_several_rows_add_up(group: int, kernel_device: torch.device) -> None:
    weight, scale = packed(kernel_device, group, 160)
    x = normal(3, 160, device=kernel_device, dtype=torch.float16)
    parts = torch.full((4, 3, N), math.nan, device=kernel_device)
    int4_skinny(x, weight, parts, config=SkinnyConfig(32, 32, 4, 2, 4), scale=scale)
    assert relative_error(parts.sum(0), reference(x, widened(weight, scale))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("change", ["weight", "x", "out", "bias", "groups", "short groups", "gate"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=kernel_device)

    weight = torch.zeros((16, 32), device=kernel_device, dtype=torch.int8 if change == "weight" else torch.uint8)
    scale = zeros(16, {"groups": 3, "short groups": 4}.get(change, 2))
    bias = zeros(15 if change == "bias" else 16)
    gate = Gate(weight, bias, None) if change == "gate" else None
    width = 63 if change == "x" else 64
    out = zeros(3 if change == "out" else 2, 16)
    with pytest.raises(ValueError, match="expected"):
        int4_skinny(zeros(2, width), weight, out, config=SkinnyConfig(16, 32, 4, 2), scale=scale, bias=bias, gate=gate)
