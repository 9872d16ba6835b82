"""Steps recorded as CUDA graphs, which one call launches whole."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from gpt.console import log


def record(
    run: Callable[[], torch.Tensor], device: torch.device, memory: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Runs a step once to have its kernels compiled, then records it: the graph, and the result that it fills.

    memory: the pool that graphs share.
    """
    begin = time.perf_counter()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    compiled = time.perf_counter()
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # the end of another session's graph, which the collector may find any time, spoils a recording
    try:
        with torch.cuda.graph(graph, pool=memory):
            result = run()
    finally:
        if collects:
            gc.enable()
    now = time.perf_counter()
    log.debug("Step recorded in %.2f s, %.2f s of it compiling and the first run", now - begin, compiled - begin)
    return graph, result
