"""summarize.py --eval_type code_completion: what is asked, what is compared, what it says about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from engines import build_engine, convert
from tiny_models import tiny_gpt2

import summarize
from gpt.runtime.generate import Generation
from gpt.text.comparison import SummarizeConfig, compare
from gpt.text.dataset import HUMANEVAL, load_articles
from gpt.text.evaluation import TASKS, Side, SideResult, evaluate, first_line, function_part
from gpt.text.tokenizer import load_tokenizer

CODE = TASKS["code_completion"]
ROWS = [
    {"prompt": f'def f{n}(a):\n    """Don\'t do it, or do n\'t."""\n', "canonical_solution": f"    return a + {n}\n"}
    for n in range(3)
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's folder; the Hugging Face model is beside it in `hf`."""
    base = tmp_path_factory.mktemp("code")
    hf = tiny_gpt2(base / "hf", vocab_size=264, n_positions=96)
    limits = ["--max_batch_size", "4", "--max_input_len", "80", "--max_output_len", "16"]
    build_engine(convert(hf, base / "ft"), base / "engine", *limits)
    return base / "engine"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\n\ndef g():\n    return 2\n", "    return 1\n\n\n"),
        ("    if a:\n\n        b()\n\tc()\n# next\n", "    if a:\n\n        b()\n\tc()\n"),
        (".path.exists(a)\n    return\nx", ".path.exists(a)\n    return\n"),
        ("x = 1", "x = 1"),
        ("", ""),
    ],
)
def test_only_what_belongs_to_the_function_is_compared(code: str, expected: str) -> None:
    assert function_part(code) == expected


@pytest.mark.parametrize(
    ("code", "expected"), [("\n\n   return a \n  b\n", "return a"), ("x", "x"), ("", ""), (" \n", "")]
)
def test_first_line(code: str, expected: str) -> None:
    assert first_line(code) == expected


def test_prompts_are_the_code_itself() -> None:
    assert CODE.prompt(ROWS[0]["prompt"]) == ROWS[0]["prompt"]
    assert TASKS["summarize"].prompt("x") == "x TL;DR:"


def _evaluate(outputs: Sequence[str], references: Sequence[str], hf: Path) -> SideResult:
    tokenizer = load_tokenizer(hf)
    ids = iter([tokenizer.encode(output) for output in outputs])
    side = Side("s", "s", lambda prompts, *, first_row: Generation(tokens=[next(ids) for _ in prompts], context_ms=1.0))
    return evaluate(side, [[1]] * len(outputs), references, tokenizer, None, 2, CODE)


def test_a_solution_that_runs_on_scores_like_the_solution(engine: Path) -> None:
    references = ["    return a + 1\n", "    b = a\n    return b\n", "    pass\n"]
    outputs = ["    return a + 1\n\ndef g(many, other, words):\n    pass\n", "\n    b =  a\n    c\n", "    b = a\n"]
    result = _evaluate(outputs, references, engine.parent / "hf")
    assert result.texts == ["    return a + 1\n\n", "\n    b =  a\n    c\n", "    b = a\n"]
    assert result.scores[0]["rouge1"] == pytest.approx(100)
    assert result.scores[2]["rouge1"] == 0
    assert result.same_first_line == [True, False, False]
    assert result.first_line_percent == pytest.approx(100 / 3)


def test_both_sides_and_the_report(
    engine: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    flags = ["--eval_type", "code_completion", "--test_trt_llm", "--test_hf", "--engine_dir", engine]
    flags += ["--hf_model_location", engine.parent / "hf", "--dataset_path", rows, "--device", "cpu"]
    flags += ["--batch_size", "2", "--output_len", "12", "--report", report, "--log_level", "error"]
    assert summarize.main([str(flag) for flag in flags]) == 0
    out = capsys.readouterr().out
    for label in ("Engine", "HF"):
        assert (
            f"{label} Generated : \n Input : {ROWS[0]['prompt']}\n\n Reference : {ROWS[0]['canonical_solution']}" in out
        )
    assert "TL;DR" not in out
    assert re.search(r"^Measured: text shared with the reference solution .* no code is executed", out, re.MULTILINE)
    assert len(re.findall(r"^  equal first lines : [\d.]+ %$", out, re.MULTILINE)) == 2
    assert "identical output ids: 3 of 3 prompts" in out
    text = report.read_text(encoding="utf-8")
    for part in (
        "<h1>Code completions: Engine and",
        "no code is executed",
        "equal first lines, %",
        "Prompt 2",
        "3 from",
    ):
        assert part in text
    assert "ummar" not in re.sub(r"</?summary>|<style>.*?</style>|summarize\.py", "", text, flags=re.DOTALL)


def test_the_measured_prompts_are_those_of_the_demo(engine: Path, rows: Path, tmp_path: Path) -> None:
    """The whole code, nothing behind it, blanks and `n't` as they are."""
    config = SummarizeConfig(
        engine,
        test_engine=True,
        hf_model=None,
        dataset_path=rows,
        output_len=4,
        device="cpu",
        eval_type="code_completion",
    )
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as out:
        prompts = compare(config, out).prompts
    tokenizer = load_tokenizer(engine.parent / "hf")
    assert [tokenizer.decode(prompt) for prompt in prompts] == [row["prompt"] for row in ROWS]


def test_columns_can_be_named(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.json").write_text(json.dumps([{"begin": "def f():\n", "rest": "    pass\n"}]))
    flags = ["--eval_type", "code_completion", "--test_engine", "--engine_dir", str(engine), "--device", "cpu"]
    flags += ["--dataset_path", str(tmp_path / "own.json"), "--output_len", "4", "--log_level", "error"]
    assert summarize.main(flags) == 2
    assert "no column prompt and no column canonical_solution" in capsys.readouterr().err
    assert summarize.main([*flags, "--article_column", "begin", "--highlights_column", "rest"]) == 0


def test_a_low_score_names_completions(engine: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--eval_type", "code_completion", "--test_engine", "--engine_dir", str(engine), "--device", "cpu"]
    flags += ["--dataset_path", str(rows), "--output_len", "4", "--check_accuracy", "--rouge1_threshold", "99"]
    assert summarize.main([*flags, "--log_level", "error"]) == 1
    assert "completions are not good enough" in capsys.readouterr().err


def test_without_a_path_humaneval_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def answer(*args: object, **options: object) -> list[dict[str, str]]:
        asked.extend([*args, options["split"]])
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", answer)
    articles = load_articles(None, HUMANEVAL.text_column, HUMANEVAL.reference_column, 2, CODE.data)
    assert asked == ["openai/openai_humaneval", "openai_humaneval", "test"]
    assert [article.text for article in articles] == [row["prompt"] for row in ROWS[:2]]
