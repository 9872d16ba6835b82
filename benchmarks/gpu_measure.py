"""How bench_gpu.py takes its numbers: rounds of a long and a short run, the machine's ceilings, kernels of one step."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from gpu_cases import Shape
from gpu_systems import Prompts, System

# Rounds that other work of the machine may spoil before a measurement is given up.
MOST_DISTURBED = 20


class Budget:
    """Seconds that the whole command may take."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()


@dataclass
class Timing:
    """One system on one shape.

    first_call_s: the first long run, with whatever is captured, compiled or tuned in it.  first_token_ms: runs of one
    new token, prompts as lists in, ids as lists out.  token_ms: of each round, the difference between a run of N new
    tokens and one of a single token, over N - 1: everything that a caller waits for, without the prompts' step.
    peak_bytes: the most that PyTorch had allocated on the device during all runs, from its state before the system was
    made; None on a CPU.
    """

    tokens: list[list[int]]
    first_call_s: float
    first_token_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: a copy's GB/s, read and written bytes both counted, and a square product's TFLOP/s."""

    copy_gb_per_s: float
    gemm_tflops: float


def measure(
    system: System,
    shape: Shape,
    prompts: Prompts,
    *,
    repeat: int,
    row_seconds: float,
    base_bytes: int | None,
    any_rank: Callable[[bool], bool] = bool,
) -> Timing:
    """At least one round, at most `repeat`; none is begun after `row_seconds`.  base_bytes: allocated before the system
    was made, None on a CPU.

    A round whose run of all tokens took no longer than that of a single one met other work and does not count.
    any_rank: whether one of several ranks says so, which have to run the same rounds.  Raises RuntimeError after
    MOST_DISTURBED such rounds.
    """
    if base_bytes is not None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    system.prepare(shape)
    tokens = system.generate(prompts, shape.output_len)
    result = Timing(tokens, time.perf_counter() - begin)
    system.generate(prompts, 1)
    num_disturbed = 0
    begin = time.perf_counter()
    while not result.first_token_ms or (
        len(result.first_token_ms) < repeat and time.perf_counter() - begin < row_seconds
    ):
        short = timed_ms(lambda: system.generate(prompts, 1))
        if shape.output_len > 1:
            long = timed_ms(lambda: system.generate(prompts, shape.output_len))
            if any_rank(long <= short):
                num_disturbed += 1
                if num_disturbed == MOST_DISTURBED:
                    raise RuntimeError(
                        f"in {MOST_DISTURBED} rounds {shape.output_len} tokens took no longer than one: the machine "
                        "has too much other work, or the model is too small to be timed"
                    )
                continue
            result.token_ms.append((long - short) / (shape.output_len - 1))
        result.first_token_ms.append(short)
    if base_bytes is not None:
        result.peak_bytes = torch.cuda.max_memory_allocated() - base_bytes
    return result


def timed_ms(run: Callable[[], object]) -> float:
    """Wall time of a call that waits for the device by itself."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def allocated_bytes(device: str) -> int | None:
    """What PyTorch holds on a GPU after letting go of what nobody refers to; None on a CPU."""
    gc.collect()
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def measure_ceilings(device: str) -> Ceilings:
    """On a GPU a copy of 2 GiB and an 8192^3 product in bfloat16 of normal values; on a CPU small float32 ones."""
    on_gpu = torch.device(device).type == "cuda"
    num_bytes, size, dtype = (2 << 30, 8192, torch.bfloat16) if on_gpu else (64 << 20, 1024, torch.float32)
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    copy_ms = device_ms(lambda: target.copy_(source), on_gpu)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_ms = device_ms(lambda: a @ b, on_gpu)
    return Ceilings(2 * num_bytes / copy_ms / 1e6, 2 * size**3 / product_ms / 1e9)


def device_ms(run: Callable[[], object], on_gpu: bool, repeat: int = 20) -> float:
    """Median of single runs, after three that do not count; by the device's own clock where it has one."""
    for _ in range(3):
        run()
    if not on_gpu:
        return statistics.median(timed_ms(run) for _ in range(repeat))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def worst_margin(system: System, prompts: Prompts, ours: list[list[int]], theirs: list[list[int]]) -> float | None:
    """How far `ours` lies below what `system` would choose, where a row first differs: largest logit minus the logit of
    our token, in standard deviations of the logits, the largest over (at most eight) rows that differ.

    What rounding decides is far below 1.  None where no row differs or the system does not tell its logits.
    """
    worst = None
    differing = [row for row in range(len(ours)) if ours[row] != theirs[row]]
    for row in differing[:8]:
        place = next(i for i, (a, b) in enumerate(zip(ours[row], theirs[row], strict=True)) if a != b)
        logits = system.logits([*prompts[row], *theirs[row][:place]])
        if logits is None:
            return None
        margin = float((logits.max() - logits[ours[row][place]]) / logits.std())
        worst = margin if worst is None else max(worst, margin)
    return worst


@dataclass(frozen=True)
class KernelTime:
    """One kernel (on a CPU: one operation) in one generation step."""

    name: str
    calls: float
    us: float


def profile_step(system: System, shape: Shape, prompts: Prompts, device: str) -> list[KernelTime]:
    """Time of each kernel in an average step, the longest first: a profiled run of all tokens minus one of a single
    token, over the steps between.  With a single token to generate, of the prompts' step.

    A kernel of the prompts' step that was slower in the shorter run than all its calls in the longer one (a machine
    with other work) has no time that the difference could tell: zero, its calls are known all the same.
    """
    system.prepare(shape)
    system.generate(prompts, shape.output_len)
    system.generate(prompts, 1)
    short = kernels_of(partial(system.generate, prompts, 1), device)
    if shape.output_len == 1:
        long, short, steps = short, defaultdict(lambda: (0, 0.0)), 1
    else:
        long, steps = kernels_of(partial(system.generate, prompts, shape.output_len), device), shape.output_len - 1
    found = [
        KernelTime(name, (calls - short[name][0]) / steps, max((us - short[name][1]) / steps, 0.0))
        for name, (calls, us) in long.items()
    ]
    return sorted((kernel for kernel in found if kernel.calls > 0), key=lambda kernel: -kernel.us)


def kernels_of(run: Callable[[], object], device: str) -> dict[str, tuple[int, float]]:
    """(calls, microseconds) by kernel name, zeros for a name that did not run."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    result: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in profiler.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            result[event.key] = (event.count, event.self_device_time_total)
        elif not on_gpu:
            result[event.key] = (event.count, event.self_cpu_time_total)
    return result
