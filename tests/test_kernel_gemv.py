"""gpt/kernels/gemv.py beside the same written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, int8_weight, normal, tiles_of, wait_for

from gpt.kernels.gemv import GemvConfig, config_for_parts, default_config, gemv
from gpt.kernels.product import ACTIVATION_FUNCTIONS, Gate, Norm, reference

# Neither whole blocks of rows nor of columns; with several blocks of columns, and in several stretches of them.
SHAPES = [(50, 96), (33, 160), (20, 600)]
CONFIG = GemvConfig(8, 64, 4)


def make_norm(kind: str, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Norm | None:
    if kind == "none":
        return None
    bias = normal(width, device=device).to(dtype) if kind == "layernorm" else None
    return Norm((1 + 0.1 * normal(width, device=device)).to(dtype), bias, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weights", ["float16", "int8"])
@pytest.mark.parametrize("settled", [False, True])
def test_everything_fused(
    shape: tuple[int, int], kind: str, gated: bool, weights: str, settled: bool, kernel_device: torch.device
) -> None:
    num_rows, num_columns = shape
    x = normal(num_columns, device=kernel_device)
    weight, scale = normal(*shape, device=kernel_device, dtype=torch.float16), None
    if weights == "int8":
        weight, scale = int8_weight(*shape, kernel_device)
    bias = normal(num_rows, device=kernel_device, dtype=torch.float16)
    norm = make_norm(kind, num_columns, kernel_device, torch.float16 if weights == "float16" else torch.float32)
    gate = Gate(weight.flip(0).contiguous(), bias.flip(0).contiguous(), scale) if gated else None
    options = {"bias": bias, "scale": scale, "norm": norm, "activation": "gelu_tanh", "gate": gate}
    out = torch.full((num_rows,), 7.0, device=kernel_device)
    tiles, num_valid = tiles_of(num_rows, 8, device=kernel_device), num_rows - 3
    wait_for(kernel_device)
    gemv(x, weight, out, config=CONFIG, add_to_out=True, settled=settled, tiles=tiles, num_valid=num_valid, **options)
    expected = reference(x[None], weight, **options)[0] + 7
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    best = tiles[0].argmax()
    assert tiles[1][best] == out[:num_valid].argmax()
    assert tiles[0][best] == out[:num_valid].max()


@pytest.mark.parametrize("block_n", [1, 4, 16, 32, 64])
@pytest.mark.parametrize(("block_k", "num_warps"), [(256, 1), (1024, 1), (1024, 4), (2048, 4), (512, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_way_to_add_up(
    block_n: int, block_k: int, num_warps: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    """Rows exchanged among a warp's threads, as many as these have columns and more; threads without a column of every
    row; threads whose registers are full."""
    x, weight = normal(1000, device=kernel_device), normal(70, 1000, device=kernel_device, dtype=dtype)
    gate = Gate(normal(70, 1000, device=kernel_device, dtype=dtype))
    out = torch.full((70,), math.nan, device=kernel_device)
    gemv(x, weight, out, config=GemvConfig(block_n, block_k, num_warps), gate=gate)
    assert relative_error(out, reference(x[None], weight, gate=gate)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    weight = normal(50, 160, device=kernel_device, dtype=dtype)
    x, out = normal(160, device=kernel_device, dtype=dtype), torch.empty(50, device=kernel_device, dtype=dtype)
    gemv(x, weight, out, config=CONFIG)
    assert relative_error(out, reference(x[None], weight)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_activations(activation: str, kernel_device: torch.device) -> None:
    x, weight = normal(64, device=kernel_device), normal(16, 64, device=kernel_device) / 4
    out = torch.empty(16, device=kernel_device)
    gemv(x, weight, out, config=CONFIG, activation=activation)
    assert relative_error(out, reference(x[None], weight, activation=activation)[0]) < TOLERANCE[torch.float32]


def test_joins_the_parts_of_an_attention(kernel_device: torch.device) -> None:
    heads, splits, size = 3, 4, 32
    parts = normal(heads, splits, size, device=kernel_device)
    largest, totals = normal(heads, splits, device=kernel_device), torch.rand(heads, splits, device=kernel_device) + 0.5
    largest[1, 2] = -math.inf  # a part of the past that holds no token yet
    scratch = torch.cat([parts.flatten(), largest.flatten(), totals.flatten()])
    shares = (largest.double() - largest.double().amax(1, keepdim=True)).exp2()
    joined = (parts * shares[..., None]).sum(1) / (totals * shares).sum(1, keepdim=True)
    weight = normal(20, heads * size, device=kernel_device)
    out = torch.ones(20, device=kernel_device)
    gemv(scratch, weight, out, config=CONFIG, add_to_out=True, splits=splits, head_size=size)
    assert relative_error(out, 1 + reference(joined.view(1, -1), weight)[0]) < TOLERANCE[torch.float32]


def test_not_a_number_is_found_and_its_token_is_one(kernel_device: torch.device) -> None:
    """The last tile holds no valid token at all; what comparisons do with NaN, only a GPU shows."""
    weight = normal(30, 64, device=kernel_device)
    weight[9, 3] = math.nan
    tiles = tiles_of(30, 8, device=kernel_device)
    out = torch.empty(30, device=kernel_device)
    gemv(normal(64, device=kernel_device), weight, out, config=CONFIG, tiles=tiles, num_valid=20)
    assert tiles[0].isnan().tolist() == [False, True, False, False]
    assert 0 <= int(tiles[1].min()) <= int(tiles[1].max()) < 20


@pytest.mark.parametrize("change", ["x", "out", "bias", "no scale", "scale", "strides"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(size: int) -> torch.Tensor:
        return torch.zeros(size, device=kernel_device)

    weight, scale = int8_weight(16, 64, kernel_device)
    with pytest.raises(ValueError, match="found"):
        gemv(
            zeros(63 if change == "x" else 64),
            weight.t().contiguous().t() if change == "strides" else weight,
            zeros(17 if change == "out" else 16),
            config=CONFIG,
            bias=zeros(15 if change == "bias" else 16),
            scale=None if change == "no scale" else zeros(8) if change == "scale" else scale,
        )


def test_default_config_suits_every_size(kernel_device: torch.device) -> None:
    for num_rows, num_columns in ((7, 24), (1600, 6400), (50304, 1024)):
        config = default_config(num_rows, num_columns, kernel_device)
        for number in (config.block_n, config.block_k, config.num_warps):
            assert number & (number - 1) == 0 < number


@pytest.mark.parametrize("splits", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1024, 1024), (1600, 1600), (6144, 3072)], ids=str)
def test_parts_fit_the_registers(shape: tuple[int, int], splits: int, kernel_device: torch.device) -> None:
    """A thread holds its share of a block of every part at once."""
    config = config_for_parts(default_config(*shape, kernel_device), splits, 128)
    assert config.block_k % 128 == 0
    assert config.block_k * splits / (32 * config.num_warps) <= 128
