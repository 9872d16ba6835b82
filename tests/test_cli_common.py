"""What every script's command line has in common: spelling of flags, exit codes, what an error shows."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpt import console
from gpt.cli import ArgumentParser, positive_int, reject_unsupported, run_main
from gpt.console import setup_logging
from gpt.errors import CheckpointError, ConfigError, EngineError, GptError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("hf_gpt_convert", "nemo_ckpt_convert", "nemo_prompt_convert", "build", "run", "summarize", "check")
HEAVY = ("torch", "numpy", "transformers", "datasets", "matplotlib", "tensorrt_rtx_bindings", "mpi4py")
SMALLEST = {  # the least that each script accepts
    "hf_gpt_convert": ["-i", "in", "-o", "out"],
    "nemo_ckpt_convert": ["-i", "in", "-o", "out"],
    "nemo_prompt_convert": ["-i", "in", "-o", "out"],
    "build": [],
    "run": ["--max_output_len", "8"],
    "summarize": [],
    "check": ["folder"],
}


def parser_of(script: str) -> ArgumentParser:
    parser = importlib.import_module(script).build_parser()
    assert isinstance(parser, ArgumentParser)
    return parser


def long_flags(script: str) -> Iterator[tuple[argparse.Action, str]]:
    for action in parser_of(script)._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and not isinstance(action, argparse._HelpAction):
                yield action, flag


def value_for(action: argparse.Action) -> list[str]:
    """Something that `action` accepts on the command line."""
    if action.nargs == 0:
        return []
    if action.choices is not None:
        return [str(next(iter(action.choices)))]
    convert = action.type if callable(action.type) else str
    for text in ("3", "0.5", "gpt2"):
        try:
            convert(text)
        except (ValueError, argparse.ArgumentTypeError, GptError):
            continue
        return [text]
    raise AssertionError(f"no value found for {action.option_strings}")


def parse(script: str, *args: str) -> Namespace:
    return parser_of(script).parse_args([*SMALLEST[script], *args])


def run_script(script: str, *args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, str(ROOT / f"{script}.py"), *args], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_loads_no_library(script: str) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run_script(script, "--help", options=("-X", "importtime"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, so that tests running beside this one do not count.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "gpt" in loaded
    assert loaded.isdisjoint(HEAVY)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script: str) -> None:
    silent = [flag for action, flag in long_flags(script) if not action.help]
    assert silent == []
    assert parser_of(script).description


@pytest.mark.parametrize("script", SCRIPTS)
def test_dashes_and_underscores_are_the_same_in_every_flag(script: str) -> None:
    several_words = [(action, flag) for action, flag in long_flags(script) if "-" in flag[2:] or "_" in flag]
    assert several_words
    for action, flag in several_words:
        words = flag[2:].replace("_", "-")
        spellings = ["--" + words, "--" + words.replace("-", "_"), "--" + words.replace("-", "_", 1)]
        expected = parse(script, flag, *value_for(action))
        for spelling in spellings:
            assert parse(script, spelling, *value_for(action)) == expected, spelling
            for value in value_for(action):
                assert parse(script, f"{spelling}={value}") == expected, spelling


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_knows_the_log_levels(script: str) -> None:
    assert parse(script, "--log-level", "debug").log_level == "debug"
    assert parse(script, "--log_level", "internal_error").log_level == "internal_error"


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_with_2(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main([*SMALLEST[script], "--no_such_flag"])
    assert ended.value.code == 2
    assert "--no_such_flag" in capsys.readouterr().err


# All flags of nemo_prompt_convert begin with different letters.
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "nemo_prompt_convert"])
def test_an_ambiguous_prefix_ends_with_2_and_an_unambiguous_one_is_enough(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = sorted({flag.replace("_", "-") for _, flag in long_flags(script)} | {"--help"})
    prefixes = (flag[:length] for flag in flags for length in range(3, len(flag)))
    ambiguous = next(
        prefix for prefix in prefixes if prefix not in flags and sum(flag.startswith(prefix) for flag in flags) > 1
    )
    with pytest.raises(SystemExit) as ended:
        parse(script, ambiguous, "3")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "ambiguous" in message
    assert ambiguous in message
    assert parse(script, "--log-l", "error").log_level == "error"


def test_an_exact_flag_wins_over_the_longer_one_it_begins() -> None:
    parser = ArgumentParser()
    parser.add_argument("--enable_fmha", action="store_true")
    parser.add_argument("--enable_fmha_fp32", action="store_true")
    assert parser.parse_args(["--enable-fmha"]) == Namespace(enable_fmha=True, enable_fmha_fp32=False)
    assert parser.parse_args(["--enable_fmha-f"]) == Namespace(enable_fmha=False, enable_fmha_fp32=True)


def test_values_keep_their_spelling() -> None:
    parser = ArgumentParser()
    parser.add_argument("--engine_dir")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args(["--engine-dir=my_engine-dir", "a_b", "--", "--engine-dir"])
    assert args == Namespace(engine_dir="my_engine-dir", names=["a_b", "--engine-dir"])


@pytest.mark.parametrize(
    ("text", "error"),
    [("0", "at least 1"), ("-3", "at least 1"), ("many", "found many, allowed: an integer of at least 1")],
)
def test_counts_start_at_1(text: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--batch", type=positive_int)
    assert parser.parse_args(["--batch", "1"]).batch == 1
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--batch={text}"])
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_options_without_effect_are_refused_together() -> None:
    reject_unsupported([])
    with pytest.raises(ConfigError, match=r"--a: never[\s\S]*--b: not yet"):
        reject_unsupported(["--a: never", "--b: not yet"])


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.fixture(params=["error", "info", "debug"])
def log_level(request: pytest.FixtureRequest) -> Iterator[str]:
    setup_logging(request.param)
    yield request.param
    setup_logging("info")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a wrong flag", found=1), 2, "error: a wrong flag\n  found:   1"),
        (CheckpointError("a wrong file"), 3, "error: a wrong file"),
        (EngineError("a wrong engine"), 3, "error: a wrong engine"),
        (GptError("a wrong day"), 1, "error: a wrong day"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 1, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), 1, "error: out of GPU memory"),
        (OSError(errno.ENOSPC, "", "c-model/x.bin"), 1, "error: no space left on the device (c-model/x.bin)"),
        (OSError(errno.EDQUOT, ""), 1, "error: no space left on the device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: Permission denied (/x)"),
        (ModuleNotFoundError("", name="torch"), 1, "error: a package is not installed\n  found:   no module torch for"),
        (KeyError("n_head"), 1, "error: unexpected KeyError: 'n_head'"),
    ],
)
def test_whatever_ends_a_script_is_one_message_and_a_code(
    error: BaseException, code: int, message: str, log_level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(raising(error)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    traceback = "Traceback" in output.err
    assert traceback == (log_level == "debug" and not isinstance(error, KeyboardInterrupt))


def test_a_body_that_ends_well_gives_its_own_code() -> None:
    assert run_main(lambda: None) == 0
    assert run_main(lambda: 4) == 4


PRINTING = """
import sys
from gpt.cli import run_main
def body():
    for _ in range(int(sys.argv[1])):
        print(sys.argv[2])
sys.exit(run_main(body))
"""


def start_printing(num_lines: int, stdout: int, text: str = "a line", **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | more
    command = [sys.executable, "-c", PRINTING, str(num_lines), text]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("num_lines", [2, 100_000])
def test_a_reader_that_stops_reading_is_no_error(num_lines: int) -> None:
    reader, writer = os.pipe()
    process = start_printing(num_lines, writer)
    os.close(writer)
    os.close(reader)
    _, message = process.communicate()
    assert (process.returncode, message) == (0, "")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_no_error(closed: int) -> None:
    program = (
        "import sys; from gpt.cli import run_main; from gpt.console import log, progress, setup_logging;"
        "setup_logging('info'); log.info('told'); sys.exit(run_main(lambda: print(*progress([7], what='work'))))"
    )
    shell = ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, program]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "" if closed == 1 else "7\n")
    assert result.stderr.endswith("[gpt] [I] told\n") if closed == 1 else not result.stderr


def test_an_output_without_unicode_gets_escapes() -> None:
    process = start_printing(1, subprocess.PIPE, "Wörter 日", PYTHONIOENCODING="latin-1", PYTHONUTF8="1")
    out = process.stdout.buffer.read() if process.stdout else b""  # type: ignore[attr-defined]
    assert process.communicate()[1] == ""
    assert (process.returncode, out) == (0, "Wörter \\u65e5\n".encode("latin-1"))


@pytest.mark.parametrize("num_lines", [2, 100_000])
def test_a_full_disk_behind_a_redirection_is_told(num_lines: int) -> None:
    with open("/dev/full", "wb") as full:
        process = start_printing(num_lines, full.fileno())
        _, message = process.communicate()
    assert process.returncode == 1
    assert message.startswith("error: no space left on the device\n")
    assert "Exception ignored" not in message


@pytest.fixture
def end_interval(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What the clock does for bars that are told line by line; none of them leaves a thread behind."""
    running: list[Timer] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, function: Callable[[], None]):
            self.function = function

        def start(self) -> None:
            running.append(self)

        def cancel(self) -> None:
            running.remove(self)

    def end() -> None:
        for timer in running.copy():
            running.remove(timer)
            timer.function()

    monkeypatch.setattr(console, "Timer", Timer)
    yield end
    assert not running


@pytest.mark.parametrize("level", ["info", "error"])
def test_progress_is_told_line_by_line_where_there_is_no_terminal(
    level: str, end_interval: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    console.setup_logging(level)
    with console.progress(total=4, what="Prompts", unit="prompt", always=True) as bar:
        for count in (1, 3):
            bar.update(count)
            bar.refresh()  # it would wait a moment
            end_interval()
            end_interval()  # nothing new
        bar.refresh()  # with the bar goes what would be told of it
    line = r".*\[I\] Prompts: %d of 4, .*prompt/s, \d\d:\d\d left\n"
    told = capsys.readouterr().err
    assert re.fullmatch(line % 1 + line % 4, told) if level == "info" else told == ""


def test_a_bar_that_begins_anew_often_is_told_once_per_interval(
    end_interval: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorRT's does for hundreds of phases, each of which draws it; the last of them may take long."""
    console.setup_logging("info")
    with console.progress(what="TensorRT", unit="step") as bar:
        for phase in range(100):
            bar.reset(total=2)
            bar.set_description_str(f"phase {phase}")
            if phase in (50, 99):
                end_interval()
    told = capsys.readouterr().err
    assert re.findall(r"phase \d+", told) == ["phase 50", "phase 99"]
