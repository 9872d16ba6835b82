"""Steps recorded as CUDA graphs, which one call launches whole, and the time that recording takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from gpt.console import log


class Recorder:
    """Makes the graphs of one session.  seconds: what that has taken so far."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self._memory: Any = None
        self.renew_memory()

    def renew_memory(self) -> None:
        """Graphs made from now on share another pool: one ends with its last graph and takes no other."""
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Runs a step once to have its kernels compiled, then records it: the graph, and the result that it fills."""
        begin = time.perf_counter()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        compiled = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # the end of another session's graph, which the collector may find any time, spoils a recording
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                result = run()
        finally:
            if collects:
                gc.enable()
        now = time.perf_counter()
        self.seconds += now - begin
        log.debug("Step recorded in %.2f s, %.2f s of it compiling and the first run", now - begin, compiled - begin)
        return graph, result
