"""Attention over a cache of blocks by PyTorch: sequences of any lengths in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from gpt.engine.attention_math import Attend
from gpt.engine.kv_cache import KEYS, VALUES, KvCache
from gpt.engine.step import PagedStep
from gpt.engine.torch_paged_decode import PagedDecode

# What one more call costs, in cached tokens that could be read meanwhile (measured on a CPU, 4 heads of 64).
_CALL_COSTS_TOKENS = 512


@dataclass(frozen=True)
class _Group:
    """Sequences with a past that attend in one call, S new tokens each, over the same number M of gathered blocks.

    tokens: [B*S] int64, their tokens among the step's, None for all of them in order.  blocks: [2*B*G*M] int64, rows
    of a layer's cache seen as [2 * num_blocks * G, tokens_per_block * D].  mask: [B, 1, S, M*tokens_per_block] bool.
    """

    size: int
    num_new: int
    tokens: torch.Tensor | None
    blocks: torch.Tensor
    mask: torch.Tensor


class PagedAttention:
    """Writes the step's K and V into their blocks and attends: one call per layer after `begin`, which makes all
    indices once for all layers."""

    def __init__(self, num_heads: int, num_kv_heads: int, attend: Attend):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.attend = attend
        self.cache: KvCache
        self._slots = torch.empty(0)
        self._prompts: list[slice] = []
        self._groups: list[_Group] = []
        self._decode: PagedDecode | None = None

    def begin(self, step: PagedStep, cache: KvCache) -> None:
        self.cache = cache
        self._slots = self._slots_of(step)
        starts = [0, *accumulate(step.num_new)]
        with_past = [row for row, past in enumerate(step.num_past) if past > 0]
        self._prompts = [slice(starts[row], starts[row + 1]) for row, past in enumerate(step.num_past) if past == 0]
        self._decode = None
        if cache.blocks.dtype == torch.float32 and cache.blocks.device.type == "cpu":
            single = [row for row in with_past if step.num_new[row] == 1]
            with_past = [row for row in with_past if step.num_new[row] > 1]
            if single:
                tokens = torch.tensor([starts[row] for row in single])
                self._decode = PagedDecode(step, single, tokens, cache, self.num_heads)
        self._groups = [
            self._make_group(step, starts, rows)
            for num_new in sorted({step.num_new[row] for row in with_past})
            for rows in _similar_lengths([row for row in with_past if step.num_new[row] == num_new], step)
        ]

    def _slots_of(self, step: PagedStep) -> torch.Tensor:
        """Where each token's K and V go: [N * 2 * G] rows of a layer's cache seen as [2*num_blocks*G*per_block, D]."""
        cache, device = self.cache, step.ids.device
        counts = torch.tensor(step.num_new, device=device)
        rows = torch.arange(len(step.num_new), device=device).repeat_interleave(counts)
        positions = step.positions.long()
        block = step.block_table[rows, positions // cache.tokens_per_block].long()  # [N]
        heads = self._heads(block)  # [N, 2, G]
        slots = heads * cache.tokens_per_block + (positions % cache.tokens_per_block)[:, None, None]
        return slots.flatten()

    def _heads(self, block: torch.Tensor) -> torch.Tensor:
        """Blocks [...] -> rows [..., 2, G] of a layer's cache seen as [2 * num_blocks * G, tokens_per_block * D]."""
        sides = torch.arange(2, device=block.device)[:, None] * self.cache.num_blocks
        heads = torch.arange(self.num_kv_heads, device=block.device)
        return (sides + block[..., None, None]) * self.num_kv_heads + heads

    def _make_group(self, step: PagedStep, starts: Sequence[int], rows: Sequence[int]) -> _Group:
        device, per_block = step.ids.device, self.cache.tokens_per_block
        num_new = step.num_new[rows[0]]
        longest = max(step.num_past[row] for row in rows) + num_new
        num_blocks = -(-longest // per_block)
        picked = torch.tensor(rows, device=device)
        blocks = self._heads(step.block_table[picked, :num_blocks].long())  # [B, M, 2, G]
        first = torch.tensor([starts[row] for row in rows], device=device)
        tokens = (first[:, None] + torch.arange(num_new, device=device)).flatten()  # [B*S]
        positions = step.positions[tokens].view(len(rows), 1, num_new, 1)
        mask = torch.arange(num_blocks * per_block, device=device) <= positions  # [B, 1, S, T]
        everything = list(rows) == list(range(len(step.num_new)))
        return _Group(len(rows), num_new, None if everything else tokens, blocks.permute(2, 0, 3, 1).flatten(), mask)

    def __call__(self, heads: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """heads [N, H + 2G, D], queries first -> [N, H*D]."""
        blocks = self.cache.blocks[layer]  # [2, num_blocks, G, tokens_per_block, D]
        new = heads[:, self.num_heads :].unflatten(1, (2, self.num_kv_heads))  # [N, 2, G, D]
        slots, new = blocks.view(-1, blocks.shape[-1]), self.cache.encode(new, layer).flatten(0, 2)
        if self.cache.scales is not None:
            slots, new = slots.view(torch.uint8), new.view(torch.uint8)  # PyTorch does not copy FP8 everywhere
        slots.index_copy_(0, self._slots, new)
        if len(self._groups) == 1 and self._groups[0].tokens is None:
            return self._attend_to_past(self._groups[0], heads, blocks, layer, scale)
        result = heads.new_empty(heads.shape[0], self.num_heads * heads.shape[2])
        for part in self._prompts:
            q, k, v = heads[part].transpose(0, 1)[None].split([self.num_heads, *[self.num_kv_heads] * 2], dim=1)
            result[part] = self.attend(q, k, v, scale, None, causal=True)[0].transpose(0, 1).flatten(1)
        if self._decode is not None:
            q = heads[self._decode.tokens, : self.num_heads]
            result[self._decode.tokens] = self._decode(q, blocks[0], blocks[1], scale)
        for group in self._groups:
            result[group.tokens] = self._attend_to_past(group, heads[group.tokens], blocks, layer, scale)
        return result

    def _attend_to_past(
        self, group: _Group, heads: torch.Tensor, blocks: torch.Tensor, layer: int, scale: float
    ) -> torch.Tensor:
        """heads [B*S, H + 2G, D], blocks [2, num_blocks, G, tokens_per_block, D] -> [B*S, H*D]."""
        head_size = blocks.shape[-1]
        q = heads[:, : self.num_heads].view(group.size, group.num_new, self.num_heads, head_size).transpose(1, 2)
        past = blocks.view(-1, blocks.shape[-2] * head_size).index_select(0, group.blocks)
        k, v = past.view(2, group.size, self.num_kv_heads, -1, head_size)  # [B, G, M*tokens_per_block, D]
        k, v = self.cache.decode(k, layer, KEYS), self.cache.decode(v, layer, VALUES)
        return self.attend(q, k, v, scale, group.mask, causal=False).transpose(1, 2).flatten(0, 1).flatten(1)


def _similar_lengths(rows: Sequence[int], step: PagedStep) -> list[list[int]]:
    """Divides rows into groups, each padded to its longest past: another group is opened where padding what is left
    would cost more than its call.  The order of a group is that of the step."""
    groups: list[list[int]] = []
    ordered = sorted(rows, key=lambda row: -step.num_past[row])
    longest = 0
    for index, row in enumerate(ordered):
        saved = (longest - step.num_past[row]) * (len(ordered) - index)
        if not groups or saved > _CALL_COSTS_TOKENS:
            groups.append([])
            longest = step.num_past[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]
