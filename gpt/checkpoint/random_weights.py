"""Weights out of a seed, for performance tests that need a model's shapes and not its words."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gpt.checkpoint.layout import Tensor
from gpt.config import ModelConfig
from gpt.mapping import Mapping

if TYPE_CHECKING:
    import torch

STANDARD_DEVIATION = 0.02  # GPT-2's own initializer_range


class RandomWeights:
    """Reads like a Checkpoint.  Values depend on seed, tensor name and device type, never on the number of ranks."""

    def __init__(self, model: ModelConfig, seed: int, device: torch.device | str = "cpu"):
        self.model = model
        self.seed = seed
        self.device = device  # where the values are made and stay

    def read(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        """This rank's part of `tensor`, float32, in FT local shape: layernorm weights around 1, the rest around 0."""
        import torch

        generator = torch.Generator(self.device).manual_seed(self._tensor_seed(tensor.name))
        whole = torch.empty(tensor.shape, dtype=torch.float32, device=self.device)
        whole.normal_(1.0 if tensor.kind == "scale" else 0.0, STANDARD_DEVIATION, generator=generator)
        part = mapping.shard(tensor.split, whole, self.model)
        # A view would keep the whole tensor alive.
        return part if part.numel() == whole.numel() else part.clone(memory_format=torch.contiguous_format)

    def _tensor_seed(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits
