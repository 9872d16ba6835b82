"""int8 and FP8 products of prompts on one GPU: launch parameters side by side, beside what PyTorch's libraries offer.

    python3 benchmarks/bench_w8a8.py --csv benchmarks/results/w8a8_gpu.csv

Times are of launches in a CUDA graph (see bench_kernels.py).  Candidates are compiled by processes of their own first,
as many as there are processors.  Then the kernels that make the products' inputs.  TOP/s count two operations per pair.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from bench_kernels import MODELS, PRODUCTS, Launch, half, parameters, product_shape, random_int8, time_launch
from common import append_csv, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from gpt.kernels.w8a8_config import HopperConfig, W8a8Config

# block_m, block_n, block_k, warps, stages, parts, descriptors; or of the kernel for compute capability 9.0, by_tokens
CANDIDATES = ((128, 128, 128, 4, 3, 1, True), (False,), (True,))
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Operands:
    """Of one product: x [M, K], two weights [2, N, K] that take turns, scales and bias."""

    x: torch.Tensor
    weights: torch.Tensor
    row_scale: torch.Tensor
    col_scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, num_tokens: int, num_rows: int, num_columns: int) -> Operands:
        x, weights = (random_int8(*shape) for shape in ((num_tokens, num_columns), (2, num_rows, num_columns)))
        row_scale, col_scale = (torch.rand(size, device="cuda") * 1e-3 for size in (num_tokens, num_rows))
        return cls(x.to(dtype), weights.to(dtype), row_scale, col_scale, half(num_rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-xl")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU: kernels are measured compiled", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    compile_candidates(args.model)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for product in PRODUCTS:
        for dtype in NAMES:
            rows += measure(args, product, product_launches(dtype, args.tokens, *product_shape(args.model, product)))
            if product == "fc1":
                rows += measure(args, product, fused_launches(dtype, args))
        rows += measure(args, product, float_launches(args.tokens, *product_shape(args.model, product)))
    rows += measure(args, "rows", row_launches(args.tokens, MODELS[args.model][1]))
    print_table(rows)
    if args.csv:
        append_csv(args.csv, rows)
    return 0


def compile_candidates(model: str) -> None:
    """Into Triton's cache on disk."""
    lengths = {product_shape(model, product)[1] for product in PRODUCTS}
    kinds = [(length, "none", False) for length in lengths]
    kinds += [(product_shape(model, "fc1")[1], "gelu_tanh", quantizes) for quantizes in (False, True)]
    work = [(dtype, tile, *kind) for dtype in NAMES for tile in CANDIDATES for kind in kinds]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(compile_one, work))


def compile_one(work: tuple[torch.dtype, tuple[int, ...], int, str, bool]) -> None:
    """One launch of a small product whose kernel is that of the large ones."""
    dtype, tile, num_columns, activation, quantizes = work
    try:
        operands = Operands.random(dtype, 256, 512, num_columns)
        next(our_launches(operands, [tile], activation, quantizes))[1](0)
        torch.cuda.synchronize()
    except Exception as error:  # told again where it is measured
        print(f"{NAMES[dtype]} {tile}: {type(error).__name__}", file=sys.stderr)


def config_of(tile: tuple[int, ...]) -> W8a8Config | HopperConfig:
    from gpt.kernels.w8a8_config import HopperConfig, W8a8Config

    if len(tile) == 1:
        return HopperConfig(by_tokens=bool(tile[0]))
    block_m, block_n, block_k, num_warps, num_stages, split_k, descriptors = tile
    return W8a8Config(block_m, block_n, block_k, num_warps, num_stages, split_k, bool(descriptors))


def name_of(tile: tuple[int, ...]) -> str:
    return ("hopper " if len(tile) == 1 else "") + parameters(config_of(tile))


def our_launches(
    operands: Operands, tiles: Sequence[tuple[int, ...]], activation: str = "none", quantizes: bool = False
) -> Iterator[tuple[str, Launch]]:
    from gpt.kernels.w8a8 import w8a8
    from gpt.kernels.w8a8_epilogue import NextInput

    x, weights = operands.x, operands.weights
    out = torch.empty((len(x), weights.shape[1]), dtype=x.dtype if quantizes else torch.float16, device="cuda")
    next_input = NextInput(torch.tensor(0.01, device="cuda"), torch.empty(len(x), device="cuda"))
    for tile in tiles:
        config = config_of(tile)

        def launch(copy: int, config: W8a8Config | HopperConfig = config) -> None:
            w8a8(
                x,
                operands.row_scale,
                weights[copy],
                operands.col_scale,
                out,
                config=config,
                bias=operands.bias,
                activation=activation,
                next_input=next_input if quantizes else None,
            )

        yield name_of(tile), launch


def product_launches(
    dtype: torch.dtype, num_tokens: int, num_rows: int, num_columns: int
) -> Iterator[tuple[str, str, Launch, int]]:
    """(what, parameters, launch, operations) of our candidates and PyTorch's product of the type."""
    operands = Operands.random(dtype, num_tokens, num_rows, num_columns)
    operations = 2 * num_tokens * num_rows * num_columns
    x, weights = operands.x, operands.weights
    for name, launch in our_launches(operands, CANDIDATES):
        yield NAMES[dtype], name, launch, operations
    if dtype == torch.int8:
        yield "torch._int_mm, int32 out", "", lambda copy: torch._int_mm(x, weights[copy].t()), operations
        return
    one = torch.ones((), device="cuda")
    column, row = operands.row_scale[:, None], operands.col_scale[None]

    def per_tensor(copy: int) -> torch.Tensor:
        return torch._scaled_mm(x, weights[copy].t(), one, one, out_dtype=torch.float16)

    def per_row(copy: int) -> torch.Tensor:
        return torch._scaled_mm(x, weights[copy].t(), column, row, out_dtype=torch.bfloat16)

    yield "torch._scaled_mm, one scale", "", per_tensor, operations
    yield "torch._scaled_mm, rows, bfloat16 out", "", per_row, operations


def fused_launches(dtype: torch.dtype, args: argparse.Namespace) -> Iterator[tuple[str, str, Launch, int]]:
    """FC1 with GELU behind it, stored in float16 and as the input of FC2."""
    num_rows, num_columns = product_shape(args.model, "fc1")
    operands = Operands.random(dtype, args.tokens, num_rows, num_columns)
    for quantizes in (False, True):
        what = f"{NAMES[dtype]}, gelu, {NAMES[dtype] if quantizes else 'float16'} out"
        for name, launch in our_launches(operands, CANDIDATES, "gelu_tanh", quantizes):
            yield what, name, launch, 2 * args.tokens * num_rows * num_columns


def float_launches(num_tokens: int, num_rows: int, num_columns: int) -> Iterator[tuple[str, str, Launch, int]]:
    x, weights, bias = half(num_tokens, num_columns), half(2, num_rows, num_columns), half(num_rows)
    yield (
        "torch float16",
        "",
        lambda copy: F.linear(x, weights[copy], bias),
        2 * num_tokens * num_rows * num_columns,
    )


def row_launches(num_tokens: int, width: int) -> Iterator[tuple[str, str, Launch, int]]:
    """What makes the products' inputs: residual sum, norm and steps; steps of attention and GELU.  And what
    keeps keys and values, of 8 prompts."""
    from gpt.kernels.norm import add_norm
    from gpt.kernels.product import Norm
    from gpt.kernels.quantize_rows import quantize_rows
    from gpt.kernels.store_cache import CacheSlots, store_cache

    stream, part = torch.zeros((num_tokens, width), device="cuda"), half(1, num_tokens, width)
    norm = Norm(torch.ones(width, device="cuda"), torch.zeros(width, device="cuda"), 1e-5)
    out, row_scale = half(num_tokens, width), torch.empty(num_tokens, device="cuda")
    steps, inner = random_int8(num_tokens, width), half(num_tokens, 4 * width)
    inner_steps = random_int8(num_tokens, 4 * width)
    yield "sum and norm, float16 out", "", lambda copy: add_norm(stream, out, norm, parts=part), 0
    yield (
        "sum and norm, int8 out",
        "",
        lambda copy: quantize_rows(stream, steps, row_scale, norm=norm, parts=part),
        0,
    )
    yield "int8 of attention", "", lambda copy: quantize_rows(out, steps, row_scale), 0
    yield "int8 of gelu", "", lambda copy: quantize_rows(inner, inner_steps, row_scale), 0
    heads, blocks = half(num_tokens, 3 * width // 64, 64), half(2, 8, width // 64, num_tokens // 8, 64)
    slots = CacheSlots(torch.arange(num_tokens, dtype=torch.int32, device="cuda"), blocks)
    yield "keys and values to the cache", "", lambda copy: store_cache(heads, slots), 0


def measure(
    args: argparse.Namespace, shape: str, launches: Iterator[tuple[str, str, Launch, int]]
) -> list[dict[str, object]]:
    """A row per launch; one that fails is told and left out."""
    rows: list[dict[str, object]] = []
    for what, name, launch, operations in launches:
        try:
            microseconds = time_launch(launch, 2)
        except Exception:  # a library may refuse a type or a size, and the others are still wanted
            print(f"failed: {shape} {what} {name}\n{traceback.format_exc(limit=-1)}", flush=True)
            continue
        rows.append(
            {
                "device": torch.cuda.get_device_name(),
                "versions": describe_versions("torch", "triton"),
                "model": args.model,
                "tokens": args.tokens,
                "shape": shape,
                "what": what,
                "parameters": name,
                "us": round(microseconds, 1),
                "tops": round(operations / microseconds / 1e6, 1),
            }
        )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    columns = ("shape", "what", "parameters", "us", "tops")
    for cells in (columns, *([str(row[name]) for name in columns] for row in rows)):
        print(" ".join(cell.ljust(width) for cell, width in zip(cells, (6, 38, 26, 9, 8), strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
