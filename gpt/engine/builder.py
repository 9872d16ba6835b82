"""Builds an engine folder: weights through the layout table into one file per rank, config.json last."""

from __future__ import annotations

import contextlib
import multiprocessing
import shlex
import shutil
import sys
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpt
from gpt import interrupt
from gpt.checkpoint.random_weights import RandomWeights
from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig, ModelConfig
from gpt.console import get_level, human_bytes, human_time, log, setup_logging
from gpt.engine.estimate import check_room, count_workers, estimate
from gpt.engine.folder import (
    CONFIG_NAME,
    STAGING_PREFIX,
    TOKENIZER_FOLDER,
    EngineFile,
    check_replaceable,
    engine_config,
    engine_file_name,
)
from gpt.engine.quant_weights import quantization_notes
from gpt.engine.tensor_file import write_tensor_file
from gpt.engine.trt_builder import build_plan
from gpt.engine.trt_check import check_build, with_plugins
from gpt.engine.trt_library import library_info
from gpt.engine.weights import WeightSource, engine_tensors, file_layout
from gpt.errors import GptError
from gpt.files import file_checksum
from gpt.mapping import Mapping


def build_engine(model: ModelConfig, build: BuildConfig, checkpoint: Checkpoint | None, output_dir: Path) -> Path:
    """Builds every rank's file and the configuration; returns the path of config.json.

    Everything is made in a hidden folder inside `output_dir` and moved into place at the end, config.json last; a build
    that fails or is killed leaves an engine that was there before as it was. Raises ConfigError for options the backend
    cannot honour, EngineError and GptError from the work itself.
    """
    begin = time.perf_counter()
    check_replaceable(output_dir)
    source: WeightSource = checkpoint if checkpoint is not None else RandomWeights(model, build.seed or 0)
    build, notes, library = prepare_backend(model, build)
    for note in (*notes, *quantization_notes(build.quant, checkpoint)):
        log.info(note)
    needed = estimate(model, build, Mapping.of_build(build))
    log.info("Needed per rank: %s", needed.describe())
    check_room(needed, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _remove_stale(output_dir)
    staging = Path(tempfile.mkdtemp(dir=output_dir, prefix=STAGING_PREFIX))
    try:
        build_id = uuid.uuid4().hex
        files = _build_ranks(model, build, source, build_id, staging, needed.build_peak)
        _copy_tokenizer(checkpoint, staging)
        config = engine_config(model, build, library, build_id, files, _describe_source(checkpoint))
        (staging / CONFIG_NAME).write_text(config, encoding="utf-8")
        _publish(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    seconds = time.perf_counter() - begin
    log.info("Total time of building all %d engines: %s (%.1f s)", build.world_size, human_time(seconds), seconds)
    return output_dir / CONFIG_NAME


def prepare_backend(model: ModelConfig, build: BuildConfig) -> tuple[BuildConfig, list[str], dict[str, str]]:
    """The options with what the backend adds, what it makes of them, and which library it is.

    Raises ConfigError for options it cannot honour, and where its library is missing.
    """
    if build.backend == "tensorrt":
        build = with_plugins(model, build)
        return build, check_build(model, build), library_info(build.targets)
    return build, torch_notes(build), {"name": "torch", "version": torch.__version__}


def torch_notes(build: BuildConfig) -> list[str]:
    """What the plugin flags select in the PyTorch executor."""
    notes = ["Attention: fused (scaled_dot_product_attention, float32 softmax), cache in place"]
    if not build.fused_attention:
        notes = ["Attention: plain (scores and softmax in float32); --use_gpt_attention_plugin selects the fused one"]
    if build.context_fmha:
        notes.append("Context FMHA Enabled: PyTorch's fused kernels accumulate in float32, whichever flag asks")
    if build.gemm_plugin:
        notes.append("GEMM plugin: oneDNN and MKL on a CPU, cuBLAS on a GPU; they are used without the flag too")
    if build.layernorm_plugin:
        notes.append("Layernorm plugin: PyTorch's fused layer_norm; it is used without the flag too")
    if build.lookup_plugin:
        notes.append("Lookup plugin: PyTorch's embedding; it is used without the flag too")
    if build.remove_input_padding:
        notes.append("Remove Padding Enabled")
    if build.builder_opt is not None:
        notes.append("--builder_opt has no effect on the torch backend")
    return notes


def _build_ranks(
    model: ModelConfig, build: BuildConfig, source: WeightSource, build_id: str, staging: Path, peak_bytes: int
) -> list[EngineFile]:
    """Every rank's file, one after the other or in as many processes as processors and free memory allow."""
    work = partial(_build_rank, model, build, source, build_id, staging)
    num_workers = count_workers(build.world_size, peak_bytes) if build.parallel_build else 1
    if num_workers == 1:
        return [work(rank) for rank in range(build.world_size)]
    log.info("Building %d ranks in %d processes", build.world_size, num_workers)
    # Started afresh: a fork of a process in which PyTorch has threads may hang.
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with contextlib.ExitStack() as stack:
        try:
            with interrupt.held_back():  # each worker would show where it was
                pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(get_level(),))
                results = stack.enter_context(pool).map(work, range(build.world_size))
            return list(results)
        except BrokenProcessPool as error:
            raise GptError(
                "a process of the parallel build was killed",
                found=f"{num_workers} processes, about {human_bytes(peak_bytes)} each",
                hint="probably for memory; without --parallel_build the ranks are built one after the other",
            ) from error
        except BaseException:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            raise


def _start_worker(level: str) -> None:
    setup_logging(level)
    torch.set_num_threads(1)


def _build_rank(
    model: ModelConfig, build: BuildConfig, source: WeightSource, build_id: str, staging: Path, rank: int
) -> EngineFile:
    begin = time.perf_counter()
    mapping = Mapping.of_build(build, rank)
    name = engine_file_name(build.dtype, mapping.world_size, mapping.rank)
    path = staging / name
    if build.backend == "tensorrt":
        checksum = _build_plan(model, build, mapping, source, path)
    else:
        checksum = write_tensor_file(
            path,
            file_layout(model, build, mapping),
            engine_tensors(model, build, mapping, source) if build.seed is None else (),
            {"format": "pt", "tool": f"gpt {gpt.__version__}", "build_id": build_id, "rank": str(mapping.rank)},
            f"rank {mapping.rank}",
        )
    size = path.stat().st_size
    seconds = time.perf_counter() - begin
    log.info(
        "Engine serialized: %s, %s. Total time: %s (%.1f s)", name, human_bytes(size), human_time(seconds), seconds
    )
    return EngineFile(name, size, checksum)


def _build_plan(model: ModelConfig, build: BuildConfig, mapping: Mapping, source: WeightSource, path: Path) -> str:
    build_plan(model, build, mapping, engine_tensors(model, build, mapping, source), path)
    return file_checksum(path)


def _copy_tokenizer(checkpoint: Checkpoint | None, staging: Path) -> None:
    if checkpoint is None or not checkpoint.tokenizer_files:
        log.info("No tokenizer travels with this engine: run.py needs --tokenizer or --vocab_file")
        return
    folder = staging / TOKENIZER_FOLDER
    folder.mkdir()
    for path in checkpoint.tokenizer_files:
        shutil.copyfile(path, folder / path.name)


def _describe_source(checkpoint: Checkpoint | None) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.folder.resolve()) if checkpoint is not None else None,
        "command": shlex.join(sys.argv),
        "tool": f"gpt {gpt.__version__}",
    }


def _publish(staging: Path, output_dir: Path) -> None:
    """Moves a complete build into place.  Without config.json the folder counts as unfinished, so it goes first and
    comes last."""
    (output_dir / CONFIG_NAME).unlink(missing_ok=True)
    shutil.rmtree(output_dir / TOKENIZER_FOLDER, ignore_errors=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        path.replace(output_dir / path.name)


def _remove_stale(output_dir: Path) -> None:
    """Clears what a killed build left behind."""
    for path in output_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
