"""gpt/kernels/int4_gemv.py and int4_skinny.py beside the widened weights' product."""

from __future__ import annotations

import math

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, normal, tiles_of, wait_for

from gpt.kernels.gemv import GemvConfig
from gpt.kernels.int4 import widened
from gpt.kernels.int4_gemv import default_config, int4_gemv
from gpt.kernels.int4_skinny import int4_skinny
from gpt.kernels.product import Gate, Norm, reference
from gpt.kernels.skinny import SkinnyConfig

N, K = 50, 320
CONFIG = GemvConfig(8, 256, 4)


def packed(device: torch.device, group: int, num_columns: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value of a byte, and the value of a step."""
    shape = (N, num_columns // group) if group else (N,)
    weight = torch.randint(0, 256, (N, num_columns // 2), device=device, dtype=torch.uint8)
    return weight, (torch.rand(shape, device=device) * 0.02 + 0.001).half()


def make_gate(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> tuple[Gate, Gate]:
    """A second product, packed and widened."""
    parts = [tensor.flip(0).contiguous() for tensor in (weight, scale, bias)]
    return Gate(parts[0], parts[2], parts[1]), Gate(widened(parts[0], parts[1]), parts[2])


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("kind", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("settled", [False, True])
def test_one_row_with_everything_fused(
    group: int, kind: str, gated: bool, settled: bool, kernel_device: torch.device
) -> None:
    weight, scale = packed(kernel_device, group)
    x, bias = normal(K, device=kernel_device), normal(N, device=kernel_device, dtype=torch.float16)
    norm = None
    if kind != "none":
        shift = normal(K, device=kernel_device) if kind == "layernorm" else None
        norm = Norm(1 + 0.1 * normal(K, device=kernel_device), shift, 1e-5)
    gate, wide_gate = make_gate(weight, scale, bias) if gated else (None, None)
    tiles, num_valid = tiles_of(N, 8, device=kernel_device), N - 3
    out = torch.full((N,), 7.0, device=kernel_device)
    wait_for(kernel_device)
    int4_gemv(
        x,
        weight,
        out,
        config=CONFIG,
        scale=scale,
        bias=bias,
        norm=norm,
        activation="gelu_tanh",
        gate=gate,
        add_to_out=True,
        settled=settled,
        tiles=tiles,
        num_valid=num_valid,
    )
    wide = widened(weight, scale)
    expected = reference(x[None], wide, bias=bias, norm=norm, activation="gelu_tanh", gate=wide_gate)[0] + 7
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    best = tiles[0].argmax()
    assert tiles[1][best] == out[:num_valid].argmax()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_row_of_other_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    weight, scale = packed(kernel_device, 64)
    x, out = normal(K, device=kernel_device, dtype=dtype), torch.empty(N, device=kernel_device, dtype=dtype)
    int4_gemv(x, weight, out, config=CONFIG, scale=scale.to(dtype))
    assert relative_error(out, reference(x[None], widened(weight, scale.to(dtype)))[0]) < TOLERANCE[dtype]


def test_one_row_joins_the_parts_of_an_attention(kernel_device: torch.device) -> None:
    splits, size = 2, 64
    weight, scale = packed(kernel_device, 32)
    parts = normal(K // size, splits, size, device=kernel_device)
    largest = torch.zeros(K // size, splits, device=kernel_device)
    largest[:, 1] = 1.0  # to base 2: the second part counts twice
    totals = torch.full((K // size, splits), 2.0, device=kernel_device)
    out = torch.zeros(N, device=kernel_device)
    scratch = torch.cat([parts.flatten(), largest.flatten(), totals.flatten()])
    int4_gemv(scratch, weight, out, config=CONFIG, scale=scale, add_to_out=True, splits=splits, head_size=size)
    joined = (parts[:, 0] + 2 * parts[:, 1]) / 6
    assert relative_error(out, reference(joined.view(1, -1), widened(weight, scale))[0]) < TOLERANCE[torch.float32]


def test_not_a_number_is_found(kernel_device: torch.device) -> None:
    weight, scale = packed(kernel_device, 64)
    scale[9, 1] = math.nan
    tiles, out = tiles_of(N, 8, device=kernel_device), torch.empty(N, device=kernel_device)
    int4_gemv(normal(K, device=kernel_device), weight, out, config=CONFIG, scale=scale, tiles=tiles, num_valid=N)
    assert out.isnan().nonzero().flatten().tolist() == [9]
    assert tiles[0].isnan().nonzero().flatten().tolist() == [1]
    assert 0 <= int(tiles[1].min()) <= int(tiles[1].max()) < N


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
    with pytest.raises(ValueError, match="expected"):
        int4_gemv(
            zeros(width),
            weight,
            out[:1, 1:] if change == "out" else out[0],
            config=CONFIG,
            scale=scale,
            bias=bias,
            gate=gate,
        )


def test_default_config_suits_every_size(kernel_device: torch.device) -> None:
    for num_rows, num_columns in ((7, 24), (1600, 6400), (50304, 1024)):
        config = default_config(num_rows, num_columns, kernel_device)
        for number in (config.block_n, config.block_k, config.num_warps):
            assert number & (number - 1) == 0 < number
