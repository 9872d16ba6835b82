"""A TensorRT plan, loaded, and execution contexts over it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

import torch

from gpt.comm import Communicator
from gpt.engine.trt_check import compute_capabilities, describe_capability, loadable_cards
from gpt.engine.trt_library import TENSORRT_RTX, begin_library, error_recorder, known_library, library_name, load
from gpt.errors import EngineError


def load_engine(
    path: Path, device: torch.device, library: Dict[str, str], targets: tuple[str, ...] = ()
) -> tuple[Any, Any]:
    """The ICudaEngine in the file `path`, on `device`, and the module of the library that built it.

    library: name and version as `gpt.engine.trt_library.library_info` gave them when the plan was built, targets: what
    it was built for.  Raises ConfigError where that library is not installed, EngineError where it is another version,
    where the card is none of those that were built for, and where the library cannot load the plan.
    """
    name = known_library(library)
    check_device(name, device, library, targets)  # first: without a card nothing is worth installing
    trt = load([name])
    _check_version(trt, library, path)
    recorder = error_recorder(trt)
    with torch.cuda.device(device):
        runtime = begin_library(trt, "Runtime")
        runtime.error_recorder = recorder
        engine = deserialize(runtime, path)
    if engine is None:
        raise EngineError(
            f"{library_name(trt)} {trt.__version__} cannot load {path}",
            found=list(recorder.messages) or None,
            allowed="a whole plan, built by the same version for this machine's kind of GPU",
            hint="python check.py compares its bytes with their checksum; build the engine again here, or with another "
            "--target, or with --backend torch",
        )
    return engine, trt


def deserialize(runtime: Any, path: Path) -> Any:
    """The engine, or None; the plan is read through the memory map, without a copy of it in this process."""
    if path.stat().st_size == 0:  # nothing to map
        return None
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        memoryview(plan) as view,
    ):
        return runtime.deserialize_cuda_engine(view)


def create_context(engine: Any, trt: Any, recorder: Any) -> Any:
    """An IExecutionContext that takes its working memory from its owner (`set_device_memory`), so that contexts that
    never run at once can share it.  Raises EngineError where there is none to be had."""
    engine.error_recorder = recorder  # it is the engine that refuses a context
    config, context = engine.create_runtime_config(), None
    if config is not None:
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # TensorRT-RTX would else compile kernels for a shape beside the steps, and a captured graph keep the old
            # ones.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        context = engine.create_execution_context(config)
    if context is None:
        raise EngineError(
            "TensorRT cannot execute this engine",
            found=list(recorder.messages) or None,
            hint="is there enough free GPU memory?",
        )
    context.error_recorder = recorder
    return context


def set_communicator(context: Any, comm: Communicator, device: torch.device) -> bool:
    """Gives the collectives of a context their way to the other ranks, which all call this; False where it is refused.

    On a GPU that is the address of an NCCL communicator in a capsule; the stand-in takes ours.
    """
    if device.type != "cuda":
        return bool(context.set_communicator(comm))
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.restype = ctypes.py_object
    make_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    address = comm.nccl_address()  # type: ignore[attr-defined]  # ranks on GPUs have an NcclCommunicator
    return bool(context.set_communicator(make_capsule(address, None, None)))


def _check_version(trt: Any, library: Dict[str, str], path: Path) -> None:
    built_with = library.get("version")
    if built_with not in (None, trt.__version__):
        raise EngineError(
            f"{path} was built by another version of {library['name']}",
            found=f"built by {built_with}, installed is {trt.__version__}",
            allowed="the same version",
            hint="install that version, or build the engine again with build.py",
        )


def check_device(name: str, device: torch.device, library: Dict[str, str], targets: tuple[str, ...]) -> None:
    """Raises EngineError where `device` is no GPU that loads what the library `name` builds for `targets`."""
    hint = "run on a machine with one, or build the engine with --backend torch, which needs none"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EngineError("a TensorRT engine needs an NVIDIA GPU", found=f"device {device}, no usable GPU", hint=hint)
    capability = torch.cuda.get_device_capability(device)
    found = f"{torch.cuda.get_device_name(device)}, {describe_capability(capability)}"
    if name == TENSORRT_RTX:
        allowed = loadable_cards(compute_capabilities(targets))
        if f"SM{capability[0]}{capability[1]}" not in allowed:
            raise EngineError(
                "this TensorRT-RTX engine does not load on this GPU",
                found=found,
                allowed=[f"{name}: {cards}" for name, cards in allowed.items()],
                hint="build with another --target, with --backend torch, or with TensorRT itself (pip install -r "
                "requirements-tensorrt.txt)",
            )
        return
    built_on = library.get("compute_capability")
    if built_on not in (None, f"{capability[0]}.{capability[1]}"):
        raise EngineError(
            "this TensorRT engine does not load on this GPU",
            found=found,
            allowed=f"compute capability {built_on}, where it was built",
            hint="build the engine again on this machine",
        )
