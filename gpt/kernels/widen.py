"""Weight-only int8 and int4 as floats, for products by libraries: each value read once and written once.

The same written plainly is gpt.quant.dequantize_weight, whose float32 values are rounded to the type wanted; int4 is
packed as gpt.kernels.int4 tells.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import cdiv, launch_options, wait_for_inputs
from gpt.kernels.product import expect

_STORE_BYTES = 16  # the most that a thread writes at once
_VECTORS, _NUM_WARPS = 512, 4  # per program: four stores per thread


@triton.jit
def _widen_kernel(
    weight_ptr,  # [vectors * VECTOR] int8, or half as many bytes of PACKED pairs
    scale_ptr,  # [vectors / PER_SCALE]
    out_ptr,  # [vectors * VECTOR]
    num_vectors,
    PACKED: tl.constexpr,
    VECTOR: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A vector is what a thread writes at once.  Rows are not told apart: a scale belongs to PER_SCALE vectors."""
    vectors = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = vectors < num_vectors
    held: tl.constexpr = VECTOR // 2 if PACKED else VECTOR
    places = vectors[:, None] * held + tl.arange(0, held)[None, :]
    steps = tl.load(weight_ptr + places, mask=inside[:, None], other=0).to(tl.int32)
    scale = tl.load(scale_ptr + vectors // PER_SCALE, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(DEPENDENT)  # until then another product may read its weights where `out` lies
    if PACKED:
        steps = tl.reshape(tl.join((steps << 28) >> 28, (steps << 24) >> 28), (BLOCK, VECTOR))
    values = (steps.to(tl.float32) * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + vectors[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :], values, mask=inside[:, None])


def widen(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, K] of any float type = steps * scale, the product in float32.

    weight int8 [N, K], or uint8 [N, K / 2], two steps in a byte.  scale, of any float type: [N], or [N, groups] for
    equal groups of a row's columns.

    Raises ValueError for shapes and types that do not fit.
    """
    packed = weight.dtype == torch.uint8
    num_rows, width = weight.shape
    num_columns = 2 * width if packed else width
    expect("weight", weight, (num_rows, width), torch.uint8 if packed else torch.int8)
    expect("out", out, (num_rows, num_columns), out.dtype)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    expect("scale", scale, (num_rows, *scale.shape[1:2]), scale.dtype)
    group = num_columns // groups
    if group * groups != num_columns or (packed and group % 2):
        raise ValueError(f"scale: found {groups} groups in {num_columns} columns, expected equal ones of whole bytes")
    vector = gcd(group, _STORE_BYTES // out.itemsize)
    num_vectors = out.numel() // vector
    _widen_kernel[(cdiv(num_vectors, _VECTORS),)](
        weight,
        scale,
        out,
        num_vectors,
        PACKED=packed,
        VECTOR=vector,
        PER_SCALE=group // vector,
        BLOCK=_VECTORS,
        num_warps=_NUM_WARPS,
        **launch_options(out.device),
    )
