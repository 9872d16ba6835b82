"""gpt/kernels/integer_gemv.py beside the product with widened weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, int8_weight, normal

from gpt.kernels.int4 import widened
from gpt.kernels.integer_gemv import IntegerGemvConfig, default_config, integer_gemv
from gpt.kernels.launch import INTERPRETED
from gpt.kernels.product import Gate, Norm, reference

# The input is rounded to steps of 1 / 32767 of the largest value that a thread has: 5e-5 of a sum, and of a gate's too.
TOLERANCE = TOLERANCE | {torch.float32: 2e-4}
CONFIG = IntegerGemvConfig(8, 2, 2)
INT8, GROUPS = -1, (0, 32, 64)  # columns that share a scale in packed weights, 0 for all of a row


def make_weight(
    num_rows: int, num_columns: int, group: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight and scale for the kernel, and what they stand for, float32."""
    if group == INT8:
        weight, scale = int8_weight(num_rows, num_columns, device)
        return weight, scale, weight * scale.float()[:, None]
    weight = torch.randint(0, 256, (num_rows, num_columns // 2), device=device, dtype=torch.uint8)
    shape = (num_rows, num_columns // group) if group else (num_rows,)
    scale = (torch.rand(shape, device=device) * 0.02 + 0.001).half()
    return weight, scale, widened(weight, scale)


def make_norm(kind: str, width: int, device: torch.device) -> Norm | None:
    if kind == "none":
        return None
    shift = normal(width, device=device) if kind == "layernorm" else None
    return Norm(1 + 0.1 * normal(width, device=device), shift, 1e-5)


# In one stretch of words and in several, the last one not whole; rows that are no multiple of a program's.
@pytest.mark.parametrize("shape", [(50, 192), (21, 2080)], ids=str)
@pytest.mark.parametrize("group", [INT8, *GROUPS])
@pytest.mark.parametrize("kind", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [False, True])
def test_everything_fused(
    shape: tuple[int, int], group: int, kind: str, gated: bool, kernel_device: torch.device
) -> None:
    num_rows, num_columns = shape
    if num_columns % max(group, 1):
        num_columns += group // 2
    weight, scale, wide = make_weight(num_rows, num_columns, group, kernel_device)
    x = 1 + normal(num_columns, device=kernel_device)
    bias = normal(num_rows, device=kernel_device, dtype=torch.float16)
    norm = make_norm(kind, num_columns, kernel_device)
    gate = wide_gate = None
    if gated:
        parts = [tensor.flip(0).contiguous() for tensor in (weight, bias, scale)]
        gate, wide_gate = Gate(*parts), Gate(wide.flip(0), parts[1])
    out = torch.full((num_rows,), 7.0, device=kernel_device)
    options: dict[str, Any] = {"bias": bias, "norm": norm, "activation": "silu"}
    integer_gemv(x, weight, out, config=CONFIG, scale=scale, gate=gate, add_to_out=True, **options)
    expected = reference(x[None], wide, gate=wide_gate, **options)[0] + 7
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_n", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [INT8, 64])
def test_every_config(block_n: int, num_warps: int, group: int, kernel_device: torch.device) -> None:
    weight, scale, wide = make_weight(34, 832, group, kernel_device)
    x, out = normal(832, device=kernel_device), torch.ones(34, device=kernel_device)
    config = IntegerGemvConfig(block_n, 4, num_warps)
    integer_gemv(x, weight, out, config=config, scale=scale, add_to_out=True)
    assert relative_error(out, 1 + reference(x[None], wide)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("group", [INT8, 0, 64])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype, group: int, kernel_device: torch.device) -> None:
    weight, scale, wide = make_weight(5, 320, group, kernel_device)  # fewer rows than a program has
    x, out = normal(320, device=kernel_device, dtype=dtype), torch.empty(5, device=kernel_device, dtype=dtype)
    integer_gemv(x, weight, out, config=CONFIG, scale=scale, activation="silu")
    assert relative_error(out, reference(x[None], wide, activation="silu")[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [INT8, 0, 64])
def test_extreme_weights_and_inputs_do_not_overflow(group: int, kernel_device: torch.device) -> None:
    """A thread's largest sum: 64 words of the lowest weight, with inputs that are all as large as the largest.  A GPU's
    compiler takes minutes for so many."""
    num_pieces = 64 if INTERPRETED else 16
    num_columns = num_pieces * 32 * (4 if group == INT8 else 8)
    weight, scale, _ = make_weight(2, num_columns, group, kernel_device)
    weight.fill_(-128 if group == INT8 else 0x88)
    wide = weight * scale.float()[:, None] if group == INT8 else widened(weight, scale)
    for value in (-5.0, 5.0):
        x, out = torch.full((num_columns,), value, device=kernel_device), torch.empty(2, device=kernel_device)
        integer_gemv(x, weight, out, config=IntegerGemvConfig(2, num_pieces, 1), scale=scale)
        assert relative_error(out, reference(x[None], wide)[0]) < 1e-6


def test_sums_that_could_overflow_are_refused(kernel_device: torch.device) -> None:
    weight, scale, _ = make_weight(16, 96, INT8, kernel_device)
    x, out = torch.zeros(96, device=kernel_device), torch.zeros(16, device=kernel_device)
    with pytest.raises(ValueError, match="num_pieces: found 65, expected at most 64"):
        integer_gemv(x, weight, out, config=IntegerGemvConfig(4, 65, 1), scale=scale)


@pytest.mark.parametrize("group", [INT8, 64])
def test_large_inputs_cost_the_others_little(group: int, kernel_device: torch.device) -> None:
    """Less than a float16's rounding of every input would."""
    weight, scale, wide = make_weight(64, 1600, group, kernel_device)
    x, out = normal(1600, device=kernel_device), torch.empty(64, device=kernel_device)
    x[torch.tensor([3, 700, 1599])] *= 100.0
    integer_gemv(x, weight, out, config=replace(CONFIG, num_pieces=8), scale=scale)
    others = x.clone()
    others[torch.tensor([3, 700, 1599])] = 0.0
    exact, rounded = reference(x[None], wide)[0], reference(others.half()[None], wide)[0]
    rounding = (rounded - reference(others[None], wide)[0]).norm()
    assert (out.double() - exact).norm() < rounding


@pytest.mark.parametrize("group", [INT8, 0, 64])
def test_zeros(group: int, kernel_device: torch.device) -> None:
    weight, scale, wide = make_weight(20, 640, group, kernel_device)
    x, out = normal(640, device=kernel_device), torch.ones(20, device=kernel_device)
    weight[3], wide[3] = 0, 0.0
    x[:256] = 0.0
    integer_gemv(x, weight, out, config=CONFIG, scale=scale)
    assert relative_error(out, reference(x[None], wide)[0]) < TOLERANCE[torch.float32]
    assert out[3] == 0
    integer_gemv(torch.zeros_like(x), weight, out, config=CONFIG, scale=scale)
    assert out.tolist() == [0.0] * 20


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_not_lost(value: float, kernel_device: torch.device) -> None:
    weight, scale, _ = make_weight(20, 640, 64, kernel_device)
    x, out = normal(640, device=kernel_device), torch.empty(20, device=kernel_device)
    x[300] = value
    integer_gemv(x, weight, out, config=CONFIG, scale=scale)
    assert not out.isfinite().any()
    scale[9, 1] = value
    integer_gemv(x.nan_to_num(1.0, 1.0), weight, out, config=CONFIG, scale=scale)
    assert out.isfinite().logical_not().nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("head_size", [4, 64])
@pytest.mark.parametrize("group", [INT8, 32])
@pytest.mark.parametrize("splits", [2, 4])
def test_joins_the_parts_of_an_attention(head_size: int, group: int, splits: int, kernel_device: torch.device) -> None:
    heads = 640 // head_size
    parts = normal(heads, splits, head_size, device=kernel_device)
    largest, totals = (normal(heads, splits, device=kernel_device) for _ in range(2))
    totals = totals.abs() + 0.5
    largest[1, 1] = -math.inf  # a part of the past that holds no token yet
    scratch = torch.cat([parts.flatten(), largest.flatten(), totals.flatten()])
    shares = (largest.double() - largest.double().amax(1, keepdim=True)).exp2()
    joined = (parts * shares[..., None]).sum(1) / (totals * shares).sum(1, keepdim=True)
    weight, scale, wide = make_weight(20, 640, group, kernel_device)
    out = torch.ones(20, device=kernel_device)
    integer_gemv(scratch, weight, out, config=CONFIG, scale=scale, add_to_out=True, splits=splits, head_size=head_size)
    assert relative_error(out, 1 + reference(joined.view(1, -1), wide)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("change", ["weight", "columns", "x", "out", "bias", "scale", "gate", "head_size"])
@pytest.mark.parametrize("group", [INT8, 32])
def test_what_does_not_fit_is_refused(change: str, group: int, kernel_device: torch.device) -> None:
    def zeros(size: int) -> torch.Tensor:
        return torch.zeros(size, device=kernel_device)

    weight, scale, _ = make_weight(16, 96, group, kernel_device)
    if change in ("weight", "columns"):
        weight = weight.short() if change == "weight" else weight[:, :-2].contiguous()
    bias = zeros(15 if change == "bias" else 16)
    with pytest.raises(ValueError, match="expected"):
        integer_gemv(
            zeros(weight.shape[1] * (1 if group == INT8 else 2) - (change == "x")),
            weight,
            zeros(17 if change == "out" else 16),
            config=CONFIG,
            scale=zeros(17) if change == "scale" else scale,
            bias=bias,
            gate=Gate(weight, None, scale) if change == "gate" else None,
            splits=2 if change == "head_size" else 1,
            head_size=6,
        )


def test_default_config_suits_every_size(kernel_device: torch.device) -> None:
    for bits in (4, 8):
        for num_rows, num_columns in ((7, 24), (1600, 6400), (50304, 1024), (6144, 24576)):
            config = default_config(num_rows, num_columns, bits, kernel_device)
            for number in (config.block_n, config.num_warps):
                assert number & (number - 1) == 0 < number
            assert config.num_pieces > 0
