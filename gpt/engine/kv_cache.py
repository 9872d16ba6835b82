"""Where the keys and values of past tokens are kept, and in which numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.mapping import Mapping


@dataclass(frozen=True)
class KvCache:
    """K and V of every layer of one rank, in blocks of `tokens_per_block` slots.

    blocks: [L, 2, num_blocks, G/R, tokens_per_block, D], K before V, in the engine's dtype.  A contiguous cache is one
    block per sequence, as long as the longest.
    """

    blocks: torch.Tensor

    @classmethod
    def empty(
        cls,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        device: torch.device,
        *,
        num_blocks: int,
        tokens_per_block: int,
    ) -> KvCache:
        """Zeros, since a slot that is masked out still takes part in a product with weight zero."""
        heads = mapping.local_kv_heads(model)
        shape = (model.n_layer, 2, num_blocks, heads, tokens_per_block, model.head_size)
        return cls(torch.zeros(shape, dtype=torch_dtype(build.dtype), device=device))

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[2]

    @property
    def tokens_per_block(self) -> int:
        return self.blocks.shape[4]
