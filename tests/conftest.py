"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gpt2

# Nothing here may look for the network, whatever the machine has configured.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A job in the background is deaf to Ctrl-C, and so would be every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU our kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

TENSORRT_GROUP = "gpu and tensorrt"


def pytest_configure(config: pytest.Config) -> None:
    """One message, instead of as many failures as there are tests, where nothing of the group can run."""
    if config.option.markexpr != TENSORRT_GROUP:
        return
    from gpt.engine.trt_library import library_info
    from gpt.engine.trt_runtime import check_device
    from gpt.errors import GptError

    try:
        library = library_info()
        check_device(library["name"], torch.device("cuda"), library, ())
    except GptError as error:
        raise pytest.UsageError(f"nothing of this group can run here: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The group `gpu and tensorrt` needs what few machines with a GPU have: it runs where its name is given."""
    if "tensorrt" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") and item.get_closest_marker("tensorrt")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures of modules: their random numbers do not depend on the tests that ran before."""
    _seed(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """After fixtures of modules: a test's random numbers do not depend on who made those fixtures."""
    _seed(2)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels are tested: compiled on a GPU (`-m gpu`), or where there is none, interpreted on the CPU."""
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def log_level() -> None:
    """Every test begins with all messages, whatever scripts in this process were told."""
    logging.getLogger("gpt").setLevel(logging.NOTSET)


@pytest.fixture
def call_script(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`call_script(run.main, *arguments)` -> exit code, stdout, stderr of a script's `main` in this process."""

    def call(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def make_gpt2(tmp_path: Path) -> Callable[..., Path]:
    """`make_gpt2(name="hf", **overrides)` saves a tiny GPT-2 under the test's folder (see tiny_models.tiny_gpt2)."""

    def make(name: str = "hf", **overrides: object) -> Path:
        return tiny_gpt2(tmp_path / name, **overrides)

    return make
