"""A contiguous cache after changes of rows: as if every row were copied whole, with a small part of the copying."""

from __future__ import annotations

import torch

from gpt.runtime.shared_beginnings import SharedBeginnings, copy_rows

ROOM = 40


def test_rows_are_as_if_copied_whole() -> None:
    """Random changes, cycles and new numbers of rows among them; each step's values are its own."""
    generator = torch.Generator().manual_seed(0)

    def pick(count: int, below: int) -> list[int]:
        return torch.randint(below, (count,), generator=generator).tolist()

    for _ in range(30):
        lengths = [1 + length for length in pick(3, 8)]
        blocks = torch.randn(2, 2, 7, 1, ROOM, 3, generator=generator)
        expected = [blocks[:, :, row, :, :length].clone() for row, length in enumerate(lengths)]
        beginnings = SharedBeginnings(lengths)
        for num_rows in [7, 7, 7, 4, 7, 7, 7]:
            sources = pick(num_rows, len(expected))
            copy_rows(blocks, beginnings.reorder(sources))
            expected = [expected[source] for source in sources]
            for row, whole in enumerate(expected):
                length = whole.shape[3]
                assert torch.equal(blocks[:, :, row, :, :length], whole)
                blocks[:, :, row, :, length] = torch.randn(2, 2, 1, 3, generator=generator)
                expected[row] = blocks[:, :, row, :, : length + 1].clone()
            beginnings.grow()


def test_only_what_differs_is_copied() -> None:
    beginnings = SharedBeginnings([100, 50])
    moves = beginnings.reorder([0, 0, 1, 1])
    assert [(move.source, move.target, move.start, move.end) for move in moves] == [
        (1, 3, 0, 50),
        (1, 2, 0, 50),
        (0, 1, 0, 100),
    ]
    beginnings.grow()
    beginnings.grow()
    moves = beginnings.reorder([1, 0, 2, 2])  # the first two change places
    assert [(move.source, move.target, move.start, move.end) for move in moves] == [
        (2, 3, 50, 52),
        (0, 1, 100, 102),
        (1, 0, 100, 102),
    ]
    beginnings.grow()
    assert [move.start for move in beginnings.reorder([0, 1, 3, 2])] == [52, 52]
    assert beginnings.reorder([0, 1, 2, 3]) == []
