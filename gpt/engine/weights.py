"""From checkpoint tensors to what an executor multiplies with: sharded, transposed, cast, padded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.random_weights import RandomWeights
from gpt.checkpoint.store import Checkpoint
from gpt.checkpoint.writer import ValueCheck
from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import ITEMSIZE, torch_dtype
from gpt.engine.quant_weights import (
    Calibration,
    RandomCalibration,
    StoredCalibration,
    kv_scale,
    quantized_parts,
    quantized_tensors,
)
from gpt.errors import CheckpointError, ConfigError, Problems
from gpt.mapping import Mapping, Split
from gpt.quant import FLOAT, QuantConfig


class WeightSource(Protocol):
    """A checkpoint folder or seeded random weights."""

    def read(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        """This rank's part of `tensor` in the FT layout, in the dtype of the source."""
        ...


@dataclass(frozen=True)
class EngineTensor:
    """A tensor as the engine holds it: linear weights [out, in], the head's table with V padded.

    source: the checkpoint tensor it is made of; quantised weights and their scales have the same one.  split: on top of
    the source's own.
    """

    source: Tensor
    name: str
    shape: tuple[int, ...]
    dtype: str
    split: Split = Split.NONE

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


_QKV = ".attention.query_key_value.weight"


def engine_layout(
    model: ModelConfig, mapping: Mapping, dtype: str = "float32", quant: QuantConfig = FLOAT
) -> list[EngineTensor]:
    """One rank's tensors, without reading anything.  What is quantised: `gpt.engine.quant_weights.quantized_parts`,
    and `attention.kv_scale` float32 [2] per layer with a quantised cache."""
    head = "model.wte" if model.tied_head else "model.lm_head.weight"
    result = []
    for tensor in tensors(model):
        shape = tensor.file_shape(mapping, model)
        if tensor.kind == "weight":
            shape = shape[::-1]
        elif tensor.name == head or (tensor.name == "model.wte" and mapping.embedding is Split.ROW):
            shape = (model.padded_vocab_size(mapping.world_size), *shape[1:])
        split = _table_split(tensor, mapping)
        shape = mapping.local_shape(split, shape, model)
        if tensor.kind == "weight" and quant.weights:
            result += [EngineTensor(tensor, *part) for part in quantized_parts(tensor, shape, dtype, quant)]
        else:
            result.append(EngineTensor(tensor, tensor.name, shape, dtype, split))
        if quant.kv_cache and tensor.name.endswith(_QKV):
            result.append(EngineTensor(tensor, _kv_scale_name(tensor), (2,), "float32"))
    return result


def _kv_scale_name(qkv: Tensor) -> str:
    return qkv.name.removesuffix(".query_key_value.weight") + ".kv_scale"


def _table_split(tensor: Tensor, mapping: Mapping) -> Split:
    """How an engine divides a table that checkpoints hold whole: a head of its own always, by vocabulary; the embedding
    as the mapping says."""
    if tensor.name == "model.wte":
        return mapping.embedding
    return Split.ROW if tensor.name == "model.lm_head.weight" else Split.NONE


def file_layout(model: ModelConfig, build: BuildConfig, mapping: Mapping) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by name of what a torch engine's file holds: nothing for random weights, made at load."""
    if build.seed is not None:
        return {}
    layout = engine_layout(model, mapping, build.dtype, build.quant)
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in layout}


def engine_bytes(model: ModelConfig, mapping: Mapping, dtype: str, quant: QuantConfig = FLOAT) -> int:
    """Bytes of one rank's weights."""
    return sum(tensor.num_bytes for tensor in engine_layout(model, mapping, dtype, quant))


def engine_tensors(
    model: ModelConfig, build: BuildConfig, mapping: Mapping, source: WeightSource
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) in the order of `engine_layout`, contiguous, in its dtypes, those of one checkpoint tensor
    at a time in memory.

    Raises CheckpointError at the end, naming every tensor of a checkpoint with values that are not finite or do not fit
    the type.
    """
    dtype = torch_dtype(build.dtype)
    problems = Problems()

    def read(target: EngineTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        value = _read(source, target, model, mapping)
        stored = value if dtype is None else value.to(dtype)
        if isinstance(source, Checkpoint):
            check = ValueCheck()
            check.look(value, stored)
            if problem := check.problem(build.dtype):
                problems.add(f"{target.source.name}: {problem}")
        return stored

    quant = build.quant
    calibration = _calibration(source) if quant.describe() else None
    for target in engine_layout(model, mapping):
        tensor = target.source
        if calibration and tensor.kind == "weight" and quant.weights:
            parts = quantized_tensors(tensor, partial(read, target), build.dtype, quant, mapping, calibration)
            for name, _, _ in quantized_parts(tensor, target.shape, build.dtype, quant):
                yield name, parts[name].contiguous()
        else:
            yield target.name, read(target, dtype).contiguous()
        layer, _ = tensor.place
        if calibration and quant.kv_cache and layer is not None and tensor.name.endswith(_QKV):
            yield _kv_scale_name(tensor), kv_scale(quant, layer, calibration)
    problems.raise_if_any(
        CheckpointError,
        f"these weights cannot be used in {build.dtype}",
        hint="values out of range fit --dtype bfloat16 or float32; NaN and infinity are damage in the checkpoint",
    )


def _read(source: WeightSource, target: EngineTensor, model: ModelConfig, mapping: Mapping) -> torch.Tensor:
    """The float form of `target`, in the dtype of the source."""
    value = source.read(target.source, mapping)
    if target.source.kind == "weight":
        # [out, in] lets a row of the product be one dot product along memory, which is what decoding does all day.
        value = value.t()
    num_rows = target.shape[0] * (mapping.world_size if target.split is Split.ROW else 1)
    if value.shape[0] < num_rows:
        value = torch.nn.functional.pad(value, (0, 0, 0, num_rows - value.shape[0]))
    return mapping.shard(target.split, value, model)


def _calibration(source: WeightSource) -> Calibration:
    if isinstance(source, Checkpoint):
        return StoredCalibration(source)
    if isinstance(source, RandomWeights):
        return RandomCalibration(source)
    raise ConfigError("only a checkpoint and random weights can be quantised", found=type(source).__name__)
