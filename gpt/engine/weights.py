"""From checkpoint tensors to what an executor multiplies with: sharded, transposed, cast, padded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from gpt.checkpoint.layout import Tensor, tensors
from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import ITEMSIZE, torch_dtype
from gpt.mapping import Mapping, Split


class WeightSource(Protocol):
    """A checkpoint folder or seeded random weights."""

    def read(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        """This rank's part of `tensor` in the FT layout, in the dtype of the source."""
        ...


@dataclass(frozen=True)
class EngineTensor:
    """A tensor as the engine holds it: linear weights [out, in], the head's table with V padded."""

    source: Tensor
    shape: tuple[int, ...]
    split: Split = Split.NONE  # on top of the source's own

    @property
    def name(self) -> str:
        return self.source.name


def engine_layout(model: ModelConfig, mapping: Mapping) -> list[EngineTensor]:
    """Names and shapes of one rank's tensors, without reading anything."""
    head = "model.wte" if model.tied_head else "model.lm_head.weight"
    result = []
    for tensor in tensors(model):
        shape = tensor.file_shape(mapping, model)
        if tensor.kind == "weight":
            shape = shape[::-1]
        elif tensor.name == head or (tensor.name == "model.wte" and mapping.embedding is Split.ROW):
            shape = (model.padded_vocab_size(mapping.world_size), *shape[1:])
        split = _table_split(tensor, model, mapping)
        shape = mapping.local_shape(split, shape, model)
        result.append(EngineTensor(tensor, shape, split))
    return result


def _table_split(tensor: Tensor, model: ModelConfig, mapping: Mapping) -> Split:
    """How an engine divides a table that checkpoints hold whole: a head of its own always, by vocabulary; the embedding
    as the mapping says."""
    if tensor.name == "model.wte":
        return mapping.embedding
    return Split.ROW if tensor.name == "model.lm_head.weight" else Split.NONE


def engine_bytes(model: ModelConfig, mapping: Mapping, dtype: str) -> int:
    """Bytes of one rank's weights."""
    return sum(math.prod(tensor.shape) for tensor in engine_layout(model, mapping)) * ITEMSIZE[dtype]


def engine_tensors(
    model: ModelConfig, build: BuildConfig, mapping: Mapping, source: WeightSource
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) in the order of `engine_layout`, contiguous, in the engine's dtype, one at a time."""
    dtype = torch_dtype(build.dtype)
    for target in engine_layout(model, mapping):
        value = source.read(target.source, mapping)
        if target.source.kind == "weight":
            # [out, in] lets a row of the product be one dot product along memory, which is what decoding does all day.
            value = value.t()
        num_rows = target.shape[0] * (mapping.world_size if target.split is Split.ROW else 1)
        if value.shape[0] < num_rows:
            value = torch.nn.functional.pad(value, (0, 0, 0, num_rows - value.shape[0]))
        value = mapping.shard(target.split, value, model)
        yield target.name, value.to(dtype).contiguous()
