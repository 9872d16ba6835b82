"""int8 times int8, summed exactly in int32, by the library call that is fastest on the device.

On a CPU weights are packed at load.  oneDNN is fast with AMX, but has no kernel for int8 inputs without it: it falls
back to a plain loop, hundreds of times as slow.  FBGEMM multiplies unsigned inputs by AVX-512 VNNI, makes their zero
point good in integers, and reads weights faster than oneDNN does.  benchmarks/bench_linear.py measures the calls again.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
import torch.nn.functional as F

from gpt.engine.cpu import cpu_has


class IntegerProduct(Protocol):
    """The product with one weight.  takes: the dtype in which it wants the integers of its input."""

    takes: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in], integers of -128 to 127 in the dtype `takes` -> float32 [N, out], the sums times the scale."""
        ...


def integer_product(weight: torch.Tensor, scale: torch.Tensor) -> IntegerProduct:
    """weight int8 [out, in], scale [out]."""
    weight, scale = weight.contiguous(), scale.float().contiguous()  # packing looks at no strides
    if not weight.is_cuda:
        if OneDnnProduct.is_fast():
            return OneDnnProduct(weight, scale)
        if FbgemmProduct.is_fast():
            return FbgemmProduct(weight, scale)
    return PlainProduct(weight, scale)


class OneDnnProduct:
    """oneDNN's, int8 inputs: for AMX."""

    takes = torch.int8

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = scale
        self._zero_points = torch.zeros(len(scale), dtype=torch.int32)

    @staticmethod
    def is_fast() -> bool:
        return torch.backends.mkldnn.is_available() and cpu_has("amx_int8")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # x, its scale and zero point; weight, its scales and zero points; bias; the result's scale, zero point, dtype;
        # nothing applied to it.
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self._packed, self._scale, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )


class FbgemmProduct:
    """FBGEMM's, which turns float inputs into unsigned integers itself: for AVX-512 VNNI.

    Without VNNI it adds pairs of products in 16 bits, which saturates.
    """

    takes = torch.float32

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():  # tensors of quantised types are to leave PyTorch; its release is pinned
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    @staticmethod
    def is_fast() -> bool:
        return torch.backends.quantized.engine in ("x86", "fbgemm") and cpu_has("avx512_vnni")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 128, self._packed)


class PlainProduct:
    """PyTorch's own: for GPUs, and for every processor."""

    takes = torch.int8

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        self._weight, self._scale = weight, scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return int_mm(x, self._weight) * self._scale


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
