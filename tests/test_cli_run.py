"""run.py from the command line: what it prints and writes, and how it ends when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Engine, tiny_engine

import run
from gpt.runtime import load
from gpt.runtime.execution import Execution
from gpt.runtime.session import Session
from gpt.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
MAX_INPUT, MAX_OUTPUT, END = 44, 20, 263
PROMPTS = ["the end", "a", "in the north, naïve", "on"]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny GPT-2 with random weights, converted and built in float32, at most three prompts at a time."""
    limits = ["--max_batch_size", "3", "--max_input_len", str(MAX_INPUT), "--max_output_len", str(MAX_OUTPUT)]
    return tiny_engine(tmp_path_factory.mktemp("run"), *limits)


@pytest.fixture
def main(engine: Engine, call_script: Main) -> Main:
    """`main(*flags)` -> exit code, stdout, stderr; engine and length are given unless the flags name them."""

    def call(*flags: object, engine_dir: Path = engine.folder, max_output_len: int = 8) -> tuple[int, str, str]:
        given = ["--engine_dir", engine_dir, "--max_output_len", max_output_len, "--device", "cpu"]
        return call_script(run.main, *given, *flags)

    return call


def _hf_rows(engine: Engine, prompts: Sequence[Sequence[int]], count: int, end_id: int = END) -> list[list[int]]:
    """New tokens of each prompt by Hugging Face, one prompt at a time, up to and with the end token."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(engine.hf).eval()
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            while len(ids) < len(prompt) + count and end_id not in ids[len(prompt) :]:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


def _expected_text(engine: Engine, prompts: Sequence[str], count: int) -> str:
    tokenizer = load_tokenizer(engine.hf)
    rows = _hf_rows(engine, [tokenizer.encode(prompt) for prompt in prompts], count)
    texts = [tokenizer.decode(row[:-1] if row[-1] == END else row, skip_special=False) for row in rows]
    return "".join(f'Input: "{prompt}"\nOutput: "{text}"\n' for prompt, text in zip(prompts, texts, strict=True))


def test_text_is_what_hugging_face_generates(engine: Engine, main: Main) -> None:
    """Rows shorter than their batch's longest print all their tokens."""
    assert main("--input_text", *PROMPTS) == (0, _expected_text(engine, PROMPTS, 8), "")


def test_streaming_prints_the_same_text(engine: Engine, main: Main) -> None:
    expected = _expected_text(engine, PROMPTS, MAX_OUTPUT)
    code, out, err = main("--input_text", *PROMPTS, "--streaming", max_output_len=MAX_OUTPUT)
    assert (code, out) == (0, expected)
    assert re.fullmatch(r"\d+ new tokens in [\d.]+ s, [\d.]+ tokens/s, [\d.]+ ms per token\n", err)


def test_no_flag_but_the_length_uses_the_default_prompt(main: Main) -> None:
    code, out, _ = main(max_output_len=2)
    assert code == 0
    assert out.startswith('Input: "Born in north-east France, Soyer trained as a"\nOutput: "')


@pytest.mark.parametrize("flag", ["--input_file", "--input-file"])
def test_text_file(engine: Engine, main: Main, tmp_path: Path, flag: str) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    assert main(flag, tmp_path / "prompts.txt") == (0, _expected_text(engine, PROMPTS, 8), "")


def test_token_files_in_and_out(engine: Engine, main: Main, tmp_path: Path) -> None:
    """Whole rows, filled with the end id, nothing on stdout; both kinds of input give the same."""
    prompts = [[5, 6, 7, 8], [9], [10, END, 11], [12, 13]]
    (tmp_path / "in.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in prompts))
    np.save(tmp_path / "in.npy", np.array([row + [END] * (4 - len(row)) for row in prompts]))
    rows = _hf_rows(engine, prompts, 6)
    expected = [(a + b + [END] * 10)[:10] for a, b in zip(prompts, rows, strict=True)]
    for flag, source in (("--input_tokens", "in.csv"), ("--input_tokens", "in.npy"), ("--input_file", "in.npy")):
        out = tmp_path / f"out{flag}-{source}" / "deep"
        flags = (flag, tmp_path / source, "--output_csv", out / "a.csv", "--output_npy", out / "a.npy")
        assert main(*flags, max_output_len=6) == (0, "", "")
        array = np.load(out / "a.npy")
        assert (array.dtype, array.tolist()) == (np.int32, expected)
        text = (out / "a.csv").read_bytes().decode()
        assert text == "".join(",".join(map(str, row)) + "\r\n" for row in expected)


def test_the_end_token_stops_a_row_and_is_not_printed(engine: Engine, main: Main, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(engine.hf)
    (free,) = _hf_rows(engine, [tokenizer.encode("the end")], 8)
    end_id = free[3]
    kept = free[: free.index(end_id)]
    flags = ("--input_text", "the end", "--end_id", end_id)
    for streaming in ([], ["--streaming"]):
        code, out, _ = main(*flags, *streaming)
        assert (code, out) == (0, f'Input: "the end"\nOutput: "{tokenizer.decode(kept, skip_special=False)}"\n')
    main(*flags, "--output_npy", tmp_path / "a.npy")
    prompt = tokenizer.encode("the end")
    assert np.load(tmp_path / "a.npy").tolist() == [(prompt + kept + [end_id] * 8)[: len(prompt) + 8]]


def test_another_tokenizer_can_be_named(engine: Engine, main: Main) -> None:
    code, out, _ = main("--tokenizer", engine.hf, "--input_text", "the end")
    assert (code, out) == (0, _expected_text(engine, ["the end"], 8))


def test_token_files_need_no_tokenizer(engine: Engine, main: Main, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("5,6\n")
    bare = tmp_path / "engine"
    bare.mkdir()
    for item in engine.folder.iterdir():
        if item.is_file():
            (bare / item.name).symlink_to(item)
    code, out, err = main("--input_tokens", tmp_path / "in.csv", "--output_npy", tmp_path / "a.npy", engine_dir=bare)
    assert (code, out, err) == (0, "", "")
    for flags in ((), ("--input_tokens", tmp_path / "in.csv")):
        code, out, err = main(*flags, engine_dir=bare)
        assert (code, out) == (2, "")
        assert "no tokenizer to" in err
        assert "--tokenizer <folder or hub name>" in err


def test_importable_function_returns_the_texts(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    texts = run.generate(
        8, engine_dir=str(engine.folder), input_text=PROMPTS, tokenizer_path=str(engine.hf), num_beams=1, device="cpu"
    )
    expected = _expected_text(engine, PROMPTS, 8)
    assert capsys.readouterr().out == expected
    assert texts == re.findall(r'^Output: "(.*?)"\n(?=Input|\Z)', expected, flags=re.DOTALL | re.MULTILINE)


def test_timing_is_told_at_info_level(main: Main) -> None:
    code, _, err = main("--log_level", "info", "--input_text", "a", "--end_id", 0, max_output_len=4)
    assert code == 0
    assert re.search(r"new tokens in [\d.]+ s, [\d.]+ tokens/s", err)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Every session behaves as if somebody pressed Ctrl-C instead of its step number `num_steps`."""
    real = load.load_session

    def interrupted_session(*args: Any) -> Any:
        session = real(*args)
        generation = session.generation
        calls: list[int] = []

        def step(ids: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == num_steps:
                raise KeyboardInterrupt
            return generation(ids)

        monkeypatch.setattr(session, "generation", step)
        return session

    monkeypatch.setattr(load, "load_session", interrupted_session)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_interrupt_leaves_what_there_is(
    engine: Engine, main: Main, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """Three prompts are complete, the fourth has three of its tokens, the fifth has not begun."""
    whole = _expected_text(engine, PROMPTS[:3], 8) + _expected_text(engine, PROMPTS[3:], 3)
    interrupt_after(monkeypatch, 7 + 3)
    prompts = [*PROMPTS[:3], PROMPTS[3]]
    code, out, err = main("--input_text", *prompts, *(["--streaming"] if streaming else []))
    assert (code, out) == (130, whole)
    assert err.startswith("error: interrupted\n  found:\n    - 3 of 4 outputs are complete\n  next:    --output_file")


def test_an_interrupted_token_file_has_another_name(
    engine: Engine, main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_after(monkeypatch, 3)
    code, out, err = main("--input_text", *PROMPTS, "--output_csv", tmp_path / "a.csv", "--end_id", 0)
    assert (code, out) == (130, "")
    assert "0 of 4 outputs are complete" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.interrupted.csv"]
    assert "a.interrupted.csv" in err
    assert len((tmp_path / "a.interrupted.csv").read_text().splitlines()) == 3


def _csv(folder: Path, content: str) -> list[object]:
    (folder / "in.csv").write_text(content)
    return ["--input_tokens", folder / "in.csv"]


def _npy(folder: Path, array: np.ndarray) -> list[object]:
    np.save(folder / "in.npy", array)
    return ["--input_tokens", folder / "in.npy"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (lambda _: ["--input_text", "x" * 45], ["prompt 0: 45 tokens", f"--max_input_len {MAX_INPUT}"]),
        (
            lambda _: ["--input_text", "a", "--max_output_len", 99],
            ["1 + 99 new tokens", f"--max_output_len {MAX_OUTPUT}"],
        ),
        (lambda _: ["--input_text", "a", ""], ["empty prompt", "prompt 1: ''"]),
        (lambda _: ["--input_text", "a", "b\udcff"], ["prompt 1: character 2 is a byte that is not UTF-8"]),
        (lambda _: ["--input_text", "a", "--max_output_len", 0], ["at least 1"]),
        (lambda d: _csv(d, "1,2\n3,264,-1\n"), ["prompt 1: token ids -1, 264", "0 to 263"]),
        (lambda d: _csv(d, "1,2\nthe end\n"), ["row 2, column 1: 'the end'", "--input_file"]),
        (lambda d: _csv(d, "1,,2\n"), ["row 1, column 2: an empty cell"]),
        (lambda d: _csv(d, ""), ["holds no prompts"]),
        (lambda d: _npy(d, np.ones((2, 2))), ["float64 [2, 2]", "integers [prompts, tokens]"]),
        (lambda d: _npy(d, np.ones((1, 2, 2), np.int32)), ["int32 [1, 2, 2]"]),
        (lambda d: ["--input_tokens", d / "absent.csv"], ["no such input file"]),
        (lambda d: ["--input_file", d / "absent.txt"], ["no such input file"]),
        (lambda d: ["--input_tokens", d / "in.txt"], ["format not supported", ".txt", ".csv, .npy"]),
        (
            lambda d: ["--input_file", d / "in.docx"],
            ["format not supported", ".docx", ".txt, .jsonl, .parquet, .csv, .npy"],
        ),
        (lambda d: [*_csv(d, "1\n"), "--input_text", "a"], ["one place", "--input_text, --input_tokens"]),
        (lambda d: [*_csv(d, "1\n"), "--column", "x"], ["--input_tokens holds ids", "--input_file"]),
        (lambda _: ["--column", "x"], ["--column x without --input_file"]),
        (lambda d: ["--tokenizer", d / "absent"], ["no such tokenizer folder"]),
        (lambda d: ["--vocab_file", d / "absent.model"], ["no such sentencepiece model"]),
        (lambda _: ["--end_id", 264], ["--end_id", "0 to 263"]),
        (lambda d: ["--output_csv", d], ["is a folder"]),
        (lambda _: ["--device", "tpu"], ["unknown device", "auto, cpu, cuda"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    main: Main, tmp_path: Path, flags: Callable[[Path], list[object]], expected: list[str]
) -> None:
    code, out, err = main(*flags(tmp_path))
    assert (code, out) == (2, "")
    for part in expected:
        assert part in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*a*"))


def test_everything_unsupported_is_listed_at_once(main: Main, tmp_path: Path) -> None:
    flags = ("--num_beams", 4, "--streaming", "--output_csv", tmp_path / "a")
    code, out, err = main(*flags)
    assert (code, out) == (2, "")
    for part in ("--streaming with --num_beams 4", "--streaming prints text"):
        assert part in err


def test_prompts_are_refused_before_the_engine_is_loaded(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """All batches at once: the fourth prompt is the only one of the second batch."""
    monkeypatch.setattr(load, "load_session", lambda *args: pytest.fail("nothing is loaded for these prompts"))
    code, out, err = main("--input_text", "a", "b", "c", "x" * 45)
    assert (code, out) == (2, "")
    assert "prompt 3: 45 tokens" in err


def test_a_bad_engine_is_exit_code_3(main: Main, tmp_path: Path) -> None:
    code, out, err = main(engine_dir=tmp_path / "absent")
    assert (code, out) == (3, "")
    assert "no engine folder" in err


def test_starting_up_imports_neither_transformers_nor_matplotlib(engine: Engine) -> None:
    code = (
        "import sys, run; run.main(sys.argv[1:]);"
        "print(sorted({'transformers', 'datasets', 'matplotlib', 'sentencepiece'} & set(sys.modules)))"
    )
    flags = ["--engine_dir", str(engine.folder), "--max_output_len", "2", "--device", "cpu"]
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_how_steps_run_is_handed_to_the_session(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Execution] = []
    load_session = load.load_session

    def record(*args: Any) -> Session:
        made.append(args[-1])
        return load_session(*args)

    monkeypatch.setattr(load, "load_session", record)
    code, out, err = main("--batch_invariant", "--no_cuda_graphs", "--log_level", "warning")
    assert code == 0
    assert "--no_cuda_graphs has no effect" in err
    assert (code, out) == main()[:2]
    assert [execution.batch_invariant for execution in made] == [True, False]
    assert [execution.cuda_graphs for execution in made] == [False, True]
