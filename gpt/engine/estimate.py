"""What a build and the engine will need, told before the work starts."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpt.config import BuildConfig, ModelConfig
from gpt.console import human_bytes, log
from gpt.dtypes import ITEMSIZE
from gpt.engine.trt_check import estimate_build_bytes, estimate_plan_bytes
from gpt.engine.weights import engine_bytes, engine_layout
from gpt.errors import GptError
from gpt.mapping import Mapping


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank.  kv_cache is at the engine's limits; run.py allocates what a batch really needs.
    temporary_file lies beside the engine's while it is built."""

    weights: int
    engine_file: int
    kv_cache: int
    activations: int
    build_peak: int
    temporary_file: int = 0

    def describe(self) -> str:
        return (
            f"weights {human_bytes(self.weights)}, engine file {human_bytes(self.engine_file)}, "
            f"KV cache at the limits {human_bytes(self.kv_cache)}, activations {human_bytes(self.activations)}, "
            f"building {human_bytes(self.build_peak)}"
        )


def estimate(model: ModelConfig, build: BuildConfig, mapping: Mapping) -> Estimate:
    weights = engine_bytes(model, mapping, build.dtype, build.quant)
    num_rows = build.max_batch_size * build.max_beam_width
    num_tokens = build.max_batch_size * build.max_input_len
    widest = max(model.qkv_size, model.inter_size * (2 if model.activation.gated else 1)) // build.world_size
    # Of a prompt's token: the residual stream in float32, its normalised form, a product's sum over the ranks, and the
    # widest row before and after what follows it.
    token_bytes = 4 * model.n_embd + 2 * (model.n_embd + widest) * ITEMSIZE[build.dtype]
    activations = num_tokens * token_bytes + 4 * num_rows * model.padded_vocab_size()
    if build.backend == "tensorrt":
        peak, engine_file = estimate_build_bytes(weights), estimate_plan_bytes(model, build, weights)
        temporary_file = weights
    else:
        # One tensor at a time: as it is read, and as the engine wants it.
        largest = max(math.prod(tensor.shape) for tensor in engine_layout(model, mapping))
        peak = 0 if build.seed is not None else largest * (4 + ITEMSIZE[build.dtype])
        engine_file = 0 if build.seed is not None else weights
        temporary_file = 0
    kv_cache = build.kv_cache_bytes(model, num_rows, build.max_seq_len)
    return Estimate(weights, engine_file, kv_cache, activations, peak, temporary_file)


def check_room(needed: Estimate, output_dir: Path) -> None:
    """Raises GptError where the engine cannot fit on the disk; warns where memory looks short."""
    existing = output_dir
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed_bytes = needed.engine_file + needed.temporary_file
    if needed_bytes > free:
        raise GptError(
            f"the engine does not fit into {output_dir}",
            found=f"{human_bytes(free)} free",
            allowed=f"at least {human_bytes(needed_bytes)}",
            hint="choose another --output_dir",
        )
    available = available_memory_bytes()
    if available is not None and needed.build_peak > available:
        log.warning("Building may need %s, %s are available", human_bytes(needed.build_peak), human_bytes(available))


# What a process has before it does anything: the interpreter and PyTorch.
_PROCESS_BYTES = 300 << 20


def count_workers(world_size: int, peak_bytes: int) -> int:
    """Processes of a parallel build: one per rank, bounded by processors and by free memory, at least one.

    peak_bytes: what building one rank needs.
    """
    num_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = available_memory_bytes()
    by_memory = world_size if available is None else available // (peak_bytes + _PROCESS_BYTES)
    return max(1, min(world_size, num_processors, by_memory))


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
