"""Where the keys and values of past tokens are kept, and in which numbers."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine.attention_math import attention_dtype
from gpt.mapping import Mapping
from gpt.quant import to_fp8, to_int8

KEYS, VALUES = 0, 1

# On a GPU slots of the cache and rows of a batch are rounded up, so that requests of about the same size share a graph.
_SLOTS = 128
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


def cache_slots(max_seq_len: int) -> int:
    """Slots of a GPU's cache for sequences of so many tokens."""
    return -(-max_seq_len // _SLOTS) * _SLOTS


def batch_bucket(batch_size: int) -> int:
    """The number of rows a batch is padded to on a GPU."""
    for size in _BATCH_BUCKETS:
        if batch_size <= size:
            return size
    return -(-batch_size // 64) * 64


@dataclass(frozen=True)
class KvCache:
    """K and V of every layer of one rank, in blocks of `tokens_per_block` slots.

    blocks: [L, 2, num_blocks, G/R, tokens_per_block, D], K before V, in the engine's dtype, int8 or float8_e4m3fn.  A
    contiguous cache is one block per sequence, as long as the longest.

    scales: float32 [L, 2], the value of one step of K and V in a quantised cache.  dtype: what `decode` makes of its
    values.
    """

    blocks: torch.Tensor
    scales: torch.Tensor | None = None
    dtype: torch.dtype | None = None

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
        scales: torch.Tensor | None = None,
    ) -> KvCache:
        """Zeros, since a slot that is masked out still takes part in a product with weight zero."""
        heads = mapping.local_kv_heads(model)
        shape = (model.n_layer, 2, num_blocks, heads, tokens_per_block, model.head_size)
        dtype = torch_dtype(build.dtype)
        stored = {None: dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[build.quant.kv_cache]
        # Through bytes: PyTorch does not fill FP8 everywhere.
        blocks = torch.zeros((*shape[:-1], shape[-1] * stored.itemsize), dtype=torch.uint8, device=device).view(stored)
        return cls(blocks, scales, attention_dtype(dtype, device))

    def of_sequence(self, row: int) -> KvCache:
        """The part of a contiguous cache that one sequence has."""
        return replace(self, blocks=self.blocks[:, :, row : row + 1])

    def encode(self, values: torch.Tensor, layer: int, part: int | None = None) -> torch.Tensor:
        """What the cache keeps of K (part 0), of V (part 1), or of both, [N, 2, G, D]."""
        if self.scales is None:
            return values
        scale = self.scales[layer].view(2, 1, 1) if part is None else self.scales[layer, part]
        return to_int8(values, scale) if self.blocks.dtype == torch.int8 else to_fp8(values, scale)

    def decode(self, stored: torch.Tensor, layer: int, part: int) -> torch.Tensor:
        """The keys (part 0) or values (part 1) that a piece of `blocks` of any shape stands for."""
        if self.scales is None or self.dtype is None:
            return stored
        return stored.to(self.dtype) * self.scales[layer, part].to(self.dtype)

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[2]

    @property
    def tokens_per_block(self) -> int:
        return self.blocks.shape[4]


def kv_scales(weights: Dict[str, torch.Tensor], model: ModelConfig) -> torch.Tensor | None:
    """`KvCache.scales` out of an engine's tensors; None for one whose cache is not quantised."""
    names = [f"model.layers.{layer}.attention.kv_scale" for layer in range(model.n_layer)]
    return torch.stack([weights[name] for name in names]) if names[0] in weights else None
