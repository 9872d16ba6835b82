"""run.py and summarize.py with sampling, from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine, convert
from tiny_models import tiny_gpt2

import run
import summarize
from gpt.runtime import load
from gpt.text.tokenizer import load_tokenizer

PROMPTS = ("the end", "the end", "a", "in the north")
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("sampling") / "hf", vocab_size=264)


@pytest.fixture(scope="module")
def engines(hf_model: Path) -> dict[int, Path]:
    """Maximal batch size -> engine folder, all of the same float32 weights."""
    checkpoint = convert(hf_model, hf_model.parent / "ft")
    folders = {}
    for size in (1, 3):
        folders[size] = hf_model.parent / f"engine{size}"
        build_engine(checkpoint, folders[size], "--max_batch_size", str(size), "--max_output_len", "20")
    return folders


@pytest.fixture
def main(engines: dict[int, Path], call_script: Main) -> Main:
    """`main(*flags)` -> exit code, stdout, stderr of run.py with four prompts, two of them equal."""

    def call(*flags: object, batch_size: int = 3) -> tuple[int, str, str]:
        given = ["--engine_dir", engines[batch_size], "--max_output_len", 12, "--device", "cpu"]
        return call_script(run.main, *given, *flags, "--input_text", *PROMPTS)

    return call


def test_a_seed_repeats_in_batches_of_any_size(main: Main) -> None:
    flags = ("--top_k", 50, "--top-p", 0.95, "--temperature", 1.5, "--seed", 11)
    code, out, err = main(*flags)
    assert (code, err) == (0, "")
    assert main(*flags) == main(*flags, batch_size=1) == (0, out, "")
    assert main(*flags, "--streaming")[:2] == (0, out)
    assert main(*flags[:-1], 12)[1] != out
    first, second, *_ = re.findall(r'^Output: "(.*?)"\n(?=Input|\Z)', out, flags=re.DOTALL | re.MULTILINE)
    assert first != second


def test_the_random_seed_is_told_and_repeats_the_run(main: Main) -> None:
    code, out, err = main("--top_k", 0)
    assert code == 0
    seeds = re.findall(r"--seed (\d+) repeats this run", err)
    assert len(seeds) == 1
    assert main("--top_k", 0, "--seed", seeds[0])[1] == out
    assert main("--top_k", 0)[1] != out


def test_greedy_is_the_default_and_tells_no_seed(main: Main) -> None:
    code, out, err = main("--log_level", "info", "--seed", 3)
    assert code == 0
    assert "--seed" not in err
    assert main() == main("--top_k", 1) == main("--top_k", 1, "--top_p", 0) == (0, out, "")


def test_every_flag_reaches_the_choice(main: Main, hf_model: Path, tmp_path: Path) -> None:
    """Each one alone changes the tokens; a block of single tokens leaves none twice."""
    plain = main("--top_k", 0, "--seed", 1)[1]
    for flag, value in (("--temperature", 0.3), ("--top_p", 0.1), ("--min_p", 0.9)):
        assert main("--top_k", 0, "--seed", 1, flag, value)[1] != plain, flag
    lengths = [len(load_tokenizer(hf_model).encode(prompt)) for prompt in PROMPTS]

    def new_tokens(*flags: object) -> list[list[int]]:
        """The 12 columns behind each prompt, the fill of ended rows included."""
        code, _, err = main("--output_npy", tmp_path / "out.npy", *flags)
        assert (code, err) == (0, "")
        rows = np.load(tmp_path / "out.npy").tolist()
        return [row[length : length + 12] for row, length in zip(rows, lengths, strict=True)]

    end_id = new_tokens()[0][0]
    greedy = new_tokens("--end_id", end_id)
    assert greedy[0] == [end_id] * 12
    longer = new_tokens("--end_id", end_id, "--min_length", 5)
    assert end_id not in longer[0][:5]
    for flag, value in (("--repetition_penalty", 50), ("--presence_penalty", 2), ("--frequency_penalty", 2)):
        assert new_tokens(flag, value) != new_tokens(), flag
    for tokens in new_tokens("--no_repeat_ngram_size", 1, "--min_length", 12):
        assert len(set(tokens)) == 12


def test_the_function_takes_the_same_settings(
    main: Main, engines: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = main("--top_k", 9, "--temperature", 2, "--seed", 5)
    run.generate(12, engine_dir=engines[3], input_text=PROMPTS, device="cpu", top_k=9, temperature=2.0, seed=5)
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temperature", 0.7, "--min_p", 0.2], ["--temperature 0.7 with --top_k 1", "--min_p 0.2 with --top_k 1"]),
        (["--top_k", -1, "--top_p", 7, "--seed", -4], ["--top_k -1", "--top_p 7", "--seed -4"]),
        (["--top_k", 265, "--min_length", 13], ["--top_k 265: the vocabulary has 264", "--min_length 13: at most 12"]),
    ],
)
def test_bad_settings_are_refused_before_the_engine_is_loaded(
    main: Main, monkeypatch: pytest.MonkeyPatch, flags: list[object], expected: list[str]
) -> None:
    monkeypatch.setattr(load, "load_session", lambda *args: pytest.fail("nothing is loaded for these settings"))
    code, out, err = main(*flags)
    assert (code, out) == (2, "")
    for part in expected:
        assert part in err
    assert "Traceback" not in err


def test_summarize_samples_on_both_sides(
    hf_model: Path, engines: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both repeat with the seed, and the report says it; drawn at a temperature near 0, both make the same tokens."""
    rows = [{"article": f"the {word} of the north", "highlights": "the end"} for word in ("end", "day", "sea", "law")]
    articles = tmp_path / "articles.jsonl"
    articles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--test_engine",
        "--test_hf",
        "--engine_dir",
        engines[3],
        "--hf_model_location",
        hf_model,
        "--dataset_path",
    ]
    flags += [articles, "--batch_size", 2, "--max_ite", 2, "--output_len", 8, "--device", "cpu"]

    def texts(seed: int, *more: object) -> list[str]:
        report = tmp_path / "report.html"
        capsys.readouterr()
        assert summarize.main([str(flag) for flag in [*flags, "--seed", seed, "--report", report, *more]]) == 0
        assert f"at most 8, sampled: temperature 1.5, top_k 20, top_p 0.9, seed {seed}" in report.read_text()
        out = capsys.readouterr().out
        demos = re.findall(r"Output : .*?\n-{57}", out, flags=re.DOTALL)
        assert len(demos) == 2
        return demos + re.findall(r"^  rouge.*", out, flags=re.MULTILINE)

    settings = ("--top_k", 20, "--top_p", 0.9, "--temperature", 1.5)
    first = texts(1, *settings)
    assert texts(1, *settings) == first
    assert texts(2, *settings) != first
    assert summarize.main([str(flag) for flag in [*flags, "--top_k", 0, "--temperature", 0.001]]) == 0
    assert "identical output ids: 4 of 4" in capsys.readouterr().out
