"""Attention of prompts on a GPU, over a cache of either kind: two launches per layer whatever their lengths, one where
the product before has put K and V into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from gpt.engine.attention_math import fused_attention
from gpt.engine.host_lists import on_device
from gpt.engine.kv_cache import KvCache
from gpt.engine.step import ContextStep, PagedStep, Step
from gpt.engine.torch_attention import TorchAttention
from gpt.kernels.paged_attention import PagedAttentionConfig, default_config, paged_attention, query_tiles
from gpt.kernels.store_cache import CacheSlots, store_cache


@dataclass(frozen=True)
class _Plan:
    """What `paged_attention` takes besides values, the same in all layers."""

    tiles: torch.Tensor
    sequences: torch.Tensor
    table: torch.Tensor
    config: PagedAttentionConfig


class PromptAttention(TorchAttention):
    """TorchAttention that writes K and V by one kernel per layer and attends to sequences of several lengths by
    another.  Prompts of one length, and without `fused` all prompts over a contiguous cache, attend by PyTorch.

    A product may write K and V itself: to `slots`, before `attend_to_stored`.
    """

    _places: torch.Tensor | None

    def begin(self, step: Step, cache: KvCache) -> None:
        self._plan: _Plan | None = None
        self._places = None
        if isinstance(step, PagedStep):
            self.step, self.cache = step, cache
            self._plan = self._make_plan(step.num_new, step.num_past, step.block_table)
            self._places = self._places_of(self._plan, step.positions)
            return
        super().begin(step, cache)
        if not isinstance(step, ContextStep):
            return
        device, batch_size = cache.blocks.device, len(step.lengths)
        rows = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None]
        if step.padded:
            slots = torch.arange(len(step.ids) // batch_size, dtype=torch.int32, device=device)
            self._places = (rows * cache.tokens_per_block + slots).flatten()
            return
        plan = self._make_plan(step.lengths, [0] * batch_size, rows)
        self._places = self._places_of(plan, step.positions)
        if self.attend is fused_attention:
            self._plan = plan

    def _make_plan(self, num_new: Sequence[int], num_past: Sequence[int], table: torch.Tensor) -> _Plan:
        blocks = self.cache.blocks
        config = default_config(blocks.shape[-1], 4 if self.cache.dtype == torch.float32 else 2)
        tiles = query_tiles(num_new, num_past, self.num_heads // self.num_kv_heads, config.block_m)
        starts = accumulate(num_new[:-1], initial=0)
        sequences = list(zip(starts, num_new, num_past, strict=True))
        return _Plan(on_device(tiles, blocks.device), on_device(sequences, blocks.device), table, config)

    def _places_of(self, plan: _Plan, positions: torch.Tensor) -> torch.Tensor:
        """[N] int32: block * tokens_per_block + slot of each token."""
        per_block = self.cache.tokens_per_block
        rows = torch.arange(len(plan.table), device=positions.device)
        rows = rows.repeat_interleave(plan.sequences[:, 1], output_size=len(positions))  # a size that is known: no wait
        return plan.table[rows, positions // per_block] * per_block + positions % per_block

    def slots(self, layer: int) -> CacheSlots | None:
        """Where this step's K and V of a layer go; None for a step of one token per sequence."""
        if self._places is None:
            return None
        scales = self.cache.scales
        return CacheSlots(self._places, self.cache.blocks[layer], None if scales is None else scales[layer])

    @property
    def reads_stored(self) -> bool:
        """Whether K and V of this step's tokens are read from the cache once they are there, and so nowhere else."""
        padded = isinstance(self.step, ContextStep) and self.step.padded
        return self.cache.scales is None and (self._plan is not None or padded)

    def __call__(self, heads: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        slots = self.slots(layer)
        if slots is None:
            return super().__call__(heads, layer, scale)
        store_cache(heads, slots)
        return self.attend_to_stored(heads, layer, scale)

    def attend_to_stored(self, heads: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """What `__call__` gives, of K and V that are in the cache: heads [N, H + 2G, D], or with `reads_stored` queries
        alone [N, H, D]."""
        plan = self._plan
        keys, values = self.cache.blocks[layer]
        if plan is None:
            return self._whole_prompts(heads, keys, values, scale)
        out = heads.new_empty((len(heads), self.num_heads, heads.shape[2]))
        paged_attention(
            heads,
            plan.tiles,
            plan.sequences,
            plan.table,
            keys,
            values,
            out,
            scale=scale,
            config=plan.config,
            kv_scale=None if self.cache.scales is None else self.cache.scales[layer],
        )
        return out.flatten(1)

    def _whole_prompts(
        self, heads: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention by PyTorch, over the cache only where `heads` has no K and V."""
        step = self.step
        if not isinstance(step, ContextStep):
            raise TypeError(f"{type(step).__name__} is no step of whole prompts")
        if heads.shape[1] > self.num_heads:
            q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
            return self._context(step, q, k, v, scale)
        batch_size = len(step.lengths)
        q = heads.unflatten(0, (batch_size, -1)).transpose(1, 2)  # [B, H, S, D]
        k, v = (part[:batch_size, :, : q.shape[2]] for part in (keys, values))  # [B, G, S, D]
        return self._rows(q, k, v, scale)
