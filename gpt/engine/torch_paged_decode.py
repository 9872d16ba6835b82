"""Attention of one new token per sequence over a cache of blocks on a CPU, which copies as little of it as it can.

Keys are gathered a cacheful at a time, so that a product finds them there; values are never copied: the mean of rows
with weights is what `embedding_bag` computes.  Only scores, a small part of either, are padded to the longest past.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpt.engine.kv_cache import KvCache
from gpt.engine.step import PagedStep

# Keys that are gathered at a time: what the second-level cache of a core holds.
_GATHERED_BYTES = 1 << 21


class PagedDecode:
    """The rows of a step that have a past and one new token; indices for all layers are made once.

    rows: of the step's sequences.  tokens: [B] int64, their tokens among the step's.
    """

    def __init__(self, step: PagedStep, rows: list[int], tokens: torch.Tensor, cache: KvCache, num_heads: int):
        self.tokens = tokens
        num_kv_heads, per_block, head_size = cache.blocks.shape[3:]
        lengths = torch.tensor([step.num_past[row] + 1 for row in rows])
        num_blocks = -(-lengths // per_block)
        table = step.block_table[torch.tensor(rows), : int(num_blocks.max())].long()  # [B, M]
        self._rows, self._places = (torch.arange(table.shape[1]) < num_blocks[:, None]).nonzero(as_tuple=True)
        self._blocks = table[self._rows, self._places]  # [P], the blocks of all sequences
        self._chunk = max(1, _GATHERED_BYTES // (num_kv_heads * per_block * head_size * cache.blocks.itemsize))
        self._num_kv_heads = num_kv_heads
        self._shape = (len(rows), num_heads, table.shape[1], per_block)  # of scores, [B, H, M, tokens_per_block]
        num_slots = table.shape[1] * per_block
        inside = (torch.arange(num_slots) < lengths[:, None])[:, None].expand(-1, num_heads, -1)
        self._outside = ~inside
        self._inside = inside.flatten().nonzero().flatten()
        # Rows of a layer's values seen as [num_blocks * G * tokens_per_block, D], for each query head its own.
        heads = torch.arange(num_heads) * num_kv_heads // num_heads
        first = (table[:, None] * num_kv_heads + heads[:, None]) * per_block  # [B, H, M]
        slots = (first[..., None] + torch.arange(per_block)).flatten()
        self._slots = slots[self._inside]
        counts = lengths.repeat_interleave(num_heads)
        self._offsets = counts.cumsum(0) - counts

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """q [B, H, D], keys and values [num_blocks, G, tokens_per_block, D], all float32 -> [B, H*D]."""
        grouped = (q * scale).unflatten(1, (self._num_kv_heads, -1))  # [B, G, H/G, D]
        scores = q.new_empty(self._shape)
        parts = zip(*(t.split(self._chunk) for t in (self._rows, self._places, self._blocks)), strict=True)
        for rows, places, blocks in parts:
            product = grouped[rows] @ keys.index_select(0, blocks).transpose(-1, -2)  # [P, G, H/G, tokens_per_block]
            scores[rows, :, places] = product.flatten(1, 2)
        scores = scores.flatten(2).masked_fill_(self._outside, -torch.inf)
        weights = scores.softmax(-1).flatten()[self._inside]
        flat = values.view(-1, values.shape[-1])
        return F.embedding_bag(self._slots, flat, self._offsets, mode="sum", per_sample_weights=weights).view(
            len(q), -1
        )
