"""The residual stream of a decode step: embedding into it, adding to it, and normalising what it holds.

The stream is float32, [M, E]: one row per sequence, one program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import (
    cdiv,
    fetch_before,
    fetch_share,
    launch_options,
    load_vector,
    next_power_of_2,
    wait_for_inputs,
)
from gpt.kernels.product import Norm


@triton.jit
def embed_kernel(
    ids_ptr,  # [M] int32
    positions_ptr,  # [M] int32
    words_ptr,  # [V, E]
    places_ptr,  # [P, E]
    x_ptr,  # [M, E] float32
    E: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < E
    token = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(words_ptr + token * E + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_PLACES:
        position = tl.load(positions_ptr + row).to(tl.int64)
        x += tl.load(places_ptr + position * E + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * E + columns, x, mask=inside)


def embed(
    ids: torch.Tensor, positions: torch.Tensor, words: torch.Tensor, places: torch.Tensor | None, x: torch.Tensor
) -> None:
    """x [M, E] float32 = words[ids] (+ places[positions]); ids and positions [M] int32, words [V, E], places [P, E].

    Raises ValueError for shapes that do not fit.
    """
    num_rows, width = x.shape
    tables = {"words": words, "places": words if places is None else places}
    for name, table in tables.items():
        if table.shape[1] != width or not table.is_contiguous():
            raise ValueError(f"{name}: found {tuple(table.shape)}, expected {width} columns, contiguous")
    if ids.shape != (num_rows,) or positions.shape != (num_rows,):
        raise ValueError(f"found ids {tuple(ids.shape)}, positions {tuple(positions.shape)}, expected {num_rows} each")
    block = min(1024, next_power_of_2(width))
    embed_kernel[(num_rows, cdiv(width, block))](
        ids,
        positions,
        words,
        places if places is not None else words,
        x,
        E=width,
        HAS_PLACES=places is not None,
        BLOCK=block,
        num_warps=4,
        **launch_options(x.device),
    )


@triton.jit
def add_norm_kernel(
    x_ptr,  # [M, E] float32
    parts_ptr,  # [PARTS, M, E]
    bias_ptr,  # [E]
    weight_ptr,  # [E]
    norm_bias_ptr,  # [E]
    out_ptr,  # [M, E]
    next_weight_ptr,  # what the product after this will read
    M,
    next_lines,
    epsilon,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    PADDED_E: tl.constexpr,
    NEXT_SHARE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if NEXT_SHARE > 0 and row >= M:
        fetch_share(next_weight_ptr, next_lines, tl.program_id(0) - M, NEXT_SHARE)
        return
    columns = tl.arange(0, PADDED_E)
    y = summed_row(
        x_ptr,
        parts_ptr,
        bias_ptr,
        weight_ptr,
        norm_bias_ptr,
        row,
        columns,
        M,
        epsilon,
        E,
        PARTS,
        HAS_BIAS,
        NORM,
        DEPENDENT,
    )
    if NORM != "none":
        tl.store(out_ptr + row * E + columns, y.to(out_ptr.dtype.element_ty), mask=columns < E)


@triton.jit
def summed_row(
    x_ptr,  # [M, E]
    parts_ptr,  # [PARTS, M, E]
    bias_ptr,  # [E]
    weight_ptr,  # [E]
    norm_bias_ptr,  # [E]
    row,
    columns,
    M,
    epsilon,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row of x, float32, with its parts and bias, which it keeps, and then normalised."""
    inside = columns < E
    weight = load_vector(weight_ptr, columns, inside, NORM != "none")
    norm_bias = load_vector(norm_bias_ptr, columns, inside, NORM == "layernorm")
    bias = load_vector(bias_ptr, columns, inside, PARTS > 0 and HAS_BIAS)
    wait_for_inputs(DEPENDENT)
    x = tl.load(x_ptr + row * E + columns, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            x += tl.load(parts_ptr + (part * M + row) * E + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        tl.store(x_ptr + row * E + columns, x, mask=inside)
    if NORM == "layernorm":
        centred = tl.where(inside, x - tl.sum(x) / E, 0.0)
        x = centred * tl.rsqrt(tl.sum(centred * centred) / E + epsilon) * weight + norm_bias
    elif NORM == "rmsnorm":
        x = x * tl.rsqrt(tl.sum(x * x) / E + epsilon) * weight
    return x


def check_rows(x: torch.Tensor, norm: Norm | None, parts: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """Raises ValueError naming what does not fit: x [M, E], parts [PARTS, M, E], bias and the norm's vectors [E]."""
    width = x.shape[1:]
    vectors = {"bias": bias, "norm weight": norm.weight if norm else None, "norm bias": norm.bias if norm else None}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != width:
            raise ValueError(f"{name}: found {tuple(vector.shape)}, expected {tuple(width)}")
    if parts is not None and (parts.dim() != 3 or parts.shape[1:] != x.shape or not parts.is_contiguous()):
        raise ValueError(f"parts: found {tuple(parts.shape)}, expected parts of {tuple(x.shape)}, contiguous")
    if not x.is_contiguous():
        raise ValueError("x: found strides, expected contiguous rows")


def add_norm(
    x: torch.Tensor,
    out: torch.Tensor | None,
    norm: Norm | None,
    *,
    parts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    next_weight: torch.Tensor | None = None,
) -> None:
    """x += sum of parts (+ bias); out = norm(x).

    x [M, E] float32.  parts [PARTS, M, E] of any float type, added in their order; bias [E], only with parts.  out
    [M, E] of any float type, or None with `norm` None.  next_weight: what the product of `out` will read; some of it is
    fetched into the L2 cache meanwhile.

    Raises ValueError for shapes that do not fit.
    """
    num_rows, width = x.shape
    check_rows(x, norm, parts, bias)
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(f"out: found {tuple(out.shape)}, expected {tuple(x.shape)}, contiguous")
    fetch = fetch_before(next_weight, x)
    add_norm_kernel[(num_rows + fetch.num_programs,)](
        x,
        parts if parts is not None else x,
        bias if bias is not None else x,
        norm.weight if norm else x,
        norm.bias if norm and norm.bias is not None else x,
        out if out is not None else x,
        fetch.weight,
        num_rows,
        fetch.num_lines,
        norm.epsilon if norm else 0.0,
        E=width,
        PARTS=0 if parts is None else len(parts),
        HAS_BIAS=bias is not None,
        NORM="none" if norm is None else "rmsnorm" if norm.bias is None else "layernorm",
        PADDED_E=next_power_of_2(width),
        NEXT_SHARE=fetch.share,
        num_warps=4 if width <= 4096 else 8,
        **launch_options(x.device),
    )
