"""Ctrl-C while a script is still loading: one line, exit code 130, nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import ROOT, environment

SCRIPTS = {
    "build.py": ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "64"],
    "check.py": ["no-folder"],
    "hf_gpt_convert.py": ["-i", "no-folder", "-o", "out"],
    "nemo_ckpt_convert.py": ["-i", "no.nemo", "-o", "out"],
    "nemo_prompt_convert.py": ["-i", "no.nemo", "-o", "out.npy"],
    "run.py": ["--max_output_len", "1", "--engine_dir", "no-folder"],
    "summarize.py": ["--engine_dir", "no-folder", "--test_trt_llm"],
}
# argv: a module and a script with its arguments, which is run as a program that gets the signal when it begins to
# import the module.
DRIVER = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        global moment
        if name == moment:
            moment = ""  # a module whose import fails may be asked for again
            os.kill(os.getpid(), signal.SIGINT)

_, moment, *sys.argv = sys.argv
sys.path[0] = os.path.dirname(sys.argv[0])
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_these_are_all_scripts() -> None:
    assert set(SCRIPTS) == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("moment", ["argparse", "gpt.errors", "gpt.config"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_with_one_line(script: str, moment: str, tmp_path: Path) -> None:
    result = python("-c", DRIVER, moment, ROOT / script, *SCRIPTS[script], cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["gpt.engine.builder", "torch", "torch._C", "numpy", "numpy.linalg", "torch.nn"])
def test_pytorch_swallows_no_interrupt(moment: str, tmp_path: Path) -> None:
    """It loads NumPy from C++, which goes on after any exception."""
    result = python("-c", DRIVER, moment, ROOT / "build.py", *SCRIPTS["build.py"], "--log_level", "error", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, make_gpt2: Callable[..., Path]) -> None:
    flags = ["-i", make_gpt2(), "-o", tmp_path / "deep" / "out", "--log_level", "error"]
    result = python("-c", DRIVER, "torch.nn", ROOT / "hf_gpt_convert.py", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_second_one_does_not_wait(tmp_path: Path, make_gpt2: Callable[..., Path]) -> None:
    """The first waits until PyTorch is loaded, and then takes away what is half made."""
    twice = DRIVER.replace("os.kill(", "os.kill(os.getpid(), signal.SIGINT); os.kill(")
    flags = ["-i", make_gpt2(), "-o", tmp_path / "out", "--log_level", "error"]
    result = python("-c", twice, "torch.nn", ROOT / "hf_gpt_convert.py", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")
    assert [path.name.split("-")[0] for path in (tmp_path / "out").iterdir()] == [".1"]


def told_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if text in line:
            break
    return told


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_a_signal_from_outside(delay_s: float, tmp_path: Path) -> None:
    """Python tells on stderr what it has imported, and so when there is somebody to take a signal."""
    flags = ["--output_dir", str(tmp_path / "engine"), "--log_level", "error"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "build.py"), *SCRIPTS["build.py"], *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path) as process:
        told_until(process, "gpt.errors")
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        rest = process.communicate()[1]
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == ["error: interrupted"]
    assert process.returncode == 130
    assert not (tmp_path / "engine" / "config.json").exists()


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_processes_of_a_parallel_build_are_ended_without_a_word(delay_s: float, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all of them; they load PyTorch, which takes longer than these delays."""
    flags = ["--world_size", "2", "--parallel_build", "--output_dir", str(tmp_path / "engine")]
    command = [sys.executable, str(ROOT / "build.py"), *SCRIPTS["build.py"], *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path, start_new_session=True
    ) as process:
        assert "Building 2 ranks in 2 processes" in told_until(process, "Building 2 ranks")
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate()[1]
    assert (process.returncode, rest) == (130, "error: interrupted\n")
    assert list((tmp_path / "engine").iterdir()) == []


def test_who_imports_a_script_keeps_his_own_handling(tmp_path: Path) -> None:
    modules = ", ".join(Path(script).stem for script in SCRIPTS)
    program = f"""
import signal
import {modules}
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert run.main(["--max_output_len", "1", "--engine_dir", "no-folder"]) == 3
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    result = python("-c", program)
    assert (result.returncode, result.stderr.count("error: ")) == (0, 1)


def test_a_job_in_the_background_stays_deaf(tmp_path: Path) -> None:
    """As a shell starts it: with the signal ignored."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv)"
    )
    words = [sys.executable, "-c", DRIVER, "gpt.errors", ROOT / "run.py", *SCRIPTS["run.py"]]
    result = python("-c", ignoring, *words[1:], cwd=tmp_path)
    assert (result.returncode, "interrupted" in result.stderr) == (3, False)
