"""Steps over a paged cache, made by hand."""

from __future__ import annotations

import random

import torch

from gpt.engine.step import PagedStep


class Pages:
    """Blocks handed out in a random order, so that nothing works by their being neighbours.

    tables, filled: per sequence, its blocks and how many of their slots have K and V after the last step.
    """

    def __init__(self, num_blocks: int, per_block: int, device: torch.device | str = "cpu"):
        self.free = random.Random(0).sample(range(num_blocks), num_blocks)
        self.per_block = per_block
        self.device = device
        self.tables: dict[int, list[int]] = {}
        self.filled: dict[int, int] = {}

    def step(self, parts: dict[int, list[int]], wanted: list[int] | None = None) -> PagedStep:
        """New tokens by sequence; logits of each one's last token unless `wanted` says otherwise."""
        past = [self.filled.get(row, 0) for row in parts]
        for row, tokens in parts.items():
            table = self.tables.setdefault(row, [])
            self.filled[row] = self.filled.get(row, 0) + len(tokens)
            while len(table) * self.per_block < self.filled[row]:
                table.append(self.free.pop())
        num_new = [len(tokens) for tokens in parts.values()]
        width = max(len(self.tables[row]) for row in parts)
        tables = [self.tables[row] + [0] * (width - len(self.tables[row])) for row in parts]
        positions = [p for start, count in zip(past, num_new, strict=True) for p in range(start, start + count)]
        last = (torch.tensor(num_new).cumsum(0) - 1).tolist()
        ids = [token for tokens in parts.values() for token in tokens]
        return PagedStep(
            ids=torch.tensor(ids, dtype=torch.int32, device=self.device),
            positions=torch.tensor(positions, dtype=torch.int32, device=self.device),
            wanted=torch.tensor(last if wanted is None else wanted, dtype=torch.int64, device=self.device),
            num_new=tuple(num_new),
            num_past=tuple(past),
            block_table=torch.tensor(tables, dtype=torch.int32, device=self.device),
        )
