"""gpt/kernels/choose.py: the chosen tokens and what a decode step leaves behind."""

from __future__ import annotations

import math

import torch

from gpt.kernels.choose import choose_greedy


def choose(
    tile_max: list[list[float]], tile_argmax: list[list[int]], device: torch.device
) -> tuple[list[int], list[int], list[int], list[float]]:
    """Ids and positions after a step of two sequences, of which the first generated 4 tokens and the second none."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    ids, positions, first = ints(0, 0), ints(9, 3), ints(5, 3)
    tokens = torch.full((6, 2, 2), -1, dtype=torch.int32, device=device)
    tiles = torch.tensor(tile_max, device=device), torch.tensor(tile_argmax, dtype=torch.int32, device=device)
    choose_greedy(tiles, ids, positions, first, tokens)
    chosen = torch.stack([tokens[4, :, 0], tokens[0, :, 1]])
    tokens[4, :, 0] = tokens[0, :, 1] = -1
    assert (tokens == -1).all()
    return ids.tolist(), positions.tolist(), chosen[:, 0].tolist(), chosen[:, 1].view(torch.float32).tolist()


def test_the_largest_and_the_first_of_equals(kernel_device: torch.device) -> None:
    maxima = [[1.0, 3.0, 3.0], [-2.0, -1.5, -1.75]]
    ids, positions, tokens, logits = choose(maxima, [[5, 9, 12], [1, 7, 8]], kernel_device)
    assert (ids, positions, tokens, logits) == ([9, 7], [10, 4], [9, 7], [3.0, -1.5])


def test_not_a_number_is_told_and_its_token_is_one(kernel_device: torch.device) -> None:
    maxima = [[1.0, 2.0, 0.0], [2.0, math.nan, 1.0]]
    ids, _, tokens, logits = choose(maxima, [[5, 9, 12], [1, 7, 8]], kernel_device)
    assert logits[0] == 2.0
    assert math.isnan(logits[1])
    assert ids[0] == 9
    assert ids[1] in (1, 7, 8)
    assert tokens == ids


def test_nothing_but_not_numbers(kernel_device: torch.device) -> None:
    ids, _, _, logits = choose([[math.nan] * 3] * 2, [[5, 9, 12], [1, 7, 8]], kernel_device)
    assert ids[0] in (5, 9, 12)
    assert ids[1] in (1, 7, 8)
    assert all(math.isnan(logit) for logit in logits)


def test_minus_infinity_everywhere(kernel_device: torch.device) -> None:
    ids, _, _, logits = choose([[-math.inf] * 3] * 2, [[5, 9, 12], [1, 7, 8]], kernel_device)
    assert ids == [5, 1]
    assert logits == [-math.inf] * 2
