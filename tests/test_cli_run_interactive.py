"""run.py on a terminal: a real one, of which the test holds the other end."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import build_engine, convert
from ranks import LIMIT_S, ROOT, environment
from tiny_models import tiny_gpt2

import run

COUNT = 12


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("interactive")
    hf = tiny_gpt2(base / "hf", vocab_size=264, n_positions=2000)
    limits = ["--max_batch_size", "2", "--max_beam_width", "2", "--max_input_len", "60", "--max_output_len", "1900"]
    build_engine(convert(hf, base / "ft"), base / "engine", *limits)
    return base / "engine"


class Terminal:
    """run.py with a terminal for stdin and stdout, and a pipe for stderr."""

    def __init__(self, *flags: object):
        self._end, theirs = pty.openpty()
        command = [sys.executable, "run.py", "--device", "cpu", *map(str, flags)]
        # A process group of its own, so that an interrupt reaches it alone.
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(TERM="dumb", PYTHONIOENCODING="utf-8"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(theirs)
        self._seen = ""

    def expect(self, text: str) -> str:
        """What the terminal shows up to and with `text`."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self._seen:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} did not come behind {self._seen!r}")
            if select.select([self._end], [], [], 0.1)[0]:
                self._seen += os.read(self._end, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
        shown, self._seen = self._seen[: self._seen.index(text)], self._seen[self._seen.index(text) + len(text) :]
        return shown

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def answer(self, line: str) -> str:
        """What is shown for a typed line, without its echo."""
        self.type(line + "\n")
        self.expect(line + "\n")
        return self.expect("> ")

    def close(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, err = self.process.communicate(timeout=LIMIT_S)
        os.close(self._end)
        return self.process.returncode, err.decode()


@pytest.fixture
def terminal(engine: Path) -> Iterator[Terminal]:
    opened = Terminal("--engine_dir", engine, "--max_output_len", COUNT)
    yield opened
    opened.process.kill()


def text_of(engine: Path, prompt: str, count: int, capsys: pytest.CaptureFixture[str], **decoding: Any) -> str:
    """What the same engine makes without a terminal, as a terminal shows it."""
    (text,) = run.generate(count, engine_dir=engine, input_text=prompt, device="cpu", **decoding)
    capsys.readouterr()
    return text.replace("\r\n", "\n")


def test_a_session(engine: Path, terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    greeting = terminal.expect("> ")
    assert "/help" in greeting
    first = text_of(engine, "the end", COUNT, capsys)
    assert terminal.answer("the end") == first + "\n"
    assert terminal.answer("/again") == first + "\n"
    longer = text_of(engine, "the end", 2 * COUNT, capsys)
    assert (first + terminal.answer("/more")).rstrip("\n") == longer
    assert terminal.answer("//a") == text_of(engine, "/a", COUNT, capsys) + "\n"
    assert terminal.answer("") == ""
    assert terminal.answer("/set --max_output_len 3 --repetition_penalty 1.5") == (
        "at most 3 new tokens, greedy: repetition_penalty 1.5\n"
    )
    assert terminal.answer("/set --stop_words 'a b' --min_length 2").endswith("min_length 2, stop_words 'a b'\n")
    assert terminal.answer("/set --stop_words c --stop_words d").endswith("min_length 2, stop_words 'c' 'd'\n")
    assert terminal.answer("/reset") == f"at most {COUNT} new tokens, greedy\n"
    assert terminal.answer("/set --max_output_len 3 --repetition_penalty 1.5")
    assert terminal.answer("/set --repetition_penalty 1").endswith("greedy\n")
    assert terminal.answer("in the") == text_of(engine, "in the", 3, capsys) + "\n"
    assert re.fullmatch(
        r"\[1\].*\n\[2\].*\n", terminal.answer("/set --num_beams 2") and terminal.answer("a"), re.DOTALL
    )
    assert "/more" in terminal.answer("/help")
    too_long = "/set --max_output_len 1961"  # what the engine holds, and one more
    for wrong in (
        too_long,
        "/set --top_k x",
        "/set --top_k 999 --top_p 0.5",
        "/what",
        "/set 'open",
        "x" * 61,
        "/set --bogus 1",
        "/set --logprobs",
    ):
        assert terminal.answer(wrong) == ""
    assert terminal.answer("/show") == "at most 3 new tokens, 2 beams\n"
    assert terminal.answer("/set --num_beams 1 --top_k 5").endswith("sampled: top_k 5\n")
    drawn = terminal.answer("the end")
    terminal.type("\x04")
    code, err = terminal.close()
    assert code == 0
    for part in ("argument --top_k: invalid int value: 'x'", "--top_k 999", "no such command", "quotes", "61 tokens"):
        assert part in err
    assert "unrecognized arguments: --bogus" in err
    assert "--logprobs goes with prompts on the command line or in a file" in err
    assert "no room for a prompt" in err
    assert len(re.findall(r"^\(\d+ new tokens in .* tokens/s", err, re.M)) == 7
    (seed,) = re.findall(r"^\(.*, seed (\d+)\)$", err, re.M)
    assert drawn == text_of(engine, "the end", 3, capsys, top_k=5, seed=int(seed)) + "\n"
    assert "Traceback" not in err


def test_ctrl_c_stops_the_answer_alone(engine: Path) -> None:
    terminal = Terminal("--engine_dir", engine, "--max_output_len", 1900, "--end_id", 0)
    terminal.expect("> ")
    for _ in range(20):  # an answer takes about a second, which a busy machine may let pass before the signal
        terminal.type("the\n")
        terminal.expect("the\n")
        while len(terminal._seen) < 20:
            terminal._seen += os.read(terminal._end, 1024).decode("utf-8", "replace")
        os.killpg(terminal.process.pid, signal.SIGINT)  # what a terminal's driver does for Ctrl-C
        if terminal.expect("\n> ").endswith("(stopped)"):
            break
    else:
        pytest.fail("no answer was stopped")
    assert terminal.answer("/set --max_output_len 2").startswith("at most 2 new tokens")
    assert terminal.answer("a")
    # With nothing to stop.  A signal between the prompt and the first look at the keyboard is only noticed at the next
    # event, Python's line input being what it is: like a person, press again.
    for _ in range(20):
        os.killpg(terminal.process.pid, signal.SIGINT)
        if select.select([terminal._end], [], [], 1.0)[0]:
            break
    terminal.expect("\n> ")
    terminal.type("/quit\n")
    code, err = terminal.close()
    assert (code, "Traceback" in err) == (0, False)


def test_a_prompt_or_a_file_for_the_result_needs_no_session(engine: Path, tmp_path: Path) -> None:
    flags = ("--engine_dir", engine, "--max_output_len", 2)
    terminal = Terminal(*flags, "--input_text", "a")
    assert terminal.expect('Output: "') == 'Input: "a"\n'
    assert terminal.close()[0] == 0
    terminal = Terminal(*flags, "--output_csv", tmp_path / "a.csv")
    assert terminal.close()[0] == 0
    assert (tmp_path / "a.csv").exists()


def test_a_session_that_cannot_begin_ends_at_once(engine: Path) -> None:
    terminal = Terminal("--engine_dir", engine, "--max_output_len", 2, "--top_k", 999)
    code, err = terminal.close()
    assert code == 2
    assert "--top_k 999" in err


def test_a_text_that_becomes_too_long_goes_on_from_its_end(engine: Path) -> None:
    flags = ("--engine_dir", engine, "--max_output_len", COUNT, "--end_id", 0)
    for more, goes_on in (((), False), (("--on_long_prompt", "truncate"), True)):
        terminal = Terminal(*flags, *more)
        terminal.expect("> ")
        assert terminal.answer("x" * 55)
        assert bool(terminal.answer("/more")) == goes_on
        terminal.type("\x04")
        code, err = terminal.close()
        assert (code, "Cut to its last 60 tokens" in err) == (0, goes_on)


def test_a_session_uses_the_paged_cache_as_the_flags_say(engine: Path, tmp_path: Path) -> None:
    terminal = Terminal("--engine_dir", engine, "--max_output_len", 2, "--max_draft_len", 3)
    code, err = terminal.close()
    assert (code, "the engine has no paged cache" in err) == (2, True)
    limits = ["--max_batch_size", "2", "--max_input_len", "60", "--max_output_len", "100", "--tokens_per_block", "4"]
    build_engine(engine.parent / "ft" / "1-gpu", tmp_path / "paged", *limits, "--paged_kv_cache")
    flags = ("--engine_dir", tmp_path / "paged", "--max_output_len", 40, "--max_tokens_in_paged_kv_cache", 8)
    terminal = Terminal(*flags)
    terminal.expect("> ")
    assert terminal.answer("the end") == ""
    terminal.type("\x04")
    code, err = terminal.close()
    assert (code, "--max_tokens_in_paged_kv_cache 8" in err) == (0, True)
