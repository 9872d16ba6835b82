"""gpt/kernels/draw.py beside the same written plainly in gpt.runtime.sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_inputs import normal

from gpt.kernels.draw import Filters, draw_tokens
from gpt.kernels.launch import INTERPRETED
from gpt.runtime.sampling import draw, keep_likely
from gpt.runtime.sampling_config import SamplingConfig

# Several blocks of the kernel, and a part of one; on a GPU a real vocabulary.
SIZES = (50, 9000) if INTERPRETED else (50, 9000, 50257)
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.3},
    "top-k": {"top_k": 7},
    "top-k 1 of all": {"top_k": 1},
    "top-p": {"top_p": 0.8},
    "tiny top-p": {"top_p": 1e-9},
    "min-p": {"min_p": 0.1, "temperature": 1.5},
    "all": {"top_k": 40, "top_p": 0.7, "min_p": 0.01, "temperature": 2.0},
}


def tile_maxima(logits: torch.Tensor, width: int = 64) -> torch.Tensor:
    tiles = torch.nn.functional.pad(logits, (0, -logits.shape[1] % width), value=-math.inf)
    return tiles.unflatten(1, (-1, width)).amax(-1)


def differs_by_rounding(scores: torch.Tensor, uniform: torch.Tensor, token: int) -> bool:
    """Whether another order of sums may have found `token`: the mass that is looked for, at 0 the whole of it, lies as
    close to the end of a token's share as sums of float64 are exact."""
    sums = scores.double().softmax(-1).cumsum(-1)
    wanted = (1 - uniform) * sums[-1]
    before = sums[token - 1] if token else sums.new_zeros(())
    return bool(scores[token] > -math.inf and before <= wanted + 1e-12 and sums[token] >= wanted - 1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_those_of_the_plain_form(name: str, tiles: bool, size: int, kernel_device: torch.device) -> None:
    num_steps = 3 if INTERPRETED else 50
    numbers = torch.rand((num_steps, 3), dtype=torch.float64, device=kernel_device)
    numbers[0] = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)  # the ends of the range
    logits = (4 * normal(3, size + 3, device=kernel_device))[:, :size]
    first = torch.tensor([3, 0, 90], dtype=torch.int32, device=kernel_device)
    filters = Filters(**FILTERS[name])
    # One token of all is greedy decoding, which has no settings of a draw.
    config = SamplingConfig(**{"top_k": 0, **FILTERS[name]}) if filters.top_k != 1 else None
    # In the interpreter, where each row takes its time, the rows are at steps of their own.
    for steps in [torch.tensor([0, 2, 0])] if INTERPRETED else torch.arange(num_steps)[:, None].expand(-1, 3):
        positions = first + steps.to(first)
        best, token = draw_tokens(logits, filters, numbers, positions, first, tile_maxima(logits) if tiles else None)
        assert torch.equal(best[:, 0], logits.amax(-1))
        drawn = numbers[steps, torch.arange(3)]
        scores = logits if config is None else keep_likely(logits, config)
        expected = logits.argmax(-1) if config is None else draw(scores, drawn)
        for row in (token[:, 0] != expected).nonzero()[:, 0].tolist():
            assert config is not None, "the largest is no matter of rounding"
            assert differs_by_rounding(scores[row], drawn[row], int(token[row]))


def test_equal_logits_stay_together(kernel_device: torch.device) -> None:
    """Both of the second largest, as with transformers; also where tiles hold more than one of them."""
    logits = torch.tensor([[0.0, 2.0, -math.inf, 2.0, 5.0, -1.0]], device=kernel_device)
    zero = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    drawn = set()
    for number in torch.linspace(0, 0.999, 12).tolist():
        uniforms = torch.full((1, 1), number, dtype=torch.float64, device=kernel_device)
        filters = Filters(top_k=2, temperature=4.0)
        drawn |= {int(draw_tokens(logits, filters, uniforms, zero, zero, tile_maxima(logits, 2))[1])}
    assert drawn == {1, 3, 4}


def test_logits_that_are_no_numbers_give_some_token(kernel_device: torch.device) -> None:
    logits = normal(2, 60, device=kernel_device)
    logits[1, 5] = math.nan
    zeros = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    uniforms = torch.full((1, 2), 0.4, dtype=torch.float64, device=kernel_device)
    for tiles in (None, tile_maxima(logits)):
        for filters in (Filters(top_k=3), Filters(top_p=0.5)):
            best, token = draw_tokens(logits, filters, uniforms, zeros, zeros, tiles)
            assert best.isnan().flatten().tolist() == [False, True]
            assert 0 <= int(token.min()) <= int(token.max()) < 60
