"""Launch parameters measured on the device at hand: each product of a model under a handful of candidates.

A candidate is timed as the decode step runs it: in a CUDA graph, launch after launch, over so many copies of the
weights that none is still in the cache when its turn comes again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import TypeVar

import torch

from gpt.config import ModelConfig
from gpt.console import log, progress
from gpt.engine.tuning import Tuning, token_bucket
from gpt.kernels import attention, gemv, skinny
from gpt.kernels.launch import OutOfResources, num_multiprocessors
from gpt.kernels.norm import add_norm
from gpt.kernels.product import Norm
from gpt.mapping import Mapping
from gpt.quant import FLOAT, QuantConfig

Config = TypeVar("Config")

_COLD_BYTES = 160 << 20  # more than any card's second-level cache
_MIN_LAUNCHES = 24
_REPEATS = 7


def product_shapes(model: ModelConfig, mapping: Mapping, quant: QuantConfig) -> list[tuple[int, int, bool]]:
    """(N, K, whether it ends in the residual stream) of every product of one rank that has float weights."""
    head = (mapping.local_vocab_size(model), model.n_embd, False)
    if quant.weights is not None:
        return [head]
    ranks = mapping.world_size
    heads = mapping.local_heads(model) + 2 * mapping.local_kv_heads(model)
    inner = model.inter_size // ranks
    shapes = [
        (heads * model.head_size, model.n_embd, False),
        (model.n_embd, mapping.local_heads(model) * model.head_size, True),
        (inner, model.n_embd, False),
        (model.n_embd, inner, True),
        head,
    ]
    return list(dict.fromkeys(shapes))


def autotune(
    model: ModelConfig,
    mapping: Mapping,
    dtype: torch.dtype,
    batch_sizes: Iterable[int],
    num_slots: int,
    device: torch.device,
    quant: QuantConfig = FLOAT,
) -> Tuning:
    """Measures every product and the attention over caches of `num_slots` for every batch size, where weights and cache
    are float: what is fastest for these need not be for fewer bytes.  Takes some tenths of a second per candidate; the
    default is always one of them, so that small shapes, which nothing else suits, have a best too."""
    tuning = Tuning(device)
    for batch_size in sorted(set(batch_sizes)) if quant.kv_cache is None else ():
        if batch_size == 1 and quant.weights is not None:
            continue  # the product behind a single row's attention, which joins its parts, is measured with it
        key = (batch_size, mapping.local_heads(model), mapping.local_kv_heads(model), num_slots)
        candidates = attention_candidates(key[1] > key[2], model.head_size, num_slots)
        launch, copies = _attention_launcher(*key, model.head_size, dtype, device, tuning)
        tuning.attentions[key] = _best([tuning.attention(*key), *candidates], launch, copies)
    buckets = sorted({0 if size == 1 else token_bucket(size) for size in batch_sizes})
    work = [(bucket, *shape) for bucket in buckets for shape in product_shapes(model, mapping, quant)]
    for bucket, num_rows, num_columns, to_stream in progress(work, what="Tuning", unit="product"):
        copies = max(1, -(-_COLD_BYTES // (num_rows * num_columns * dtype.itemsize)))
        weights = torch.randn((copies, num_rows, num_columns), device=device).to(dtype)
        if bucket == 0:
            usual = tuning.gemv(num_rows, num_columns, itemsize=dtype.itemsize)
            tuning.gemvs[num_rows, num_columns] = _best(
                [usual, *gemv_candidates(num_columns)], _gemv_launcher(weights, to_stream), copies
            )
        else:
            default = tuning.skinny(bucket, num_rows, num_columns, splits=to_stream, itemsize=dtype.itemsize)
            tuning.skinnies[bucket, num_rows, num_columns, int(to_stream)] = _best(
                [default, *skinny_candidates(num_rows, num_columns, to_stream, device)],
                _skinny_launcher(bucket, weights, to_stream),
                copies,
            )
    return tuning


def gemv_candidates(num_columns: int) -> Iterator[gemv.GemvConfig]:
    widest = 1 << (num_columns - 1).bit_length()
    for block_n, block_k, num_warps in itertools.product((2, 4, 8, 16), (1024, 2048, 4096), (1, 2, 4, 8)):
        if block_k <= max(widest, 1024) and 64 <= block_n * block_k // (32 * num_warps) <= 128:
            yield gemv.GemvConfig(block_n, block_k, num_warps)


def attention_candidates(shared: bool, head_size: int, num_slots: int) -> Iterator[attention.AttentionConfig]:
    """shared: whether several heads read the same K and V, which then goes to the matrix units."""
    forms = [(16, 1), (16, 2), (32, 2), (32, 4), (64, 4)]  # tokens of a block, warps
    if not shared:
        forms = [(16, 1), (32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (256, 8)]
    for (block_t, num_warps), num_splits in itertools.product(forms, (1, 2, 4, 8, 16)):
        per_thread = block_t * head_size // (32 * num_warps)
        if num_splits * block_t <= num_slots and per_thread <= 128:
            yield attention.AttentionConfig(block_t, num_splits, num_warps)


def skinny_candidates(
    num_rows: int, num_columns: int, splits: bool, device: torch.device
) -> Iterator[skinny.SkinnyConfig]:
    processors = num_multiprocessors(device)
    for block_n, block_k, stages, split_k, first, ahead in itertools.product(
        (16, 32, 64), (64, 128), (4, 6), (1, 2, 4, 8), (True, False), (True, False)
    ):
        programs = -(-num_rows // block_n) * split_k
        in_flight = (block_n + 64) * block_k * 2 * stages
        if (split_k > 1 and not splits) or not 0.6 * processors <= programs <= 4 * processors + num_rows // 128:
            continue
        if num_columns < 2 * block_k * split_k or in_flight > 160 << 10 or (block_n == 16 and not first):
            continue
        yield skinny.SkinnyConfig(block_n, block_k, 4, stages, split_k, first, ahead)


def _attention_launcher(
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_slots: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tuning: Tuning,
) -> tuple[Callable[[attention.AttentionConfig, int], None], int]:
    """With three quarters of the cache filled, and for one sequence with the product that joins the parts."""
    shape = (2, batch_size, num_kv_heads, num_slots, head_size)
    copies = min(8, max(2, _COLD_BYTES // (math.prod(shape) * dtype.itemsize)))
    caches = torch.randn((copies, *shape), device=device).to(dtype)
    qkv = torch.randn((batch_size, num_heads + 2 * num_kv_heads, head_size), device=device).to(dtype)
    out = torch.empty((batch_size, num_heads, head_size), device=device, dtype=dtype)
    positions = torch.full((batch_size,), num_slots * 3 // 4, dtype=torch.int32, device=device)
    table = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None].contiguous()
    scratch = torch.zeros(batch_size * num_heads * 16 * (head_size + 2), device=device)
    width = num_heads * head_size
    weight = torch.randn((width, width), device=device).to(dtype)
    stream = torch.zeros(width, device=device)

    def launch(config: attention.AttentionConfig, copy: int) -> None:
        keys, values = caches[copy]
        in_parts = batch_size == 1 and gemv.takes_parts(num_heads, head_size, config.num_splits)
        attention.decode_attention(
            qkv,
            positions,
            table,
            keys,
            values,
            out,
            scale=0.1,
            config=config,
            parts=scratch if config.num_splits > 1 else None,
            join=not in_parts,
        )
        if batch_size == 1:
            x, splits = (scratch, config.num_splits) if in_parts else (out.view(-1), 1)
            product = tuning.gemv(width, width)
            if in_parts:
                product = gemv.config_for_parts(product, splits, head_size)
            gemv.gemv(x, weight, stream, config=product, add_to_out=True, splits=splits, head_size=head_size)

    return launch, copies


def _gemv_launcher(weights: torch.Tensor, to_stream: bool) -> Callable[[gemv.GemvConfig, int], None]:
    _, num_rows, num_columns = weights.shape
    x = torch.randn(num_columns, device=weights.device, dtype=weights.dtype if to_stream else torch.float32)
    out = torch.zeros(num_rows, device=weights.device, dtype=torch.float32 if to_stream else weights.dtype)
    ones = torch.ones(num_columns, device=weights.device)
    norm = None if to_stream else Norm(ones, ones, 1e-5)

    def launch(config: gemv.GemvConfig, copy: int) -> None:
        gemv.gemv(x, weights[copy], out, config=config, norm=norm, add_to_out=to_stream)

    return launch


def _skinny_launcher(
    num_tokens: int, weights: torch.Tensor, to_stream: bool
) -> Callable[[skinny.SkinnyConfig, int], None]:
    _, num_rows, num_columns = weights.shape
    device = weights.device
    x = torch.randn((num_tokens, num_columns), device=device).to(weights.dtype)
    out = torch.empty((num_tokens, num_rows), device=device, dtype=weights.dtype)
    stream = torch.zeros((num_tokens, num_rows), device=device)
    norm = Norm(torch.ones(num_rows, device=device), torch.ones(num_rows, device=device), 1e-5)
    parts = torch.empty((8, num_tokens, num_rows), device=device)

    def launch(config: skinny.SkinnyConfig, copy: int) -> None:
        if not to_stream:
            skinny.skinny(x, weights[copy], out, config=config)
            return
        sums = parts[: config.split_k]
        skinny.skinny(x, weights[copy], sums, config=config)
        add_norm(stream, out, norm, parts=sums)

    return launch


def _best(candidates: Iterable[Config], launch: Callable[[Config, int], None], copies: int) -> Config:
    timed = [(_time_candidate(config, launch, copies), config) for config in candidates]
    timed.sort(key=lambda pair: pair[0])
    log.debug("%s", "; ".join(f"{microseconds:.1f} us {config}" for microseconds, config in timed[:4]))
    return timed[0][1]


def _time_candidate(config: Config, launch: Callable[[Config, int], None], copies: int) -> float:
    try:
        return _time(lambda copy: launch(config, copy), copies)
    except OutOfResources as error:
        log.debug("%s: %s", config, error)
        return math.inf


def _time(launch: Callable[[int], None], copies: int) -> float:
    """Microseconds of one launch."""
    launch(0)
    rounds = max(1, -(-_MIN_LAUNCHES // copies))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for copy in range(copies):
                launch(copy)
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times) * 1e3 / (rounds * copies)
