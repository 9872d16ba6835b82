"""Products with quantised weights: one class per kind of weight, chosen when weights are loaded.

A product has two steps, so that a kernel may fuse the first with the normalisation before it and the second with what
follows: `prepare` turns activations into what is multiplied, `multiply` does the rest.  Several products of one input
(a gated MLP) share what was prepared.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from gpt.engine.huge_pages import use_huge_pages
from gpt.engine.int8_product import integer_product
from gpt.quant import FP8_MAX, INT8_MAX, QuantConfig, dequantize_weight, row_scales, to_fp8, to_int8, unpack_int4


@dataclass(frozen=True)
class QuantizedRows:
    """Activations as a product takes them.

    values: int8 [N, in] or float8_e4m3fn [N, in]; for weight-only products int8 [2 * N, in], the two digits
    that `Int8Weights` writes; int8 as float32 where `IntegerProduct.takes` says so.  scale: float32 [N, 1], or [] where
    all rows share one.
    """

    values: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class LinearWeights:
    """What an engine holds for a linear layer: see gpt.engine.quant_weights.quantized_parts.  Without an input_scale
    each row finds its own."""

    weight: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    smoother: torch.Tensor | None

    @classmethod
    def of(cls, weights: Dict[str, torch.Tensor], name: str) -> LinearWeights:
        return cls(
            weights[f"{name}.weight"],
            weights[f"{name}.weight_scale"],
            weights.get(f"{name}.input_scale"),
            weights.get(f"{name}.smoother"),
        )


class QuantLinear(Protocol):
    """One weight's way of multiplying.  Results are float32 on a CPU and of the engine's dtype on a GPU."""

    def prepare(self, x: torch.Tensor) -> QuantizedRows | torch.Tensor:
        """x [N, in] in any float dtype -> what `multiply` takes."""
        ...

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """-> [N, out], the bias [out] added where one is given."""
        ...


class Int8Weights:
    """Weight-only int8 on a CPU: float activations, int8 instructions.

    A row x is written in two digits, x = m / 127 * (high + low / 254), m its largest magnitude, both rounded.  What is
    lost is at most m / 2 / 127 / 254, 2^-16 of the largest.  Both digits are rows of one integer product, which costs
    no more than one row while reading the weights is what takes the time.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        self._product = integer_product(weight, scale.float() / INT8_MAX)
        self._high_steps, self._low_steps = torch.tensor(float(INT8_MAX)), torch.tensor(2.0 * INT8_MAX)

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        rest = x * (self._high_steps / largest)
        high = rest.round()
        low = rest.sub_(high).mul_(self._low_steps).round_()
        return QuantizedRows(torch.cat([high, low]).to(self._product.takes), largest)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = prepared_rows(x)
        high, low = self._product(rows.values).chunk(2)  # [N, out] each
        return _scaled(torch.add(high, low, alpha=0.5 / INT8_MAX), rows.scale, bias)


# A product of more rows is faster with the weights widened once; measured, see docs/quantization.md.
_PACKED_INT4_ROWS = 48


class Int4Weights:
    """Weight-only int4 on a CPU: PyTorch's packed product for a few rows, widened weights for many."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self._weight, self._scale, self._dtype = weight, scale, dtype
        groups = scale if scale.dim() == 2 else scale[:, None]
        num_in = 2 * weight.shape[1]
        self._group_size = num_in // groups.shape[1]
        self._packed = None
        if dtype == torch.bfloat16 and _packs_int4(len(weight), num_in, self._group_size):
            shifted = (unpack_int4(weight) + 8).to(torch.int32)  # 0 to 15; the product takes 8 away again
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
            zeros = torch.zeros_like(groups)
            self._scale_and_zero = torch.stack([groups, zeros], dim=2).transpose(0, 1).contiguous()  # [groups, out, 2]

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _floats(x)
        if self._packed is None or len(x) > _PACKED_INT4_ROWS:
            y = F.linear(x, dequantize_weight(unpack_int4(self._weight), self._scale).to(self._dtype))
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, self._group_size, self._scale_and_zero)
        return _with_bias(y.float(), bias)


def _packs_int4(num_out: int, num_in: int, group_size: int) -> bool:
    """The sizes that PyTorch's packed product takes."""
    return group_size in (32, 64, 128, 256) and num_in % group_size == 0 and num_out % 64 == 0


class WidenedWeights:
    """Weight-only on a GPU: at each product a kernel widens the weights to the engine's dtype, for a library's."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        from gpt.kernels.widen import widen  # Triton comes with PyTorch for CUDA

        self._weight, self._scale, self._dtype, self._widen = weight, scale, dtype, widen

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _floats(x)
        wide = torch.empty((len(self._weight), x.shape[1]), dtype=self._dtype, device=x.device)
        self._widen(self._weight, self._scale, wide)
        return _with_bias(F.linear(x, wide), bias)


class SmoothQuantLinear:
    """int8 activations times int8 weights: Y = int32 sum * row scale * column scale (+ bias)."""

    def __init__(self, weights: LinearWeights, dtype: torch.dtype):
        self._product = integer_product(weights.weight, weights.scale)
        self._input_scale, self._smoother = weights.input_scale, weights.smoother
        self._dtype = dtype if weights.weight.is_cuda else torch.float32

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        x = x.float() if self._smoother is None else x / self._smoother
        scale = row_scales(x, INT8_MAX) if self._input_scale is None else self._input_scale
        return QuantizedRows(to_int8(x, scale, self._product.takes), scale)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = prepared_rows(x)
        return _scaled(self._product(rows.values), rows.scale, bias).to(self._dtype)


class Fp8Linear:
    """FP8 activations times FP8 weights, written plainly: both are widened to a type that holds every FP8 number."""

    def __init__(self, weights: LinearWeights, dtype: torch.dtype):
        weight = weights.weight
        # Sums of products of up to 448^2 are more than float16 holds.
        self._wide = torch.bfloat16 if weight.is_cuda or dtype == torch.bfloat16 else torch.float32
        # Processors do not multiply FP8: widening once at load trades memory for time.
        self._weight = weight if weight.is_cuda else weight.to(self._wide)
        self._scale, self._input_scale, self._dtype = weights.scale, weights.input_scale, dtype

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        scale = row_scales(x, FP8_MAX) if self._input_scale is None else self._input_scale
        return QuantizedRows(to_fp8(x, scale), scale)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = prepared_rows(x)
        values = rows.values.to(self._wide)
        if not self._weight.is_cuda:
            return _with_bias(F.linear(values, self._weight).float() * self._scale * rows.scale, bias)
        y = torch.mm(values, self._weight.to(self._wide).t(), out_dtype=torch.float32)
        return _with_bias((y * self._scale * rows.scale).to(self._dtype), bias)


def prepared_rows(x: QuantizedRows | torch.Tensor) -> QuantizedRows:
    """x itself.  Raises TypeError for rows that nothing has prepared."""
    if not isinstance(x, QuantizedRows):
        raise TypeError("this product multiplies prepared rows")
    return x


def _floats(x: QuantizedRows | torch.Tensor) -> torch.Tensor:
    if isinstance(x, QuantizedRows):
        raise TypeError("this product multiplies float rows")
    return x


def _scaled(y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale)


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y.add_(bias)


_MORE_THAN_A_CACHE = 32 << 20  # bytes of weights that are read from memory at each step


def quantized_names(weights: Dict[str, torch.Tensor]) -> list[str]:
    """Of the linear layers whose weights are quantised."""
    return [name.removesuffix(".weight_scale") for name in weights if name.endswith(".weight_scale")]


def quantized_linears(
    weights: Dict[str, torch.Tensor], quant: QuantConfig, dtype: torch.dtype
) -> dict[str, QuantLinear]:
    """The products of an engine's quantised weights, by the name of the linear layer; {} for a float engine.

    weights: as `gpt.engine.weights.engine_tensors` makes them.  dtype: the engine's.
    """
    names = quantized_names(weights)
    linears = {name: _make(weights, name, quant, dtype) for name in names}
    on_cpu = [weights[name + ".weight"].nbytes for name in names if not weights[name + ".weight"].is_cuda]
    if sum(on_cpu) >= _MORE_THAN_A_CACHE:
        use_huge_pages()
    return linears


def _make(weights: Dict[str, torch.Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> QuantLinear:
    held = LinearWeights.of(weights, name)
    weight, scale = held.weight, held.scale
    if quant.weights == "fp8":
        return Fp8Linear(held, dtype)
    if quant.smooth_quant:
        return SmoothQuantLinear(held, dtype)
    if weight.is_cuda:
        return WidenedWeights(weight, scale, dtype)
    return Int4Weights(weight, scale, dtype) if quant.weights == "int4" else Int8Weights(weight, scale)
