"""Which TensorRT there is: `tensorrt` for data-centre GPUs, or TensorRT-RTX, which also builds where there is no GPU.

No other module imports either of them.  Both have the same Python interface as far as this package uses it, so the rest
takes the module as an argument called `trt` (typed Any: neither library comes with annotations for all of it).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gpt.console import log, verbose
from gpt.errors import ConfigError, EngineError

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
_MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx_bindings"}
LIBRARIES = tuple(_MODULES)
# tensorrt: since then all types are as written; tensorrt_rtx: what was tried.
_OLDEST = {TENSORRT: (11, 0), TENSORRT_RTX: (1, 7)}
_INSTALL = {
    TENSORRT: "pip install -r requirements-tensorrt.txt (needs an NVIDIA GPU)",
    TENSORRT_RTX: "pip install -r requirements.txt",
}


def load(names: Sequence[str] = (TENSORRT_RTX, TENSORRT)) -> Any:
    """The first of the libraries `names` that can be used.

    Raises ConfigError saying why none of them can, and what to install.
    """
    reasons = []
    for name in names:
        trt, reason = _import(name)
        if trt is not None:
            return trt
        reasons.append(f"{name}: {reason}")
        verbose(f"Not used: {reasons[-1]}")
    raise ConfigError(
        f"{' or '.join(names)} is not installed",
        found=reasons,
        allowed=[f"{name}: {_INSTALL[name]}" for name in names],
        hint=f"install {'it' if len(names) == 1 else 'one of them'}; engines of build.py --backend torch need none",
    )


def _import(name: str) -> tuple[Any, str]:
    """The module, or None and why it cannot be had."""
    try:
        trt = importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the shared libraries are not
        return None, str(error)
    if tuple(map(int, trt.__version__.split(".")[:2])) < _OLDEST[name]:
        return None, f"found version {trt.__version__}, allowed: {'.'.join(map(str, _OLDEST[name]))} or newer"
    return trt, ""


def load_for_build(targets: Sequence[str]) -> Any:
    """The library that builds for `targets`.

    `tensorrt` where it is installed, a GPU is there and no target is named, since that GPU is the only one it builds
    for; else TensorRT-RTX.  Raises ConfigError where the one that is needed is not installed.
    """
    import torch

    if targets or not torch.cuda.is_available():
        return load([TENSORRT_RTX])
    return load([TENSORRT, TENSORRT_RTX])


def library_name(trt: Any) -> str:
    return next(name for name, module in _MODULES.items() if trt.__name__ == module)


def known_library(library: Dict[str, str]) -> str:
    """The name in `library`, which is config.json's; raises EngineError where it is none of LIBRARIES."""
    name = library.get("name", "")
    if name not in LIBRARIES:
        raise EngineError("unknown library in config.json", found=repr(name), allowed=", ".join(LIBRARIES))
    return name


def library_info(targets: Sequence[str] = ()) -> dict[str, str]:
    """Name and version of the library that builds for `targets`; raises ConfigError where there is none."""
    trt = load_for_build(targets)
    info = {"name": library_name(trt), "version": trt.__version__}
    if info["name"] == TENSORRT:  # its plans run on the kind of GPU that built them
        import torch

        info["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return info


@lru_cache(maxsize=2)
def logger(trt: Any) -> Any:
    """The library's log, sent into ours.  One per library and process: the library ignores any later one."""

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            # Errors come through the error recorder too, and end in an exception; here they are kept for the curious.
            if severity in (trt.Logger.VERBOSE, trt.Logger.INFO):
                log.debug("%s", message)
            else:
                verbose(f"TensorRT: {message}")

    return Log()


def begin_library(trt: Any, kind: str) -> Any:
    """The library's Builder or Runtime.  Raises EngineError where it gives none, as with a driver that is too old."""
    messages = logger(trt)
    try:
        return getattr(trt, kind)(messages)
    except (TypeError, RuntimeError) as error:  # TypeError: its constructor returned nothing
        raise EngineError(
            f"{library_name(trt)} {trt.__version__} cannot begin on this machine",
            found=str(error),
            hint="--log_level verbose shows its messages; is the GPU's driver new enough for it?",
        ) from error


# What every failure without a GPU is followed by; it is the consequence of the first error and explains nothing.
_NOISE = "CUDA driver version is insufficient"


def error_recorder(trt: Any) -> Any:
    """An IErrorRecorder that keeps the library's messages, in order, in its list `messages`."""

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []
            self._codes: list[Any] = []

        def report_error(self, code: Any, description: str) -> bool:
            if _NOISE not in description:
                self.messages.append(" ".join(description.split()))
                self._codes.append(code)
            return False

        def num_errors(self) -> int:
            return len(self.messages)

        def get_error_code(self, index: int) -> Any:
            return self._codes[index]

        def get_error_desc(self, index: int) -> str:
            return self.messages[index]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.messages.clear()
            self._codes.clear()

    return Recorder()


def has_plugins(trt: Any) -> bool:
    """Whether its networks take plugins that Python defines and that are compiled ahead: not TensorRT-RTX."""
    return hasattr(trt, "IPluginV3QuickAOTBuild")


def plugin_api(trt: Any) -> Any:
    """The library's module `plugin`, which has to be imported by its name."""
    return getattr(trt, "plugin", None) or importlib.import_module(f"{trt.__name__}.plugin")


def compute_capability(trt: Any) -> int:
    """What kernels in a plan are compiled for, 90 for 9.0: the GPU's, or what a stand-in for the library names."""
    named = getattr(trt, "compute_capability", None)
    if named is not None:
        return int(named)
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
