"""The quantised forms of a linear weight and the scales of the cache: what an engine holds, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from gpt.checkpoint.layout import Tensor, quant_tensors
from gpt.checkpoint.random_weights import STANDARD_DEVIATION, RandomWeights
from gpt.checkpoint.store import Checkpoint
from gpt.dtypes import torch_dtype
from gpt.mapping import Mapping, Split
from gpt.quant import FP8_MAX, INT8_MAX, QuantConfig, quantize_weight_fp8, quantize_weight_int4, quantize_weight_int8

Part = tuple[str, tuple[int, ...], str]  # name, shape and dtype of an engine tensor


def quantized_parts(tensor: Tensor, shape: tuple[int, ...], dtype: str, quant: QuantConfig) -> Iterator[Part]:
    """What an engine holds for the linear weight `tensor`, of which a rank has `shape` [out, in]:

    weight        int8 [out, in]; int4: uint8 [out, in / 2]; float8_e4m3fn [out, in]
    weight_scale  [out], int4 in groups [out, in / group]; in the engine's dtype where only weights are quantised,
                  float32 elsewhere
    input_scale   float32 [], with per-tensor activations
    smoother      float32 [in], what inputs are divided by first, where the checkpoint has one
    """
    name = linear_name(tensor)
    num_out, num_in = shape
    if quant.weights == "int4":
        yield tensor.name, (num_out, num_in // 2), "uint8"
        groups = (num_in // quant.group_size,) if quant.group_size else ()
        yield f"{name}.weight_scale", (num_out, *groups), dtype
        return
    yield tensor.name, shape, "float8_e4m3fn" if quant.weights == "fp8" else "int8"
    yield f"{name}.weight_scale", (num_out,), dtype if quant.weight_only else "float32"
    if quant.activations == "per_tensor":
        yield f"{name}.input_scale", (), "float32"
    if quant.smoothers and tensor.split is Split.ROW:
        yield f"{name}.smoother", (num_in,), "float32"


def linear_name(tensor: Tensor) -> str:
    """`model.layers.0.attention.dense` of its weight."""
    return tensor.name.removesuffix(".weight")


class Calibration(Protocol):
    """The int8 weights and ranges that conversion finds, or a stand-in for them."""

    def int8_weight(self, tensor: Tensor, quant: QuantConfig, mapping: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 [in, out] and float32 value per step, [out] or [1], of this rank's part."""
        ...

    def largest_input(self, tensor: Tensor) -> float:
        """The largest magnitude of the product's input, after smoothing."""
        ...

    def smoother(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        """This rank's part of what the input is divided by, float32 [in]."""
        ...

    def largest_kv(self, layer: int) -> torch.Tensor:
        """The largest magnitudes of K and V, float32 [2]."""
        ...


class StoredCalibration:
    """What a checkpoint's files say."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._files = {tensor.name: tensor for tensor in quant_tensors(checkpoint.model, checkpoint.quant)}

    def _read(self, name: str, mapping: Mapping) -> torch.Tensor:
        return self._checkpoint.read(self._files[name], mapping)

    def int8_weight(self, tensor: Tensor, quant: QuantConfig, mapping: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        kind = ".col" if quant.per_channel else ""
        name = linear_name(tensor)
        return self._read(f"{name}.weight.int8{kind}", mapping), self._read(f"{name}.scale_w_quant_orig{kind}", mapping)

    def largest_input(self, tensor: Tensor) -> float:
        mapping = Mapping(self._checkpoint.world_size)
        return INT8_MAX / self._read(f"{linear_name(tensor)}.scale_x_orig_quant", mapping).item()

    def smoother(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        return self._read(f"{linear_name(tensor)}.smoother", mapping)

    def largest_kv(self, layer: int) -> torch.Tensor:
        return self._checkpoint.read_kv_scales(layer).float() * INT8_MAX


class RandomCalibration:
    """For engines of random weights, which test speed: weights quantised as conversion would, ranges by rule.

    A normalised input has unit deviation, K and V that of a sum of E products with the weights' deviation; six of them
    are taken as the largest value.
    """

    def __init__(self, source: RandomWeights):
        self._source = source

    def int8_weight(self, tensor: Tensor, quant: QuantConfig, mapping: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        model = self._source.model
        whole = self._source.read(tensor, Mapping())  # [in, out]
        largest = whole.abs().amax(0)
        if not quant.per_channel:
            heads = (model.n_head, model.n_kv_head, model.n_kv_head) if tensor.split is Split.QKV else (1,)
            width = whole.shape[1] // sum(heads)
            parts = largest.split([count * width for count in heads])
            largest = torch.cat([part.amax().expand(len(part)) for part in parts])
        scale = largest / INT8_MAX
        steps = (whole / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        if tensor.split is not Split.ROW:
            scale = mapping.shard(tensor.split, scale, model)
        return mapping.shard(tensor.split, steps, model), scale

    def largest_input(self, tensor: Tensor) -> float:
        return 6.0

    def smoother(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        raise ValueError("random weights have no smoothers")

    def largest_kv(self, layer: int) -> torch.Tensor:
        model = self._source.model
        return torch.full((2,), 6.0 * STANDARD_DEVIATION * math.sqrt(model.n_embd), device=self._source.device)


def quantized_tensors(
    tensor: Tensor,
    read: Callable[[], torch.Tensor],
    dtype: str,
    quant: QuantConfig,
    mapping: Mapping,
    calibration: Calibration,
) -> dict[str, torch.Tensor]:
    """The tensors of `quantized_parts` by name.  read: this rank's float part [out, in], not needed by SmoothQuant."""
    name = linear_name(tensor)
    result = {}
    if quant.smooth_quant:
        steps, scale = calibration.int8_weight(tensor, quant, mapping)
        result = {tensor.name: steps.t(), f"{name}.weight_scale": scale.float().expand(steps.shape[1])}
        if quant.smoothers and tensor.split is Split.ROW:
            result[f"{name}.smoother"] = calibration.smoother(tensor, mapping)
    elif quant.weights == "fp8":
        result[tensor.name], result[f"{name}.weight_scale"] = quantize_weight_fp8(read())
    elif quant.weights == "int8":
        result[tensor.name], result[f"{name}.weight_scale"] = quantize_weight_int8(read(), torch_dtype(dtype))
    else:
        packed = quantize_weight_int4(read(), torch_dtype(dtype), quant.group_size)
        result[tensor.name], result[f"{name}.weight_scale"] = packed
    if quant.activations == "per_tensor":
        steps_of_largest = FP8_MAX if quant.weights == "fp8" else INT8_MAX
        input_scale = calibration.largest_input(tensor) / steps_of_largest
        result[f"{name}.input_scale"] = torch.tensor(input_scale, device=result[tensor.name].device)
    return result


def kv_scale(quant: QuantConfig, layer: int, calibration: Calibration) -> torch.Tensor:
    """Value per step of K and V in the cache, float32 [2]."""
    return calibration.largest_kv(layer).float() / (FP8_MAX if quant.kv_cache == "fp8" else INT8_MAX)


def quantization_notes(quant: QuantConfig, checkpoint: Checkpoint | None) -> list[str]:
    """What a build says of its quantisation."""
    if not quant.describe():
        return []
    notes = [f"Quantisation: {quant.describe()}; head, embeddings and normalisations stay float"]
    if checkpoint is None and (quant.activations == "per_tensor" or quant.kv_cache):
        notes.append("Random weights: the ranges of activations are rules of thumb, good for measuring speed only")
    return notes
