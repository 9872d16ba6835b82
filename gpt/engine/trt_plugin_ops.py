"""The operations of gpt.network.ops with plugins in place of the layers that `BuildConfig.plugins` names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpt.engine.torch_executor import rotary_tables
from gpt.engine.trt_library import compute_capability
from gpt.engine.trt_ops import TrtOps
from gpt.engine.trt_plugin_kernels import Attention, Int8Gemm, Lookup, Norm, QuantizeRows, WeightOnlyGemm
from gpt.mapping import Split


@dataclass(frozen=True)
class Rows:
    """A product's input as integers, and the value of one step of each row."""

    values: Any
    scale: Any


@dataclass(frozen=True)
class Rotated:
    """A projection that attention will rotate by tables cos and sin [T, rotary_dim / 2] float32."""

    qkv: Any
    cos: Any
    sin: Any


class PluginOps(TrtOps):
    """Takes the arguments of TrtOps."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.capability = compute_capability(self.layers.trt)
        self._tables: tuple[Any, Any] | None = None

    def _chosen(self, name: str) -> bool:
        return name in self.build.plugins

    def _causal_mask(self) -> Any:
        return None if self._chosen("attention") else super()._causal_mask()

    def _qkv_slices(self) -> list[tuple[int, Any]]:
        return [] if self._chosen("attention") else super()._qkv_slices()

    def _words(self, words: Any, ids: Any) -> Any:
        if not self._chosen("lookup") or self.mapping.embedding is Split.ROW:
            return super()._words(words, ids)
        return self.layers.plugin(Lookup(self.capability, words.shape[1]), ids, words)[0]

    def layer_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        if not self._chosen("layernorm"):
            return super().layer_norm(x, name, epsilon, feeds)
        return self._norm("layernorm", x, name, epsilon, feeds)

    def rms_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        if not self._chosen("layernorm"):
            return super().rms_norm(x, name, epsilon, feeds)
        return self._norm("rmsnorm", x, name, epsilon, feeds)

    def _norm(self, kind: str, x: Any, name: str, epsilon: float, feeds: str | None) -> Any:
        weight = self.layers.constant(self.weights[f"{name}.weight"].float())
        bias = self.layers.constant(self.weights[f"{name}.bias"].float()) if kind == "layernorm" else weight
        if feeds is not None and self._takes_integers(feeds):
            return self._integers(x, feeds, kind, epsilon, weight, bias)
        dtype = torch.float32 if self.products.rounds_inputs_of(feeds) else self.dtype
        plugin = Norm(self.capability, kind, x.shape[-1], epsilon, self._type(dtype))
        return self.layers.plugin(plugin, x, weight, bias)[0]

    def _takes_integers(self, name: str) -> bool:
        return self._chosen("gemm") and self.products.rounds_inputs_of(name)

    def _integers(
        self, x: Any, name: str, kind: str = "none", epsilon: float = 0.0, weight: Any = None, bias: Any = None
    ) -> Rows:
        """x, normalised first unless `kind` is "none", as the product `name` takes it."""
        smoother, static = self.weights.get(f"{name}.smoother"), self.weights.get(f"{name}.input_scale")
        plugin = QuantizeRows(self.capability, kind, x.shape[-1], epsilon, smoother is not None, static is not None)
        values, scale = self.layers.plugin(
            plugin,
            x,
            x if weight is None else weight,
            x if bias is None else bias,
            x if smoother is None else self.layers.constant(smoother.float()),
            x if static is None else self.layers.constant(static.float(), (1,)),
        )
        return Rows(values, scale)

    def linear(
        self, x: Any, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> Any:
        if not (self._chosen("gemm") and self.products.has(name)):
            return super().linear(x, name, activation=activation, bias=bias, feeds=feeds)
        layers, weight, scale = self.layers, self.weights[f"{name}.weight"], self.weights[f"{name}.weight_scale"]
        shift = self.weights.get(f"{name}.bias") if bias else None
        packed = weight.dtype == torch.uint8
        num_in = weight.shape[1] * (2 if packed else 1)
        common = (self.capability, num_in, len(weight), activation or "none", shift is not None, self._type(self.dtype))
        steps = layers.constant(weight.view(torch.int8))
        if self.products.rounds_inputs_of(name):
            rows = x if isinstance(x, Rows) else self._integers(x, name)
            factors = layers.constant(scale.float())
            offset = factors if shift is None else layers.constant(shift)
            return layers.plugin(Int8Gemm(*common), rows.values, rows.scale, steps, factors, offset)[0]
        group = num_in // scale.shape[1] if scale.dim() == 2 else 0
        factors = layers.constant(scale)
        offset = factors if shift is None else layers.constant(shift)
        return layers.plugin(WeightOnlyGemm(*common, 4 if packed else 8, group), x, steps, factors, offset)[0]

    def rotary(self, qkv: Any, rotary_dim: int, base: float, scaling: float) -> Any:
        if not self._chosen("attention"):
            return super().rotary(qkv, rotary_dim, base, scaling)
        if self._tables is None:
            cos, sin = rotary_tables(torch.arange(self.num_slots), rotary_dim, base, scaling)
            self._tables = self.layers.constant(cos), self.layers.constant(sin)
        return Rotated(qkv, *self._tables)

    def attention(self, qkv: Any, layer: int, scale: float) -> Any:
        if not self._chosen("attention"):
            return super().attention(qkv, layer, scale)
        layers, past = self.layers, self.inputs["cache_write_index"]
        rotated = qkv if isinstance(qkv, Rotated) else Rotated(qkv, past, past)
        x = layers.gather(rotated.qkv, self.inputs["padded_from_packed"], 0) if self.packed else rotated.qkv
        kv_scale = self.weights.get(f"model.layers.{layer}.attention.kv_scale")
        rotary_dim = 0 if rotated is not qkv else self.model.rotary_dim
        plugin = Attention(
            self.capability,
            self.num_heads,
            self.num_kv_heads,
            self.model.head_size,
            self.num_slots,
            rotary_dim,
            kv_scale is not None,
            scale,
        )
        mixed, keys, values = layers.plugin(
            plugin,
            x,
            past,
            self.inputs[f"past_key_{layer}"],
            self.inputs[f"past_value_{layer}"],
            past if kv_scale is None else layers.constant(kv_scale.float()),
            rotated.cos,
            rotated.sin,
        )
        layers.output(keys, f"present_key_{layer}")
        layers.output(values, f"present_value_{layer}")
        if not self.packed:
            return mixed
        rows = layers.shuffle(mixed, (-1, self.num_heads * self.model.head_size))  # [B*S, H*D]
        return layers.gather(rows, self.inputs["packed_from_padded"], 0)

    def _type(self, dtype: torch.dtype) -> str:
        """TensorRT's name."""
        return str(self.layers.library_dtype(dtype).name)
