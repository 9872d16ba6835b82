"""Products with quantised weights: one class per kind of weight, chosen when weights are loaded.

A product has two steps, so that a kernel may fuse the first with the normalisation before it and the second with what
follows: `prepare` turns activations into what is multiplied, `multiply` does the rest.  Several products of one input
(a gated MLP) share what was prepared.

On a CPU with AVX-512 VNNI or AMX the integer products are oneDNN's, with int32 sums, through weights packed at load.
`torch._int_mm` serves other CPUs and GPUs.  Its integer results are the same.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from gpt.quant import FP8_MAX, INT8_MAX, QuantConfig, dequantize_weight, row_scales, to_fp8, to_int8, unpack_int4


@dataclass(frozen=True)
class QuantizedRows:
    """Activations as a product takes them.

    values: int8 [N, in] or float8_e4m3fn [N, in]; for weight-only products int8 [2 * N, in], the two digits
    that `Int8Weights` writes.  scale: float32 [N, 1], or [] where all rows share one.
    """

    values: torch.Tensor
    scale: torch.Tensor


class QuantLinear(Protocol):
    """One weight's way of multiplying.  Results are float32 on a CPU and of the engine's dtype on a GPU."""

    def prepare(self, x: torch.Tensor) -> QuantizedRows | torch.Tensor:
        """x [N, in] in any float dtype -> what `multiply` takes."""
        ...

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """-> [N, out], the bias [out] added where one is given."""
        ...


class IntegerProduct:
    """int8 x [N, in] times int8 weight [out, in], summed in int32: float32 [N, out] of the sums times a scale [out]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        weight, self.scale = weight.contiguous(), scale.float().contiguous()  # packing looks at no strides
        self.packed = self.weight = None
        if weight.is_cuda or not has_int8_instructions():
            self.weight = weight
        else:
            self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
            self.zero_points = torch.zeros(len(scale), dtype=torch.int32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            return int_mm(x, self.weight) * self.scale
        # x, its scale and zero point; weight, its scales and zero points; bias; the result's scale, zero point, dtype;
        # nothing applied to it.
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )


def has_int8_instructions() -> bool:
    """Whether oneDNN multiplies int8 exactly here.  Older processors add pairs of products in 16 bits, which
    saturates."""
    instructions = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(instructions.get(name) for name in ("avx512_vnni", "amx_int8"))


def int_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 x [N, in] @ int8 weight [out, in].T: the sums, int32 [N, out], or the same in float64 for sizes that a GPU's
    integer product does not take."""
    if not x.is_cuda:
        return torch._int_mm(x, weight.t())
    num_rows, (num_out, num_in) = len(x), weight.shape
    if num_out % 8 or num_in % 8:
        return x.double() @ weight.double().t()
    padded = F.pad(x, (0, 0, 0, max(0, 32 - num_rows)))  # more than 16 rows are asked for
    return torch._int_mm(padded, weight.t())[:num_rows]


class Int8Weights:
    """Weight-only int8 on a CPU: float activations, int8 instructions.

    A row x is written in two digits of base 127: x = m / 127 * (high + low / 127), m its largest magnitude, high cut
    off and low rounded.  What is lost is at most m / 2 / 127^2, 2^-15 of the largest.  Both digits are rows of one
    integer product, which costs no more than one row while reading the weights is what takes the time.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        self._product = IntegerProduct(weight, scale.float() / INT8_MAX)
        self._base = torch.tensor(float(INT8_MAX))

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        rest = x * (self._base / largest)
        high = rest.to(torch.int8)
        low = rest.sub_(high).mul_(self._base).round_().to(torch.int8)
        return QuantizedRows(torch.cat([high, low]), largest)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = _rows(x)
        high, low = self._product(rows.values).chunk(2)  # [N, out] each
        y = torch.add(high, low, alpha=1 / INT8_MAX)
        return y.mul_(rows.scale) if bias is None else torch.addcmul(bias, y, rows.scale)


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
    """Weight-only on a GPU, written plainly: weights widened to the engine's dtype at each product."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self._weight, self._scale, self._dtype = weight, scale, dtype

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        steps = unpack_int4(self._weight) if self._weight.dtype == torch.uint8 else self._weight
        return _with_bias(F.linear(_floats(x), dequantize_weight(steps, self._scale).to(self._dtype)), bias)


class SmoothQuantLinear:
    """int8 activations times int8 weights: Y = int32 sum * row scale * column scale (+ bias).

    input_scale: value per step of every input, or None where each row finds its own.  smoother: [in], what inputs are
    divided by first, or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        smoother: torch.Tensor | None,
        dtype: torch.dtype,
    ):
        self._product = IntegerProduct(weight, scale)
        self.input_scale, self.smoother = input_scale, smoother
        self._dtype = dtype if weight.is_cuda else torch.float32

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        x = x.float() if self.smoother is None else x / self.smoother
        scale = row_scales(x, INT8_MAX) if self.input_scale is None else self.input_scale
        return QuantizedRows(to_int8(x, scale), scale)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = _rows(x)
        return _with_bias((self._product(rows.values) * rows.scale).to(self._dtype), bias)


class Fp8Linear:
    """FP8 activations times FP8 weights, written plainly: both are widened to a type that holds every FP8 number."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None, dtype: torch.dtype):
        # Sums of products of up to 448^2 are more than float16 holds.
        self._wide = torch.bfloat16 if weight.is_cuda or dtype == torch.bfloat16 else torch.float32
        # Processors do not multiply FP8: widening once at load trades memory for time.
        self._weight = weight if weight.is_cuda else weight.to(self._wide)
        self._scale, self.input_scale, self._dtype = scale, input_scale, dtype

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        scale = row_scales(x, FP8_MAX) if self.input_scale is None else self.input_scale
        return QuantizedRows(to_fp8(x, scale), scale)

    def multiply(self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = _rows(x)
        values = rows.values.to(self._wide)
        if not self._weight.is_cuda:
            return _with_bias(F.linear(values, self._weight).float() * self._scale * rows.scale, bias)
        y = torch.mm(values, self._weight.to(self._wide).t(), out_dtype=torch.float32)
        return _with_bias((y * self._scale * rows.scale).to(self._dtype), bias)


def _rows(x: QuantizedRows | torch.Tensor) -> QuantizedRows:
    if not isinstance(x, QuantizedRows):
        raise TypeError("this product multiplies prepared rows")
    return x


def _floats(x: QuantizedRows | torch.Tensor) -> torch.Tensor:
    if isinstance(x, QuantizedRows):
        raise TypeError("this product multiplies float rows")
    return x


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y.add_(bias)


def quantized_linears(
    weights: Dict[str, torch.Tensor], quant: QuantConfig, dtype: torch.dtype
) -> dict[str, QuantLinear]:
    """The products of an engine's quantised weights, by the name of the linear layer; {} for a float engine.

    weights: as `gpt.engine.weights.engine_tensors` makes them.  dtype: the engine's.
    """
    names = [name.removesuffix(".weight_scale") for name in weights if name.endswith(".weight_scale")]
    return {name: _make(weights, name, quant, dtype) for name in names}


def _make(weights: Dict[str, torch.Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> QuantLinear:
    weight, scale = weights[name + ".weight"], weights[name + ".weight_scale"]
    input_scale, smoother = weights.get(name + ".input_scale"), weights.get(name + ".smoother")
    if quant.weights == "fp8":
        return Fp8Linear(weight, scale, input_scale, dtype)
    if quant.smooth_quant:
        return SmoothQuantLinear(weight, scale, input_scale, smoother, dtype)
    if weight.is_cuda:
        return WidenedWeights(weight, scale, dtype)
    return Int4Weights(weight, scale, dtype) if quant.weights == "int4" else Int8Weights(weight, scale)
