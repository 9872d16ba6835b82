"""Which tokens the rows of a batch have in common, and with it what a change of rows must copy in a contiguous cache.

Beams of one prompt differ in their last few tokens only.  When row i goes on as row j, the slots up to where the two
parted hold the same keys and values already: only those behind are copied.  Where rows parted is known on the host,
since it follows from the changes themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Move:
    """Slots `start` to `end` of row `source` go to row `target`."""

    source: int
    target: int
    start: int
    end: int


class SharedBeginnings:
    """lengths: tokens that each row has in the cache, nothing in common."""

    def __init__(self, lengths: Sequence[int]):
        # [rows, rows] tokens in common; a row has all of its own.
        self._common = np.diag(np.asarray(lengths, dtype=np.int64))

    def grow(self) -> None:
        """Each row got another token of its own."""
        np.fill_diagonal(self._common, self._common.diagonal() + 1)

    def reorder(self, sources: Sequence[int]) -> list[Move]:
        """Row i goes on as row sources[i], with as many rows as `sources` has: what must be copied, last row first."""
        lengths, num_rows = self._common.diagonal(), len(self._common)
        moves = []
        for target in reversed(range(len(sources))):
            source = sources[target]
            start = int(self._common[target, source]) if target < num_rows else 0
            if start < lengths[source]:
                moves.append(Move(source, target, start, int(lengths[source])))
        self._common = self._common[np.ix_(sources, sources)]
        return moves


def copy_rows(blocks: torch.Tensor, moves: Sequence[Move]) -> None:
    """Carries `moves` out in a cache [L, 2, rows, G, T, D], as if all at once."""
    targets = {move.target for move in moves}
    # The rows are written from the last to the first: a source behind its target has been overwritten by then.
    saved = {
        move.target: blocks[:, :, move.source, :, move.start : move.end].clone()
        for move in moves
        if move.source > move.target and move.source in targets
    }
    for move in moves:
        part = saved.get(move.target)
        if part is None:
            part = blocks[:, :, move.source, :, move.start : move.end]
        blocks[:, :, move.target, :, move.start : move.end] = part
