"""Quantised products and an int8 cache as TensorRT layers: explicit Q/DQ, which the library fuses into its kernels.

A linear layer `X` is quantised where its weights have `X.weight_scale`, the value of one step of its output's weights:

    X.weight        int8 [out, in]; uint8 [out, in / 2], two int4 each, the even input in the low four bits;
                    float8_e4m3fn [out, in]
    X.weight_scale  [out]; int4 in groups: [out, in / group]
    X.input_scale   [], where all inputs share one
    X.smoother      [in], what inputs are divided by first

and an int8 cache has `model.layers.<l>.attention.kv_scale` [2], the values of one step of K and of V.

The library takes quantised constants only as the input of a dequantisation, so that x_q @ W_q is written DQ(Q(x)) @
DQ(W): exact integers times scales on both sides, in the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.engine.trt_layers import Layers
from gpt.quant import FP8_MAX, INT8_MAX, SMALLEST_ROW_MAX, QuantConfig


class QuantizedProducts:
    """x @ W.T for the linear layers that are quantised; results in the engine's dtype."""

    def __init__(self, layers: Layers, weights: Dict[str, torch.Tensor], dtype: torch.dtype, quant: QuantConfig):
        self.layers = layers
        self.weights = weights
        self.dtype = dtype
        self.quant = quant

    def has(self, name: str) -> bool:
        return f"{name}.weight_scale" in self.weights

    def rounds_inputs_of(self, name: str | None) -> bool:
        """Whether this product finds integers for its inputs, which it does from float32."""
        return self.quant.activations is not None and name is not None and self.has(name)

    def __call__(self, x: Any, name: str) -> Any:
        """x [..., in] -> [..., out], the bias not yet added."""
        if self.quant.activations is not None:
            x = self._quantized_input(x, name)
        weight = self._weight(name)
        shape = (1,) * (len(x.shape) - 2) + tuple(weight.shape)
        if len(shape) > 2:
            weight = self.layers.shuffle(weight, shape)
        return self.layers.matmul(x, weight, transpose_b=True, name=name)

    def _weight(self, name: str) -> Any:
        """[out, in] in the engine's dtype."""
        layers = self.layers
        weight, scale = self.weights[f"{name}.weight"], self.weights[f"{name}.weight_scale"]
        steps = layers.packed_int4(weight) if weight.dtype == torch.uint8 else layers.constant(weight)
        axis = 0 if scale.dim() == 1 else None
        if weight.dtype == torch.uint8:  # for int4 the library wants scales of the type of the result
            scale = scale.to(self.dtype)
        return layers.dequantize(steps, layers.constant(scale), self.dtype, axis=axis)

    def _quantized_input(self, x: Any, name: str) -> Any:
        """DQ(Q(x)): what the integers of x stand for.  Scales and rounding are computed in float32."""
        layers, rank = self.layers, len(x.shape)
        steps = self.weights[f"{name}.weight"].dtype
        x = layers.cast(x, torch.float32)
        smoother = self.weights.get(f"{name}.smoother")
        if smoother is not None:
            x = layers.elementwise(x, layers.constant(smoother, (1,) * (rank - 1) + tuple(smoother.shape)), "DIV")
        scale = self._input_scale(x, name, steps)
        integers = layers.quantize(x, scale, steps)
        # Scales per row have to be of the type of the result; the integers come from the exact ones.
        scale = layers.cast(scale, self.dtype) if self.quant.activations == "per_token" else scale
        return layers.dequantize(integers, scale, self.dtype)

    def _input_scale(self, x: Any, name: str, steps: torch.dtype) -> Any:
        layers, rank = self.layers, len(x.shape)
        if self.quant.activations == "per_tensor":
            return layers.constant(self.weights[f"{name}.input_scale"].float(), ())
        largest = layers.elementwise(layers.row_maximum(x), layers.scalar(SMALLEST_ROW_MAX, torch.float32, rank), "MAX")
        limit = FP8_MAX if steps == torch.float8_e4m3fn else INT8_MAX
        return layers.elementwise(largest, layers.scalar(limit, torch.float32, rank), "DIV")


class QuantizedCache:
    """The caches of one network, int8 [B, G, T, D]: read whole, written whole.

    The library's own cache update takes no int8, and nothing else works in place: past and present are two tensors.
    Prompts attend to themselves unquantised, as in the torch executor; generated tokens attend to what is in the cache.
    """

    def __init__(self, layers: Layers, weights: Dict[str, torch.Tensor], dtype: torch.dtype, num_slots: int):
        self.layers = layers
        self.weights = weights
        self.dtype = dtype
        self.num_slots = num_slots
        self._source: tuple[Any, Any, Any] | None = None

    def update(self, past: Any, new: Any, write_index: Any, layer: int, kind: str) -> tuple[Any, Any]:
        """The present cache, int8, and what to attend to, in the engine's dtype, both [B, G, T, D].

        past: int8 [B, G, T, D].  new: [B, G, S, D], for the slots from write_index[b] on; from 0 on it is a prompt.
        kind: "key" or "value".
        """
        layers = self.layers
        values = self.weights[f"model.layers.{layer}.attention.kv_scale"].float()
        scale = layers.constant(values[0 if kind == "key" else 1].clone(), ())
        rows, is_new, is_prompt = self._sources(new, write_index)
        # Gathering goes along one axis after those that both tensors share: slots come second.
        by_slot = layers.gather(layers.shuffle(new, before=(0, 2, 1, 3)), rows, 1, num_elementwise_dims=1)
        by_slot = layers.shuffle(by_slot, before=(0, 2, 1, 3))  # [B, G, T, D]
        steps = layers.quantize(layers.cast(by_slot, torch.float32), scale, torch.int8)
        present = layers.select(is_new, steps, past)
        return present, layers.select(is_prompt, by_slot, layers.dequantize(present, scale, self.dtype))

    def _sources(self, new: Any, write_index: Any) -> tuple[Any, Any, Any]:
        """For every slot the token of this step that it shows, [B, T], whether it is one, and whether it is one of a
        prompt, [B, 1, T, 1].

        Prepared once, used by every layer.
        """
        if self._source is None:
            layers = self.layers
            slots = layers.constant(torch.arange(self.num_slots, dtype=torch.int32), (1, self.num_slots))
            token = layers.elementwise(slots, layers.shuffle(write_index, (-1, 1)), "SUB")  # [B, T]
            sizes = layers.cast(layers.shape_of(new), torch.int32)
            num_tokens = layers.gather(sizes, layers.constant(torch.tensor([2], dtype=torch.int32)), 0)  # [1]
            last = layers.elementwise(num_tokens, layers.scalar(1, torch.int32, 1), "SUB")
            zero = layers.scalar(0, torch.int32, 2)
            inside = layers.elementwise(layers.elementwise(token, zero, "MAX"), layers.shuffle(last, (1, 1)), "MIN")
            is_new = layers.elementwise(token, inside, "EQUAL")
            is_prompt = layers.elementwise(is_new, layers.elementwise(token, slots, "EQUAL"), "AND")
            shape = (0, 1, self.num_slots, 1)
            self._source = inside, layers.shuffle(is_new, shape), layers.shuffle(is_prompt, shape)
        return self._source
