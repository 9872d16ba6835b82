"""A TensorRT plan, loaded."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from gpt.engine.trt_library import LIBRARIES, TENSORRT_RTX, error_recorder, library_name, load, logger
from gpt.errors import EngineError


def load_engine(path: Path, device: torch.device, library: str) -> tuple[Any, Any]:
    """The ICudaEngine in the file `path`, on `device`, and the module of the library that built it.

    Raises ConfigError where `library` is not installed, EngineError where it cannot load the plan on this machine.
    """
    if library not in LIBRARIES:
        raise EngineError("unknown library in config.json", found=repr(library), allowed=", ".join(LIBRARIES))
    trt = load([library])
    _check_device(trt, device)
    recorder = error_recorder(trt)
    with torch.cuda.device(device):
        runtime = trt.Runtime(logger(trt))
        runtime.error_recorder = recorder
        engine = deserialize(runtime, path)
    if engine is None:
        raise EngineError(
            f"{library_name(trt)} {trt.__version__} cannot load {path}",
            found=list(recorder.messages) or None,
            allowed="a plan built by the same version for this machine's kind of GPU",
            hint="build the engine again here, or with another --target, or with --backend torch",
        )
    return engine, trt


def deserialize(runtime: Any, path: Path) -> Any:
    """The engine, or None; the plan is read through the memory map, without a copy of it in this process."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        memoryview(plan) as view,
    ):
        return runtime.deserialize_cuda_engine(view)


def _check_device(trt: Any, device: torch.device) -> None:
    hint = "run on a machine with one, or build the engine with --backend torch, which needs none"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EngineError("a TensorRT engine needs an NVIDIA GPU", found=f"device {device}, no usable GPU", hint=hint)
    capability = torch.cuda.get_device_capability(device)
    if library_name(trt) == TENSORRT_RTX and capability == (9, 0):
        raise EngineError(
            "TensorRT-RTX engines do not load on this GPU",
            found=f"{torch.cuda.get_device_name(device)}, compute capability 9.0",
            allowed="Turing, Ampere, Ada and Blackwell cards",
            hint="build with --backend torch, or with TensorRT itself (pip install -r requirements-tensorrt.txt)",
        )
