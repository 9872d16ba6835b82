"""Each kernel alone at a model's shapes on one GPU: microseconds, GB/s, TOP/s, beside PyTorch's float16 product.

python3 benchmarks/bench_kernels.py --model gpt2-xl --batch_size 1 8 64 --csv kernels.csv

A kernel runs in a CUDA graph, launch after launch, over so many copies of its weights that none is still in the L2
cache when its turn comes again.  Bytes are those that have to be read and written once.  Where several launch
parameters are tried, the row is the fastest one's and names it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import append_csv, describe_versions

MODELS = {"gpt2-medium": (16, 1024), "gpt2-xl": (25, 1600)}  # heads, width
PRODUCTS = ("qkv", "dense", "fc1", "fc2")
GROUP_SIZE = 64
HEAD_SIZE = 64
NUM_SLOTS = 256
_PER_BLOCK = 64  # slots of a paged cache
COLD_BYTES = 160 << 20  # more than any card's second-level cache
PROMPT_TOKENS = 8192
# integer_gemv's block_n, pieces, warps.
INTEGER_TILES = ((4, 8, 1), (8, 8, 1), (8, 8, 2), (16, 8, 2), (8, 8, 4), (16, 8, 4))

Launch = Callable[[int], object]  # of the copy to work on


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.  make: -> number of copies and, by the name of its parameters, how to launch it."""

    kernel: str
    model: str
    shape: str
    num_tokens: int
    num_bytes: int
    operations: int
    make: Callable[[], tuple[int, dict[str, Launch]]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["gpt2-xl", "gpt2-medium"])
    parser.add_argument("--product", nargs="+", choices=PRODUCTS, default=["fc1", "fc2"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 64], help="of decode steps; 0 for none")
    parser.add_argument("--seconds", type=float, default=90, help="no case is begun later (default: 90)")
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU: kernels are measured compiled", file=sys.stderr)
        return 2
    end = time.perf_counter() + args.seconds
    rows: list[dict[str, object]] = []
    left_out = 0
    for case in all_cases(args.model, args.product, [size for size in args.batch_size if size > 0]):
        if time.perf_counter() > end:
            left_out += 1
            continue
        rows.append(measure(case))
    print_table(rows)
    print(f"{left_out} cases left out for lack of time" if left_out else "all cases measured")
    if args.csv:
        append_csv(args.csv, rows)
    return 0


def all_cases(models: Iterable[str], products: Iterable[str], batch_sizes: Iterable[int]) -> Iterator[Case]:
    """Those that matter most first."""
    shapes = [(model, product) for model in models for product in products]
    for batch_size in batch_sizes:
        for model, product in shapes:
            yield from weight_products(model, product, batch_size)
            yield integer_product(model, product, batch_size)
    for model in models:
        for num_tokens in (*batch_sizes, PROMPT_TOKENS):
            yield from row_kernels(model, num_tokens)
        for batch_size in batch_sizes:
            yield attention_case(model, batch_size)
            yield from plugin_attention_cases(model, batch_size)
    for model, product in shapes:
        yield from widening_cases(model, product)


def product_shape(model: str, product: str) -> tuple[int, int]:
    """N, K."""
    width = MODELS[model][1]
    return {
        "qkv": (3 * width, width),
        "dense": (width, width),
        "fc1": (4 * width, width),
        "fc2": (width, 4 * width),
    }[product]


def num_copies(num_bytes: int) -> int:
    return max(2, -(-COLD_BYTES // num_bytes))


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16)


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def weight_bytes(num_rows: int, num_columns: int) -> dict[str, int]:
    """With scales."""
    return {
        "float16": 2 * num_rows * num_columns,
        "int8": num_rows * num_columns + 2 * num_rows,
        "int4": num_rows * num_columns // 2 + 2 * num_rows * num_columns // GROUP_SIZE,
        "torch": 2 * num_rows * num_columns,
    }


def integer_weights(name: str, copies: int, num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 or packed int4 [copies, N, K or K / 2], and scales of one."""
    if name == "int8":
        return random_int8(copies, num_rows, num_columns), half(num_rows)
    packed = random_int8(copies, num_rows, num_columns // 2).view(torch.uint8)
    return packed, half(num_rows, num_columns // GROUP_SIZE)


def weight_products(model: str, product: str, num_tokens: int) -> Iterator[Case]:
    """A decode step's products with float16, int8 and int4 weights, and PyTorch's with float16 weights."""
    num_rows, num_columns = product_shape(model, product)
    operations = 2 * num_tokens * num_rows * num_columns
    others = 2 * num_tokens * (num_rows + num_columns)
    kind = "gemv" if num_tokens == 1 else "skinny"
    for name, size in weight_bytes(num_rows, num_columns).items():

        def make(name: str = name, size: int = size) -> tuple[int, dict[str, Launch]]:
            return weight_launches(name, num_tokens, num_rows, num_columns, num_copies(size))

        kernel = "torch float16" if name == "torch" else f"{kind} {name}"
        yield Case(kernel, model, product, num_tokens, size + others, operations, make)


def weight_launches(
    name: str, num_tokens: int, num_rows: int, num_columns: int, copies: int
) -> tuple[int, dict[str, Launch]]:
    from gpt.kernels import gemv, int4_skinny, integer_gemv, skinny

    device = torch.device("cuda")
    x, out = half(num_tokens, num_columns), half(num_tokens, num_rows)
    if name == "torch":
        matrices = half(copies, num_rows, num_columns)
        return copies, {"": lambda copy: torch.mm(x, matrices[copy].t(), out=out)}
    if name == "float16":
        weights, scale = half(copies, num_rows, num_columns), None
    else:
        weights, scale = integer_weights(name, copies, num_rows, num_columns)
    configs: list[Any]
    if num_tokens > 1:
        configs = [skinny.default_config(num_tokens, num_rows, num_columns, device, splits=False)]
        multiply: Any = int4_skinny.int4_skinny if name == "int4" else skinny.skinny
    elif scale is not None:
        configs = [integer_gemv.default_config(num_rows, num_columns, 4 if name == "int4" else 8, device)]
        configs += [integer_gemv.IntegerGemvConfig(*tile) for tile in INTEGER_TILES]
        multiply = integer_gemv.integer_gemv
    else:
        configs = [gemv.default_config(num_rows, num_columns, device)]
        multiply = gemv.gemv

    def bind(config: object) -> Launch:
        return lambda copy: multiply(x, weights[copy], out, config=config, scale=scale)

    return copies, {parameters(config): bind(config) for config in configs}


def widening_cases(model: str, product: str) -> Iterator[Case]:
    """Weights made float16 for a prompt's product, whatever its tokens."""
    num_rows, num_columns = product_shape(model, product)
    sizes = weight_bytes(num_rows, num_columns)

    def make(name: str) -> tuple[int, dict[str, Launch]]:
        from gpt.kernels.widen import widen

        copies = num_copies(sizes[name])
        weights, scale = integer_weights(name, copies, num_rows, num_columns)
        out = half(num_rows, num_columns)
        return copies, {"": lambda copy: widen(weights[copy], scale, out)}

    for name in ("int8", "int4"):
        num_bytes = sizes[name] + 2 * num_rows * num_columns
        yield Case(f"widen {name}", model, product, 0, num_bytes, 0, partial(make, name))


def integer_product(model: str, product: str, num_tokens: int) -> Case:
    """int8 times int8; bench_w8a8.py has the sizes of prompts."""
    num_rows, num_columns = product_shape(model, product)

    def make() -> tuple[int, dict[str, Launch]]:
        from gpt.kernels.w8a8 import w8a8
        from gpt.kernels.w8a8_config import default_config

        copies = num_copies(num_rows * num_columns)
        x, weights = random_int8(num_tokens, num_columns), random_int8(copies, num_rows, num_columns)
        row_scale, col_scale = (torch.rand(size, device="cuda") * 1e-4 for size in (num_tokens, num_rows))
        out = half(num_tokens, num_rows)
        config = default_config(num_tokens, num_rows, num_columns, out.device, splits=False)
        launch: Launch = lambda copy: w8a8(x, row_scale, weights[copy], col_scale, out, config=config)  # noqa: E731
        return copies, {parameters(config): launch}

    num_bytes = (num_rows + num_tokens) * num_columns + 2 * num_tokens * num_rows
    return Case("w8a8", model, product, num_tokens, num_bytes, 2 * num_tokens * num_rows * num_columns, make)


def row_kernels(model: str, num_tokens: int) -> Iterator[Case]:
    """A residual sum with the norm behind it, to float16 and to int8; int8 alone for the input of fc2."""
    width = MODELS[model][1]

    def make(integers: bool) -> tuple[int, dict[str, Launch]]:
        from gpt.kernels.norm import add_norm
        from gpt.kernels.product import Norm
        from gpt.kernels.quantize_rows import quantize_rows

        copies = num_copies(num_tokens * width * 8) if num_tokens > 64 else 8
        x, parts = torch.zeros((copies, num_tokens, width), device="cuda"), half(copies, 1, num_tokens, width)
        norm = Norm(torch.ones(width, device="cuda"), torch.ones(width, device="cuda"), 1e-5)
        out, integer_out = half(num_tokens, width), random_int8(num_tokens, width)
        row_scale = torch.empty(num_tokens, device="cuda")
        if integers:
            return copies, {
                "": lambda copy: quantize_rows(x[copy], integer_out, row_scale, norm=norm, parts=parts[copy])
            }
        return copies, {"": lambda copy: add_norm(x[copy], out, norm, parts=parts[copy])}

    def make_wide() -> tuple[int, dict[str, Launch]]:
        from gpt.kernels.quantize_rows import quantize_rows

        copies = num_copies(num_tokens * width * 8) if num_tokens > 64 else 8
        x, out = half(copies, num_tokens, 4 * width), random_int8(num_tokens, 4 * width)
        row_scale = torch.empty(num_tokens, device="cuda")
        return copies, {"": lambda copy: quantize_rows(x[copy], out, row_scale)}

    values = num_tokens * width
    yield Case("add_norm", model, "norm", num_tokens, 12 * values, 0, lambda: make(integers=False))
    yield Case("quantize_rows", model, "norm", num_tokens, 11 * values, 0, lambda: make(integers=True))
    yield Case("quantize_rows", model, "fc2 input", num_tokens, 12 * values, 0, make_wide)


def attention_case(model: str, batch_size: int) -> Case:
    """One token per sequence after three quarters of the slots, K and V in float16."""
    num_heads = MODELS[model][0]
    past = NUM_SLOTS * 3 // 4

    def make() -> tuple[int, dict[str, Launch]]:
        from gpt.kernels import attention

        device = torch.device("cuda")
        shape = (2, batch_size, num_heads, NUM_SLOTS, HEAD_SIZE)
        copies = min(64, num_copies(2 * batch_size * num_heads * NUM_SLOTS * HEAD_SIZE * 2))
        caches = half(copies, *shape)
        qkv, out = half(batch_size, 3 * num_heads, HEAD_SIZE), half(batch_size, num_heads, HEAD_SIZE)
        positions = torch.full((batch_size,), past, dtype=torch.int32, device=device)
        table = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None].contiguous()
        config = attention.default_config(batch_size, num_heads, num_heads, NUM_SLOTS, device)
        size = max(1, attention.scratch_size(batch_size, num_heads, HEAD_SIZE, config))
        parts = torch.empty(size, device=device)

        def launch(copy: int) -> None:
            keys, values = caches[copy]
            attention.decode_attention(
                qkv, positions, table, keys, values, out, scale=0.125, config=config, parts=parts
            )

        return copies, {parameters(config): launch}

    cached = 2 * batch_size * num_heads * past * HEAD_SIZE
    return Case("attention", model, f"{past} tokens", batch_size, 2 * cached, 2 * cached, make)


def plugin_attention_cases(model: str, batch_size: int) -> Iterator[Case]:
    """The attention of TensorRT plugins beside PyTorch's: a step as in `attention_case`, and prompts of half the
    slots, those over blocks too."""
    num_heads = MODELS[model][0]

    def make(past: int, num_tokens: int, ours: bool) -> tuple[int, dict[str, Launch]]:
        from gpt.kernels import cached_attention

        shape = (2, batch_size, num_heads, NUM_SLOTS, HEAD_SIZE)
        copies = min(64, num_copies(2 * batch_size * num_heads * NUM_SLOTS * HEAD_SIZE * 2))
        caches = half(copies, *shape)
        qkv = half(batch_size, num_tokens, 3 * num_heads, HEAD_SIZE)
        out = half(batch_size, num_tokens, num_heads, HEAD_SIZE)
        lengths = torch.full((batch_size,), past, dtype=torch.int32, device="cuda")
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)

        def launch(copy: int, config: Any) -> None:
            keys, values = caches[copy]
            cached_attention.cached_attention(qkv, lengths, keys, values, out, scale=0.125, config=config)

        def torch_launch(copy: int) -> None:
            keys, values = (cache[:, :, :past] for cache in caches[copy]) if past else (k, v)
            F.scaled_dot_product_attention(q, keys, values, is_causal=past == 0)

        if not ours:
            return copies, {"": torch_launch}
        configs = [cached_attention.default_config(HEAD_SIZE, 2, prompts=prompts) for prompts in (False, True)]
        return copies, {parameters(config): partial(launch, config=config) for config in configs}

    def make_paged(num_tokens: int) -> tuple[int, dict[str, Launch]]:
        from gpt.kernels import paged_attention

        shape = (2, batch_size * num_tokens // _PER_BLOCK, num_heads, _PER_BLOCK, HEAD_SIZE)
        copies = min(64, num_copies(2 * batch_size * num_heads * num_tokens * HEAD_SIZE * 2))
        caches = half(copies, *shape)
        qkv = half(batch_size * num_tokens, 3 * num_heads, HEAD_SIZE)
        out = half(batch_size * num_tokens, num_heads, HEAD_SIZE)
        config = paged_attention.default_config(HEAD_SIZE, 2)
        lengths, nothing = [num_tokens] * batch_size, [0] * batch_size
        listed = paged_attention.query_tiles(lengths, nothing, 1, config.block_m)
        rows = zip(range(0, batch_size * num_tokens, num_tokens), lengths, nothing, strict=True)
        tiles, sequences = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in (listed, list(rows)))
        table = torch.randperm(shape[1], dtype=torch.int32, device="cuda").view(batch_size, -1)

        def launch(copy: int) -> None:
            keys, values = caches[copy]
            paged_attention.paged_attention(qkv, tiles, sequences, table, keys, values, out, scale=0.125, config=config)

        return copies, {parameters(config): launch}

    for past, num_tokens in ((NUM_SLOTS * 3 // 4, 1), (0, NUM_SLOTS // 2)):
        num_bytes = 4 * batch_size * num_heads * (past + num_tokens) * HEAD_SIZE
        pairs = num_tokens * past + num_tokens * (num_tokens + 1) // 2
        operations = 4 * batch_size * num_heads * HEAD_SIZE * pairs
        for name, ours in (("cached_attention", True), ("torch attention", False)):
            maker = partial(make, past, num_tokens, ours)
            yield Case(name, model, f"{past} + {num_tokens} tokens", batch_size, num_bytes, operations, maker)
        if past == 0:
            maker = partial(make_paged, num_tokens)
            shape = f"{past} + {num_tokens} tokens"
            yield Case("paged_attention", model, shape, batch_size, num_bytes, operations, maker)


def parameters(config: object) -> str:
    """AttentionConfig(block_t=32, num_splits=8, ...) -> 32 8 ..."""
    return " ".join(str(int(value)) for value in vars(config).values())


def measure(case: Case) -> dict[str, object]:
    begin = time.perf_counter()
    copies, launches = case.make()
    tried = {name: try_launch(f"{case.kernel} {name}", launch, copies) for name, launch in launches.items()}
    times = {name: value for name, value in tried.items() if value is not None}
    del launches
    torch.cuda.empty_cache()
    best = min(times, key=lambda name: times[name])
    microseconds = times[best]
    print(f"{case.kernel} {case.model} {case.shape} {case.num_tokens}: {time.perf_counter() - begin:.1f} s", end="  ")
    print(", ".join(f"{name or 'only'}: {value:.1f} us" for name, value in times.items()), flush=True)
    return {
        "device": torch.cuda.get_device_name(),
        "versions": describe_versions("torch", "triton"),
        "kernel": case.kernel,
        "model": case.model,
        "shape": case.shape,
        "tokens": case.num_tokens,
        "us": round(microseconds, 2),
        "gb_per_s": round(case.num_bytes / microseconds / 1e3, 1),
        "tops": round(case.operations / microseconds / 1e6, 1),
        "parameters": best,
    }


def try_launch(name: str, launch: Launch, copies: int) -> float | None:
    """None, and a line, for launch parameters that ask for more than the card has."""
    from triton.runtime.errors import OutOfResources

    try:
        return time_launch(launch, copies)
    except OutOfResources as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None


def time_launch(launch: Launch, copies: int, repeat: int = 7) -> float:
    """Microseconds of one launch: the median of graphs of a round or more over the copies."""
    launch(0)
    rounds = max(1, -(-16 // copies))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for copy in range(copies):
                launch(copy)
    times = []
    for _ in range(repeat + 1):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return median(times[1:]) * 1e3 / (rounds * copies)


def print_table(rows: Iterable[dict[str, object]]) -> None:
    columns = ("kernel", "model", "shape", "tokens", "us", "gb_per_s", "tops", "parameters")
    widths = (16, 12, 11, 7, 9, 9, 8, 0)
    for cells in (columns, *([str(row[name]) for name in columns] for row in rows)):
        print(" ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
