"""gpt/kernels/skinny.py beside the same written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, int8_weight, normal, tiles_of

from gpt.kernels.launch import INTERPRETED
from gpt.kernels.product import Gate, reference
from gpt.kernels.skinny import SkinnyConfig, default_config, skinny

SHAPE = (50, 160)  # N, K: whole blocks of neither


@pytest.mark.parametrize("num_tokens", [2, 20, 70])
@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_everything_fused(num_tokens: int, weights_first: bool, weights: str, kernel_device: torch.device) -> None:
    num_rows, num_columns = SHAPE
    x = normal(num_tokens, num_columns, device=kernel_device, dtype=torch.float16)
    weight, scale = normal(*SHAPE, device=kernel_device, dtype=torch.float16), None
    if weights == "int8":
        weight, scale = int8_weight(*SHAPE, kernel_device)
    bias = normal(num_rows, device=kernel_device, dtype=torch.float16)
    gate = Gate(weight.flip(0).contiguous(), bias.flip(0).contiguous(), scale)
    tiles, num_valid = tiles_of(num_rows, 32, num_tokens, device=kernel_device), num_rows - 2
    out = torch.empty((num_tokens, num_rows), device=kernel_device)
    config = SkinnyConfig(32, 32, 4, 2, 1, weights_first)
    options = {"bias": bias, "scale": scale, "activation": "silu", "gate": gate}
    skinny(x, weight, out, config=config, tiles=tiles, num_valid=num_valid, **options)
    assert relative_error(out, reference(x, weight, **options)) < TOLERANCE[torch.float32]
    best = tiles[0].argmax(1, keepdim=True)
    assert torch.equal(tiles[1].gather(1, best)[:, 0].long(), out[:, :num_valid].argmax(1))


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("num_columns", [96, 160])
def test_parts_add_up(num_parts: int, weights_first: bool, num_columns: int, kernel_device: torch.device) -> None:
    """With four parts of three or five blocks, the last ones begin behind the end."""
    x = normal(5, num_columns, device=kernel_device, dtype=torch.float16)
    weight, scale = int8_weight(40, num_columns, kernel_device)
    parts = torch.full((num_parts, 5, 40), math.nan, device=kernel_device)
    skinny(x, weight, parts, config=SkinnyConfig(32, 32, 4, 2, num_parts, weights_first), scale=scale)
    assert relative_error(parts.sum(0), reference(x, weight, scale=scale)) < TOLERANCE[torch.float32]


# The interpreter multiplies bfloat16 matrices bit pattern by bit pattern.
@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != torch.bfloat16 or not INTERPRETED])
def test_dtypes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    x, weight = (normal(size, 64, device=kernel_device, dtype=dtype) for size in (3, 50))
    out = torch.empty((3, 50), device=kernel_device, dtype=dtype)
    skinny(x, weight, out, config=SkinnyConfig(32, 32, 4, 2))
    assert relative_error(out, reference(x, weight)) < TOLERANCE[dtype]


def test_not_a_number_is_found_in_its_row_alone(kernel_device: torch.device) -> None:
    """The last tile holds no valid token at all; what comparisons do with NaN, only a GPU shows."""
    x, weight = normal(3, 64, device=kernel_device), normal(40, 64, device=kernel_device)
    x[1, 5] = math.nan
    tiles = tiles_of(40, 32, 3, device=kernel_device)
    out = torch.empty((3, 40), device=kernel_device)
    skinny(x, weight, out, config=SkinnyConfig(32, 32, 4, 2), tiles=tiles, num_valid=20)
    assert tiles[0].isnan().any(1).tolist() == [False, True, False]
    assert 0 <= int(tiles[1].min()) <= int(tiles[1].max()) < 20


@pytest.mark.parametrize("change", ["x", "out", "parts", "bias", "no scale", "strides"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=kernel_device)

    weight, scale = int8_weight(16, 64, kernel_device)
    with pytest.raises(ValueError, match="found"):
        skinny(
            zeros(2, 63 if change == "x" else 64),
            weight.t().contiguous().t() if change == "strides" else weight,
            zeros(2, 2, 16) if change == "parts" else zeros(3 if change == "out" else 2, 16),
            config=SkinnyConfig(32, 32, 4, 2),
            bias=zeros(15 if change == "bias" else 16),
            scale=None if change == "no scale" else scale,
        )


def test_default_config_divides_only_what_is_added_up(kernel_device: torch.device) -> None:
    for shape in ((8, 1024, 4096), (64, 50304, 1024)):
        assert default_config(*shape, kernel_device, splits=False).split_k == 1
    assert default_config(8, 64, 4096, kernel_device, splits=True).split_k > 1


@pytest.mark.parametrize(("num_tokens", "itemsize"), [(8, 2), (64, 1), (64, 2), (64, 4)])
@pytest.mark.parametrize("shape", [(1024, 1024), (1600, 6400), (2304, 2048), (8192, 2048), (50257, 1600)])
def test_default_config_fits_into_shared_memory(
    num_tokens: int, itemsize: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an H100, which has 227 KB and 132 multiprocessors."""
    monkeypatch.setattr("gpt.kernels.skinny.num_multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    config = default_config(num_tokens, *shape, device, splits=True, itemsize=itemsize)
    columns = config.block_n + config.rows_of(num_tokens)
    assert config.num_stages * columns * config.block_k * max(2, itemsize) <= 227 << 10
    assert config.split_k * 2 * config.block_k <= shape[1] + config.block_k
    assert config.weights_first == (num_tokens == 8 or itemsize != 2)


def test_weights_are_asked_for_ahead_where_rows_are_short(kernel_device: torch.device) -> None:
    assert default_config(64, 64, 1024, kernel_device, splits=False).ahead
    assert not default_config(64, 64, 2048, kernel_device, splits=False).ahead
