"""The operations of a prompt step on a GPU: PyTorch's libraries for float products and attention, kernels else."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Any

import torch

from gpt.engine.cuda_prompt_attention import PromptAttention
from gpt.engine.cuda_w8a8 import W8a8Linear, w8a8_linears
from gpt.engine.linear import library_linear
from gpt.engine.quant_linear import QuantizedRows, QuantLinear
from gpt.engine.torch_executor import TorchOps
from gpt.kernels.norm import add_norm
from gpt.kernels.product import Norm
from gpt.quant import QuantConfig


@dataclass
class _Sum:
    """The residual stream x [N, E] float32, to which `part` [N, E] still has to be added."""

    x: torch.Tensor
    part: torch.Tensor | None

    def value(self) -> torch.Tensor:
        if self.part is not None:
            self.x.add_(self.part)
            self.part = None
        return self.x


@dataclass(frozen=True)
class _Product:
    """rows @ weight.T + bias, launched by what takes it: a sum and the cache are written by the product itself."""

    product: W8a8Linear
    rows: QuantizedRows
    bias: torch.Tensor | None
    activation: str

    def value(self) -> torch.Tensor:
        return self.product.multiply(self.rows, self.bias, self.activation)


class PromptOps(TorchOps):
    """TorchOps with residual sum and norm in one pass that writes what products take, cuBLASLt's own GELU behind a
    float product, and kernels for int8 and FP8 products, which add to the residual stream and fill the cache."""

    _attention_class = PromptAttention
    attend: PromptAttention

    def _make_linears(self, weights: Dict[str, torch.Tensor], quant: QuantConfig) -> Dict[str, QuantLinear]:
        return w8a8_linears(weights, self.dtype) if quant.activations else super()._make_linears(weights, quant)

    def add(self, a: Any, b: Any) -> Any:
        stream = _value(a)
        if not isinstance(b, _Product):
            return _Sum(stream, b)
        b.product.multiply_into(stream, b.rows, b.bias)
        return stream

    def multiply(self, a: Any, b: Any) -> torch.Tensor:
        return super().multiply(_value(a), _value(b))

    def layer_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        return self._norm(x, Norm(self.weights[name + ".weight"], self.weights[name + ".bias"], epsilon), feeds)

    def rms_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        return self._norm(x, Norm(self.weights[name + ".weight"], None, epsilon), feeds)

    def _norm(self, x: Any, norm: Norm, feeds: str | None) -> QuantizedRows | torch.Tensor:
        parts = None
        if isinstance(x, _Sum):
            parts, x.part, x = None if x.part is None else x.part[None], None, x.x
        product = self.linears.get(feeds) if feeds else None
        if isinstance(product, W8a8Linear):
            return product.prepare(x, norm, parts)
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        add_norm(x, y, norm, parts=parts)
        return y

    def linear(
        self, x: Any, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> Any:
        product = self.linears.get(name)
        vector = self.weights.get(name + ".bias") if bias else None
        if isinstance(product, W8a8Linear):
            rows = product.prepare(x) if isinstance(x, torch.Tensor) else x
            following = self.linears.get(feeds) if feeds else None
            if isinstance(following, W8a8Linear):
                return product.multiply_for(following, rows, vector, activation or "none")
            return _Product(product, rows, vector, activation or "none")
        if product is not None:
            return super().linear(x, name, activation=activation, bias=bias)
        return library_linear(x, self.weights[name + ".weight"], vector, activation or "none")

    def rotary(self, qkv: Any, rotary_dim: int, base: float, scaling: float) -> torch.Tensor:
        return super().rotary(_value(qkv), rotary_dim, base, scaling)

    def attention(self, qkv: Any, layer: int, scale: float) -> torch.Tensor:
        slots = self.attend.slots(layer)
        if slots is None or not isinstance(qkv, _Product):
            return super().attention(_value(qkv), layer, scale)
        heads = qkv.product.multiply_into_cache(slots, qkv.rows, qkv.bias, queries_alone=self.attend.reads_stored)
        return self.attend.attend_to_stored(heads.view(len(heads), -1, self.model.head_size), layer, scale)

    def all_reduce(self, x: Any) -> torch.Tensor:
        return super().all_reduce(_value(x))

    def gather_last(self, x: Any) -> torch.Tensor:
        return super().gather_last(_value(x))

    def name(self, x: Any, name: str) -> Any:
        return x if self.trace is None else super().name(_value(x), name)


def _value(x: Any) -> torch.Tensor:
    return x.value() if isinstance(x, (_Sum, _Product)) else x
