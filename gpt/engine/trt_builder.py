"""Network, profiles and targets in, a TensorRT plan in a file out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Dict
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.console import human_time, log, progress
from gpt.engine import trt_io
from gpt.engine.trt_check import compute_capabilities
from gpt.engine.trt_layers import Layers
from gpt.engine.trt_library import (
    TENSORRT_RTX,
    begin_library,
    error_recorder,
    library_name,
    load_for_build,
)
from gpt.engine.trt_network import define_network
from gpt.engine.trt_weights import weights_in_file
from gpt.errors import EngineError
from gpt.files import whole_file
from gpt.mapping import Mapping


class NetworkBuild:
    """A network with everything that has to live as long as it does: builder, recorder and the constants' memory.

    `gpt.engine.trt_stand_in` executes it without the library's runtime; `write_plan` compiles it.
    """

    def __init__(
        self,
        trt: Any,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
    ):
        """weights: as `gpt.engine.weights.engine_tensors` makes them, on the CPU.

        Raises EngineError for a layer that the library refuses, and where it cannot begin.
        """
        self.trt = trt
        self.build = build
        self.recorder = error_recorder(trt)
        self.builder = begin_library(trt, "Builder")
        self.builder.error_recorder = self.recorder
        self.network = self._given("a network", self.builder.create_network())
        self.network.error_recorder = self.recorder
        layers = Layers(trt, self.network, self.recorder)
        define_network(layers, model, build, mapping, weights)
        self.side_table = layers.side_table
        profiles = range(trt_io.num_profiles(build))
        self.profiles = [trt_io.profile_shapes(model, build, mapping, profile) for profile in profiles]

    def write_plan(self, file: IO[bytes]) -> None:
        """Compiles the network into `file`.

        Raises EngineError with the library's messages, KeyboardInterrupt after Ctrl-C, OSError where writing fails.
        """
        config = self._config()
        timings = self._timing_cache_path()
        if timings is not None:
            read_timing_cache(config, timings)
        writer = _stream_writer(self.trt, file)
        with progress(what="TensorRT", unit="step") as bar, _interrupts() as interrupted:
            # The library keeps plain pointers to both: the names keep them alive.
            monitor = _progress_monitor(self.trt, bar, interrupted)
            config.progress_monitor = monitor
            done = self.builder.build_serialized_network_to_stream(self.network, config, writer)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if writer.failure is not None:
            raise writer.failure
        if not done:
            raise EngineError(
                "TensorRT could not build the engine",
                found=list(self.recorder.messages) or "no message",
                hint="--log_level verbose shows all its messages; --backend torch does without it",
            )
        if timings is not None:
            try:
                write_timing_cache(config, timings)
            except OSError as error:  # no reason to lose the plan
                log.warning("Timing cache: not written: %s", error)

    def _timing_cache_path(self) -> Path | None:
        """TensorRT-RTX has no such cache."""
        if self.build.timing_cache is None or library_name(self.trt) == TENSORRT_RTX:
            return None
        return Path(self.build.timing_cache)

    def _given(self, what: str, made: Any) -> Any:
        """What the builder made, unless it is nothing."""
        if made is None:
            raise EngineError(f"TensorRT could not begin {what}", found=list(self.recorder.messages) or "no message")
        return made

    def _config(self) -> Any:
        config = self._given("a configuration", self.builder.create_builder_config())
        if self.build.builder_opt is not None:
            config.builder_optimization_level = self.build.builder_opt
        config.clear_flag(self.trt.BuilderFlag.TF32)  # set by default: float32 products of ten bits
        config.profiling_verbosity = getattr(self.trt.ProfilingVerbosity, self.build.profiling_verbosity.upper())
        for wanted, flag in ((self.build.weight_streaming, "WEIGHT_STREAMING"), (self.build.refit, "REFIT")):
            if wanted:
                config.set_flag(getattr(self.trt.BuilderFlag, flag))
        if "attention" in self.build.plugins:  # it writes its cache in place
            config.set_preview_feature(self.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        self._set_targets(config)
        for shapes in self.profiles:
            profile = self.builder.create_optimization_profile()
            for name, (smallest, optimal, largest) in shapes.items():
                profile.set_shape(name, smallest, optimal, largest)
            config.add_optimization_profile(profile)
        return config

    def _set_targets(self, config: Any) -> None:
        names = compute_capabilities(self.build.targets)
        if not names:
            return
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(self.trt.ComputeCapability, name), index):
                raise EngineError(f"TensorRT refused the target {name}", found=list(self.recorder.messages) or None)


def build_plan(
    model: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    weights: Iterable[tuple[str, torch.Tensor]],
    path: Path,
) -> None:
    """Builds the engine of one rank and writes its plan to `path`, which appears only when it is complete.

    weights: as `gpt.engine.weights.engine_tensors` makes them, one in memory at a time; a file beside `path` holds them
    while the library builds.  Call `check_build` first: it explains what would end here in the library's own words.
    Raises what `NetworkBuild` and its `write_plan` raise.
    """
    begin = time.perf_counter()
    with weights_in_file(path.with_name(f".{path.name}.weights-{os.getpid()}"), weights) as mapped:
        log.info("Weights loaded. Total time: %s", human_time(time.perf_counter() - begin))
        network = NetworkBuild(load_for_build(build.targets), model, build, mapping, mapped.tensors)
        with whole_file(path) as file, mapped.releasing_memory():
            network.write_plan(file)


def read_timing_cache(config: Any, path: Path) -> None:
    """Starts from the timings in `path`, or from none where it is absent or another library's."""
    content = path.read_bytes() if path.is_file() else b""
    if not content:
        log.info("Timing cache: %s is new", path)
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.warning("Timing cache: %s is of another library or GPU; a new one takes its place", path)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def write_timing_cache(config: Any, path: Path) -> None:
    with whole_file(path) as file:
        file.write(memoryview(config.get_timing_cache().serialize()))


def _stream_writer(trt: Any, file: IO[bytes]) -> Any:
    """An IStreamWriter; an exception cannot pass through the library, so it waits in `failure`."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            super().__init__()
            self.failure: OSError | None = None

        def write(self, data: Any) -> int:
            chunk = memoryview(data)
            try:
                file.write(chunk)
            except OSError as error:
                self.failure = error
                return 0
            return chunk.nbytes

    return Writer()


def _progress_monitor(trt: Any, bar: Any, interrupted: threading.Event) -> Any:
    """An IProgressMonitor: the bar shows the innermost phase; Ctrl-C makes the next step the last."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bar.reset(total=num_steps)
            bar.set_description_str(f"TensorRT: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update()
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            bar.refresh()

    return Monitor()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Inside, Ctrl-C only sets the event: raised inside a callback, KeyboardInterrupt would be lost in the library."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
