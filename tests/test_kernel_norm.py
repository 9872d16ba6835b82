"""gpt/kernels/norm.py beside the same written plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.norm import add_norm, embed
from gpt.kernels.product import Norm

WIDTH = 200


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_and_norm(kind: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """A mean far from zero loses what squares minus mean squared would lose."""
    x, bias = 30 + normal(5, WIDTH, device=kernel_device), normal(WIDTH, device=kernel_device, dtype=dtype)
    parts = normal(3, 5, WIDTH, device=kernel_device, dtype=dtype)
    weight, shift = (normal(WIDTH, device=kernel_device, dtype=dtype) for _ in range(2))
    expected = x.double() + parts.double().sum(0) + bias.double()
    out = torch.empty((5, WIDTH), device=kernel_device, dtype=dtype)
    add_norm(x, out, Norm(weight, shift if kind == "layernorm" else None, 1e-5), parts=parts, bias=bias)
    assert relative_error(x, expected) < TOLERANCE[torch.float32]
    if kind == "layernorm":
        normed = F.layer_norm(expected, (WIDTH,), weight.double(), shift.double(), 1e-5)
    else:
        normed = F.rms_norm(expected, (WIDTH,), weight.double(), 1e-5)
    assert relative_error(out, normed) < TOLERANCE[dtype]


def test_norm_alone_leaves_the_stream(kernel_device: torch.device) -> None:
    x, weight = normal(2, WIDTH, device=kernel_device), normal(WIDTH, device=kernel_device)
    before, out = x.clone(), torch.empty((2, WIDTH), device=kernel_device)
    add_norm(x, out, Norm(weight, None, 1e-5))
    assert torch.equal(x, before)
    assert relative_error(out, F.rms_norm(x.double(), (WIDTH,), weight.double(), 1e-5)) < TOLERANCE[torch.float32]


def test_sums_alone(kernel_device: torch.device) -> None:
    x, parts = normal(2, WIDTH, device=kernel_device), normal(1, 2, WIDTH, device=kernel_device)
    expected = x + parts[0]
    add_norm(x, None, None, parts=parts)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_places", [False, True])
def test_embed(dtype: torch.dtype, has_places: bool, kernel_device: torch.device) -> None:
    """Wider than a program's block of 1024; exact, since float32 holds the sum of what is read."""
    width = 1030
    ids, positions = (torch.tensor(pair, device=kernel_device, dtype=torch.int32) for pair in ([3, 1], [4, 0]))
    words, places = (normal(rows, width, device=kernel_device, dtype=dtype) for rows in (9, 7))
    x = torch.empty((2, width), device=kernel_device)
    embed(ids, positions, words, places if has_places else None, x)
    expected = words[ids.long()].float()
    assert torch.equal(x, expected + places[positions.long()].float() if has_places else expected)


@pytest.mark.parametrize("change", ["parts", "bias", "out", "norm"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=kernel_device)

    norm = Norm(zeros(7 if change == "norm" else 8), None, 1e-5)
    out, parts, bias = zeros(2, 9 if change == "out" else 8), zeros(3, 2, 8), zeros(9 if change == "bias" else 8)
    with pytest.raises(ValueError, match="found"):
        add_norm(zeros(2, 8), out, norm, parts=zeros(3, 1, 8) if change == "parts" else parts, bias=bias)


def test_embeddings_that_do_not_fit_are_refused(kernel_device: torch.device) -> None:
    ids = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    x = torch.zeros((2, 8), device=kernel_device)
    with pytest.raises(ValueError, match="found"):
        embed(ids, ids, torch.zeros((5, 9), device=kernel_device), None, x)
    with pytest.raises(ValueError, match="found"):
        embed(ids[:1], ids, torch.zeros((5, 8), device=kernel_device), None, x)
