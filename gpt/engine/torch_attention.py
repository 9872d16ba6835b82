"""Attention over the cache by PyTorch, for each kind of step."""

from __future__ import annotations

import torch

from gpt.engine.attention_math import fused_attention, plain_attention
from gpt.engine.kv_cache import KEYS, VALUES, KvCache
from gpt.engine.step import ContextStep, GenerationStep, PagedStep, Step
from gpt.engine.torch_paged_attention import PagedAttention


class TorchAttention:
    """Writes the step's K and V into the cache and attends: one call per layer after `begin`.

    fused: scaled_dot_product_attention, else scores and softmax written out in float32.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, *, fused: bool):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.attend = fused_attention if fused else plain_attention
        self.paged = PagedAttention(num_heads, num_kv_heads, self.attend)
        self.step: Step
        self.cache: KvCache
        self._mask: torch.Tensor | None = None
        self._keys: tuple[torch.Tensor, ...] = ()
        self._values: tuple[torch.Tensor, ...] = ()
        self._slots: tuple[torch.Tensor, ...] = ()
        self._batch_rows = torch.empty(0)

    def begin(self, step: Step, cache: KvCache) -> None:
        self.step = step
        self.cache = cache
        self._mask = None
        if isinstance(step, GenerationStep):
            self._begin_generation(step, cache.blocks)
        elif isinstance(step, PagedStep):
            self.paged.begin(step, cache)

    def _begin_generation(self, step: GenerationStep, blocks: torch.Tensor) -> None:
        """Cuts the cache for all layers at once: layer by layer these small calls would cost a tenth of a step."""
        batch_size = step.ids.shape[0]
        filled = blocks[:, :, :batch_size, :, : step.max_position + 1]  # [L, 2, B, G, T, D]
        self._keys, self._values = (part.unbind(0) for part in filled.unbind(1))
        if step.uniform:
            self._slots = filled[:, :, :, :, -1].unbind(0)  # L times [2, B, G, D]
        else:
            slots = torch.arange(step.max_position + 1, device=step.positions.device)
            self._mask = (slots <= step.positions[:, None])[:, None, None, :]  # [B, 1, 1, T]
            self._batch_rows = torch.arange(batch_size, device=step.positions.device)

    def __call__(self, heads: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """heads [N, H + 2G, D], queries first -> [N, H*D]."""
        if isinstance(self.step, GenerationStep):
            return self._generation(self.step, heads, layer, scale)
        if isinstance(self.step, PagedStep):
            return self.paged(heads, layer, scale)
        self._keep(self.step, heads, layer)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return self._context(self.step, q, k, v, scale)

    def _keep(self, step: ContextStep, heads: torch.Tensor, layer: int) -> None:
        """Writes the prompts' K and V into the cache."""
        cache = self.cache.blocks[layer]
        new = heads[:, self.num_heads :].unflatten(1, (2, self.num_kv_heads))  # [N, 2, G, D]
        new = self.cache.encode(new, layer).transpose(0, 1)
        if step.padded:
            batch_size = len(step.lengths)
            rows = new.unflatten(1, (batch_size, -1)).transpose(2, 3)  # [2, B, G, S, D]
            cache[:, :batch_size, :, : rows.shape[3]] = rows
            return
        for row, part in enumerate(new.split(step.lengths, dim=1)):
            cache[:, row, :, : part.shape[1]] = part.transpose(1, 2)

    def _context(
        self, step: ContextStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Prompts attend to themselves, unquantised; the cache is not read.  q [N, H, D], k and v [N, G, D] ->
        [N, H*D]."""
        if step.padded:
            q, k, v = (t.unflatten(0, (len(step.lengths), -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, S, D]
            return self._rows(q, k, v, scale)
        outputs = []
        for part in zip(*(t.split(step.lengths) for t in (q, k, v)), strict=True):
            q_row, k_row, v_row = (t.transpose(0, 1)[None] for t in part)  # [1, heads, P, D]
            outputs.append(self.attend(q_row, k_row, v_row, scale, None, causal=True)[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def _rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Prompts of one length: q [B, H, S, D], k and v [B, G, S, D] -> [B*S, H*D]."""
        return self.attend(q, k, v, scale, None, causal=True).transpose(1, 2).flatten(2).flatten(0, 1)

    def _generation(self, step: GenerationStep, heads: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        """One token per sequence attends to its cache, itself included: heads [B, H + 2G, D] -> [B, H*D]."""
        q = heads[:, : self.num_heads].unsqueeze(2)  # [B, H, 1, D]
        new = heads[:, self.num_heads :].view(len(heads), 2, self.num_kv_heads, -1)  # [B, 2, G, D]
        new = self.cache.encode(new, layer)
        if step.uniform:
            self._slots[layer].copy_(new.transpose(0, 1))
        else:
            self.cache.blocks[layer][:, self._batch_rows, :, step.positions] = new
        keys = self.cache.decode(self._keys[layer], layer, KEYS)
        values = self.cache.decode(self._values[layer], layer, VALUES)
        return self.attend(q, keys, values, scale, self._mask, causal=False).flatten(1)
