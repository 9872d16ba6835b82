"""Tensor parallelism in one place: which part of which tensor a rank holds.

FT layout throughout: linear weights are [in, out].  Column-parallel tensors are cut along out, row-parallel ones along
in; the fused projection is cut by heads, with K and V repeated on every rank where there are fewer of them than ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from gpt.config import BuildConfig, ModelConfig
from gpt.errors import ConfigError, Problems

if TYPE_CHECKING:
    import torch


class Split(Enum):
    """How a tensor is divided among the ranks."""

    NONE = "whole on every rank"
    COLUMN = "last axis"
    ROW = "first axis"
    QKV = "last axis, by heads"


@dataclass(frozen=True)
class Mapping:
    """One rank's place among `world_size` ranks.

    embedding: how the lookup table is divided inside an engine: ROW by vocabulary, COLUMN by hidden size, NONE not at
    all.  Checkpoints always hold it whole.
    """

    world_size: int = 1
    rank: int = 0
    embedding: Split = Split.NONE

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("no such rank", found=self.rank, allowed=f"0 to {self.world_size - 1}")

    @classmethod
    def of_build(cls, build: BuildConfig, rank: int = 0) -> Mapping:
        """The place of `rank` in an engine."""
        if not build.use_parallel_embedding or build.world_size == 1:
            return cls(build.world_size, rank)
        return cls(build.world_size, rank, Split.COLUMN if build.embedding_sharding_dim else Split.ROW)

    def local_vocab_size(self, model: ModelConfig) -> int:
        """Rows of the padded vocabulary whose logits this rank computes: `rank` times this is the first of them."""
        return model.padded_vocab_size(self.world_size) // self.world_size

    def local_heads(self, model: ModelConfig) -> int:
        return model.n_head // self.world_size

    def local_kv_heads(self, model: ModelConfig) -> int:
        return 1 if model.multi_query else model.n_kv_head // self.world_size

    def local_shape(self, split: Split, shape: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
        """The shape of this rank's part of a tensor of `shape`."""
        if split is Split.NONE:
            return shape
        if split is Split.ROW:
            return (shape[0] // self.world_size, *shape[1:])
        if split is Split.COLUMN:
            return (*shape[:-1], shape[-1] // self.world_size)
        local = (self.local_heads(model) + 2 * self.local_kv_heads(model)) * model.head_size
        return (*shape[:-1], local)

    def shard(self, split: Split, tensor: torch.Tensor, model: ModelConfig) -> torch.Tensor:
        """This rank's part of a whole tensor, a view where the cut allows one; QKV parts stay in order Q, K, V."""
        if split is Split.NONE or self.world_size == 1:
            return tensor
        if split is Split.ROW:
            return _part(tensor, 0, self.world_size, self.rank)
        if split is Split.COLUMN:
            return _part(tensor, tensor.dim() - 1, self.world_size, self.rank)
        import torch

        q_size = model.n_head * model.head_size
        kv_size = model.n_kv_head * model.head_size
        parts = list(tensor.split([q_size, kv_size, kv_size], dim=-1))
        axis = tensor.dim() - 1
        parts[0] = _part(parts[0], axis, self.world_size, self.rank)
        if not model.multi_query:
            parts[1:] = [_part(part, axis, self.world_size, self.rank) for part in parts[1:]]
        return torch.cat(parts, dim=-1)


def _part(tensor: torch.Tensor, axis: int, num_parts: int, index: int) -> torch.Tensor:
    size = tensor.shape[axis] // num_parts
    return tensor.narrow(axis, index * size, size)


def check_divides(model: ModelConfig, world_size: int) -> None:
    """Raises ConfigError naming each dimension that `world_size` ranks cannot share, and the sizes that work."""
    dimensions = {"n_head": model.n_head, "inter_size": model.inter_size}
    if not model.multi_query:
        dimensions["num_kv_heads"] = model.n_kv_head
    problems = Problems()
    for name, size in dimensions.items():
        if size % world_size:
            problems.add(f"{name} {size} is not divisible by {world_size}")
    if problems:
        fitting = [n for n in range(1, model.n_head + 1) if all(size % n == 0 for size in dimensions.values())]
        raise ConfigError(
            f"the model cannot be split over {world_size} ranks",
            found=problems.items,
            allowed="tensor parallelism of " + ", ".join(map(str, fitting)),
        )
