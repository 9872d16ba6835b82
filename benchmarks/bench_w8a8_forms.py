"""What int8 and FP8 products of a prompt do beside multiplying: alone or with the kernels that this replaces or feeds.

    python3 benchmarks/bench_w8a8_forms.py --csv benchmarks/results/w8a8_forms_gpu.csv

QKV and the cache: a kernel of its own fills it, or the product does, with K and V beside the queries or without; and
attention over either.  dense and FC2: a part in float16 that the next rows add to the residual stream, or the product
adds to it.  Times are of launches in a CUDA graph (see bench_kernels.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import MODELS, Launch, half, product_shape, random_int8
from bench_w8a8 import CANDIDATES, NAMES, Operands, config_of, measure, name_of, print_table
from common import append_csv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPTS = 8
HEAD_SIZE = 64
# Slots of a sequence beyond its prompt.
SPARE_SLOTS = 128

Forms = Iterator[tuple[str, str, Launch, int]]  # what, parameters, launch, operations


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-xl")
    parser.add_argument("--tokens", type=int, default=8192, help=f"of {PROMPTS} prompts together (default: 8192)")
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU: kernels are measured compiled", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    compile_forms(args.model)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for product in ("qkv", "dense", "fc2"):
        for dtype in NAMES:
            for tile in CANDIDATES:
                rows += measure(args, product, product_forms(product, dtype, tile, args.model, args.tokens))
    rows += measure(args, "attend", attention_forms(args.model, args.tokens))
    rows += measure(args, "rows", row_forms(args.model, args.tokens))
    print_table(rows)
    if args.csv:
        append_csv(args.csv, rows)
    return 0


def compile_forms(model: str) -> None:
    """Into Triton's cache on disk, by as many processes as there are processors."""
    work = [
        (product, dtype, tile, model) for product in ("fc2", "qkv", "dense") for dtype in NAMES for tile in CANDIDATES
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_some, work))


def compile_some(work: tuple[str, torch.dtype, tuple[int, ...], str]) -> None:
    """Launches of few tokens, whose kernels are those of many."""
    product, dtype, tile, model = work
    try:
        for _, _, launch, _ in product_forms(product, dtype, tile, model, 256):
            launch(0)
        torch.cuda.synchronize()
    except Exception as error:  # told again where it is measured
        print(f"{product} {NAMES[dtype]} {tile}: {type(error).__name__}", file=sys.stderr)


def product_forms(product: str, dtype: torch.dtype, tile: tuple[int, ...], model: str, num_tokens: int) -> Forms:
    num_rows, num_columns = product_shape(model, product)
    operands = Operands.random(dtype, num_tokens, num_rows, num_columns)
    forms = cache_forms if product == "qkv" else stream_forms
    for what, name, launch in forms(operands, tile):
        yield f"{NAMES[dtype]}, {what}", name, launch, 2 * num_tokens * num_rows * num_columns


def cache_forms(operands: Operands, tile: tuple[int, ...]) -> Iterator[tuple[str, str, Launch]]:
    """QKV of prompts of one length."""
    from gpt.kernels.store_cache import CacheSlots, store_cache
    from gpt.kernels.w8a8 import w8a8

    num_tokens, num_rows = len(operands.x), operands.weights.shape[1]
    groups, length = num_rows // 3 // HEAD_SIZE, num_tokens // PROMPTS
    slots = length + SPARE_SLOTS
    places = torch.arange(PROMPTS)[:, None] * slots + torch.arange(length)
    cache = CacheSlots(places.flatten().int().cuda(), half(2, PROMPTS, groups, slots, HEAD_SIZE))
    qkv, queries = half(num_tokens, num_rows), half(num_tokens, groups * HEAD_SIZE)
    config = config_of(tile)

    def multiply(copy: int, out: torch.Tensor, target: CacheSlots | None) -> None:
        weight = operands.weights[copy]
        w8a8(
            operands.x,
            operands.row_scale,
            weight,
            operands.col_scale,
            out,
            config=config,
            bias=operands.bias,
            cache=target,
        )

    def apart(copy: int) -> None:
        multiply(copy, qkv, None)
        store_cache(qkv.view(num_tokens, -1, HEAD_SIZE), cache)

    name = name_of(tile)
    yield "product alone", name, lambda copy: multiply(copy, qkv, None)
    yield "product, then cache", name, apart
    yield "product and cache", name, lambda copy: multiply(copy, qkv, cache)
    yield "queries, K and V to the cache", name, lambda copy: multiply(copy, queries, cache)


def stream_forms(operands: Operands, tile: tuple[int, ...]) -> Iterator[tuple[str, str, Launch]]:
    """A product that ends in the residual stream, alone and with the rows behind it."""
    from gpt.kernels.product import Norm
    from gpt.kernels.quantize_rows import quantize_rows
    from gpt.kernels.w8a8 import w8a8

    num_tokens, width = len(operands.x), operands.weights.shape[1]
    stream, part = torch.zeros((num_tokens, width), device="cuda"), half(1, num_tokens, width)
    norm = Norm(half(width), half(width), 1e-5)
    steps, row_scale = part[0].to(operands.x.dtype), torch.empty(num_tokens, device="cuda")
    input_scale, config, name = torch.tensor(0.01, device="cuda"), config_of(tile), name_of(tile)

    def multiply(copy: int, out: torch.Tensor, *, add: bool) -> None:
        weight, bias = operands.weights[copy], operands.bias
        w8a8(operands.x, operands.row_scale, weight, operands.col_scale, out, config=config, bias=bias, add_to_out=add)

    def rows(parts: torch.Tensor | None) -> None:
        quantize_rows(stream, steps, row_scale, norm=norm, input_scale=input_scale, parts=parts)

    def part_and_rows(copy: int) -> None:
        multiply(copy, part[0], add=False)
        rows(part)

    def into_stream_and_rows(copy: int) -> None:
        multiply(copy, stream, add=True)
        rows(None)

    yield "part", name, lambda copy: multiply(copy, part[0], add=False)
    yield "part, rows", name, part_and_rows
    yield "into the stream", name, lambda copy: multiply(copy, stream, add=True)
    yield "into the stream, rows", name, into_stream_and_rows


def attention_forms(model: str, num_tokens: int) -> Forms:
    """PyTorch's attention of prompts of one length, as the queries' neighbours or the cache give it K and V."""
    width = MODELS[model][1]
    num_heads, length = width // HEAD_SIZE, num_tokens // PROMPTS
    qkv = half(num_tokens, 3 * num_heads, HEAD_SIZE).unflatten(0, (PROMPTS, length)).transpose(1, 2)
    queries = half(num_tokens, num_heads, HEAD_SIZE).unflatten(0, (PROMPTS, length)).transpose(1, 2)
    blocks = half(2, PROMPTS, num_heads, length + SPARE_SLOTS, HEAD_SIZE)
    q, k, v = qkv.split(num_heads, dim=1)
    sources = {"K and V beside the queries": (q, k, v), "K and V of the cache": (queries, *blocks[:, :, :, :length])}
    for what, (q, k, v) in sources.items():
        yield (
            what,
            "",
            lambda copy, q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            2 * num_tokens * length * width,
        )


def row_forms(model: str, num_tokens: int) -> Forms:
    """Norm and steps with calibrated scales and without, of the stream alone and with a part."""
    from gpt.kernels.product import Norm
    from gpt.kernels.quantize_rows import quantize_rows

    width = MODELS[model][1]
    stream, part = torch.zeros((num_tokens, width), device="cuda"), half(1, num_tokens, width)
    norm = Norm(half(width), half(width), 1e-5)
    steps, row_scale = random_int8(num_tokens, width), torch.empty(num_tokens, device="cuda")
    scale = torch.tensor(0.01, device="cuda")
    for what, parts, input_scale in (
        ("stream and part", part, scale),
        ("stream", None, scale),
        ("stream, scale of the row", None, None),
    ):

        def launch(
            copy: int,
            parts: torch.Tensor | None = parts,
            input_scale: torch.Tensor | None = input_scale,
        ) -> None:
            quantize_rows(stream, steps, row_scale, norm=norm, input_scale=input_scale, parts=parts)

        yield what, "", launch, 0


if __name__ == "__main__":
    sys.exit(main())
