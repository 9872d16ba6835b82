"""summarize.py from the command line: both sides from the same ids, scores, report, threshold, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from engines import Engine, build_engine, convert, tiny_engine

import summarize
from gpt.runtime.prompt_lookup import PromptLookup
from gpt.runtime.torch_session import TorchSession

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "gpt2-tiny"
ARTICLES = ROOT / "assets" / "articles.jsonl"
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    limits = ["--max_batch_size", "4", "--max_beam_width", "3", "--max_input_len", "40", "--max_output_len", "20"]
    return tiny_engine(tmp_path_factory.mktemp("summarize"), *limits)


@dataclass(frozen=True)
class BundledRun:
    """summarize.py with both sides in float32 on the bundled model and its 100 articles."""

    checkpoint: Path
    code: int
    out: str
    err: str
    report: Path


_QUIET = ["--device", "cpu", "--log_level", "error"]
_BUNDLED_LIMITS = ["--max_batch_size", "10", "--max_input_len", "412", "--max_output_len", "100"]
_BUNDLED_WORK = ["--dataset_path", ARTICLES, "--batch_size", 10, "--max_ite", 10, "--output_len", 40]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRun:
    base = tmp_path_factory.mktemp("bundled")
    checkpoint, report = convert(MODEL, base / "ft"), base / "deep" / "report.html"
    build_engine(checkpoint, base / "engine", *_BUNDLED_LIMITS)
    sides = ["--test_trt_llm", "--test_hf", "--engine_dir", base / "engine", "--hf_model_location", MODEL]
    check = ["--check_accuracy", "--tensorrt_llm_rouge1_threshold=14", "--report", report]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = summarize.main([*map(str, [*sides, *_BUNDLED_WORK, *check]), *_QUIET])
    return BundledRun(checkpoint, code, out.getvalue(), err.getvalue(), report)


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    """Five articles, one of them longer than the tiny model's positions."""
    path = tmp_path / "articles.jsonl"
    rows = [
        {"article": f"the text {n} in the north" + " on and on" * 9 * n, "highlights": f"text {n}"} for n in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def main(call_script: Main) -> Main:
    return lambda *flags: call_script(summarize.main, *flags, *_QUIET)


def _both(engine: Engine, articles: Path) -> list[object]:
    sides = ["--test_trt_llm", "--test_hf", "--engine_dir", engine.folder, "--hf_model_location", engine.hf]
    return [*sides, "--dataset_path", articles]


def _rouge(out: str, label: str) -> dict[str, float]:
    block = out[out.index(f"{label} beam 0 result") :]
    return {key: float(value) for key, value in re.findall(r"^  (rouge\w+) : (\S+)$", block, flags=re.MULTILINE)[:4]}


def test_bundled_model_on_bundled_articles_equals_hugging_face(bundled: BundledRun) -> None:
    """fp32, 100 articles: the same ids everywhere, hence a difference of exactly 0."""
    out = bundled.out
    assert (bundled.code, bundled.err) == (0, "")
    assert "identical output ids: 100 of 100 articles" in out
    ours, theirs = _rouge(out, "Engine"), _rouge(out, "HF")
    assert ours == theirs
    assert list(ours) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert ours["rouge1"] > 14
    assert len(re.findall(r"^(rouge\w+) +[\d.]+ +[\d.]+ +\+0\.000$", out, flags=re.MULTILINE)) == 4
    text = bundled.report.read_text(encoding="utf-8")
    assert text.count("<article") == 100
    assert "identical token ids for 100" in text
    assert [item.name for item in bundled.report.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("attention", [[], ["--use_gpt_attention_plugin"]], ids=["plain", "fused"])
def test_half_precision_scores_like_hugging_face(
    dtype: str, attention: list[str], bundled: BundledRun, main: Main, tmp_path: Path
) -> None:
    """ROUGE-1 within 0.5 of Hugging Face's in float32, 100 articles: some greedy texts differ, both ways.  Half
    precision of Hugging Face's on a CPU would take minutes and not be nearer to the truth."""
    build_engine(bundled.checkpoint, tmp_path, *_BUNDLED_LIMITS, "--dtype", dtype, *attention)
    code, out, _ = main("--test_trt_llm", "--engine_dir", tmp_path, *_BUNDLED_WORK)
    assert code == 0
    assert abs(_rouge(out, "Engine")["rouge1"] - _rouge(bundled.out, "HF")["rouge1"]) <= 0.5


def test_log_has_the_lines_of_the_original(tiny: Engine, articles: Path, main: Main) -> None:
    code, out, _ = main(*_both(tiny, articles), "--batch_size", 2, "--output_len", 10)
    assert code == 0
    for label, name in (("Engine", "Engine"), ("HF", "Hugging Face")):
        assert re.search(
            rf"^-+\n{label} Generated : \n Input : the text 0 in the north\n\n Reference : text 0\n", out, re.M
        )
        assert re.search(
            rf"^{name} \(total latency: [\d.]+ sec\)\n{label} beam 0 result\n  rouge1 : [\d.]+$", out, re.M
        )
    assert re.search(r"^  tokens/s : [\d.]+\n  ms per token : [\d.]+$", out, re.M)
    assert "identical output ids: 5 of 5 articles" in out


def test_every_beam_has_a_block(tiny: Engine, articles: Path, main: Main, tmp_path: Path) -> None:
    """Three beams of both sides, prompts of a batch padded in different places: the same ids, hence scores."""
    report = tmp_path / "report.html"
    flags = ("--num_beams", 3, "--length_penalty", 2, "--early_stopping", "--report", report)
    code, out, _ = main(*_both(tiny, articles), "--batch_size", 2, "--output_len", 10, *flags)
    assert code == 0
    assert "identical output ids: 5 of 5 articles" in out
    blocks = {
        label: [re.findall(rf"^{label} beam {beam} result\n((?:  rouge.*\n)+)", out, re.M) for beam in range(4)]
        for label in ("Engine", "HF")
    }
    assert blocks["Engine"] == blocks["HF"]
    assert [len(found) for found in blocks["HF"]] == [1, 1, 1, 0]
    assert "3 beams, length_penalty 2, early_stopping true" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("paged", [[], ["--paged_kv_cache", "--use_inflight_batching"]], ids=["contiguous", "paged"])
@pytest.mark.parametrize("beams", [[], ["--num_beams", 3, "--length_penalty", 0.7]], ids=["greedy", "beams"])
def test_penalties_blocks_and_stop_words_are_those_of_both_sides(
    tiny: Engine, articles: Path, main: Main, tmp_path: Path, beams: list[object], paged: list[str]
) -> None:
    """Prompts of a batch differ in length, and Hugging Face's processors take padding for text."""
    engine = tiny
    if paged:
        limits = ["--max_batch_size", "4", "--max_beam_width", "3", "--max_input_len", "40", "--max_output_len", "20"]
        build_engine(convert(tiny.hf, tmp_path / "ft"), tmp_path / "paged", *limits, *paged)
        engine = Engine(tiny.hf, tmp_path / "paged")
    flags = [*_both(engine, articles), "--batch_size", 3, "--output_len", 16, *beams]

    def text(*more: object) -> str:
        """The first article's, which both sides make."""
        code, out, err = main(*flags, *more)
        assert (code, err) == (0, "")
        assert "identical output ids: 5 of 5 articles" in out
        ours, theirs = re.findall(r"Output : (.*?)\n-{57}", out, flags=re.DOTALL)
        assert ours == theirs
        return str(ours)

    penalties = ("--repetition_penalty", 1.6, "--no_repeat_ngram_size", 2, "--min_length", 9)
    penalised = text(*penalties)
    assert penalised != text()
    word = next(sign for sign in penalised if sign in "0123456789+=")  # a token of its own
    assert text(*penalties, "--bad_words", word) != penalised
    assert text(*penalties, "--stop_words", word) == penalised.partition(word)[0]


def test_every_sample_has_a_block(tiny: Engine, articles: Path, main: Main) -> None:
    """Drawn at a temperature near 0, both sides' samples are the likeliest tokens, scored each by itself."""
    flags = ("--top_k", 0, "--temperature", 0.001, "--min_p", 0.1, "--num_return_sequences", 2, "--seed", 1)
    code, out, _ = main(*_both(tiny, articles), "--batch_size", 2, "--output_len", 10, *flags)
    assert code == 0
    assert "identical output ids: 5 of 5 articles" in out
    for label in ("Engine", "HF"):
        blocks = re.findall(rf"^{label} sample (\d) result\n((?:  rouge.*\n)+)", out, re.M)
        assert [number for number, _ in blocks] == ["0", "1"]
        assert blocks[0][1] == blocks[1][1]


@pytest.mark.parametrize("side", [["--test_engine"], ["--test_hf"]])
def test_one_side_alone(tiny: Engine, articles: Path, main: Main, side: list[str]) -> None:
    location = ["--hf_model_location", tiny.hf] if side == ["--test_hf"] else []
    flags = (*side, *location, "--engine_dir", tiny.folder, "--dataset_path", articles, "--output_len", 5)
    code, out, _ = main(*flags, "--max_ite", 3)
    assert code == 0
    assert out.count("beam 0 result") == 1
    assert "difference" not in out


def test_noticeable_recording_of_steps_is_told(
    tiny: Engine, articles: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchSession, "recording_seconds", 3.0, raising=False)
    flags = ("--test_engine", "--engine_dir", tiny.folder, "--dataset_path", articles, "--output_len", 5)
    code, _, errors = main(*flags, "--max_ite", 1)
    assert code == 0
    assert errors.startswith("3.0 s went into steps that came for the first time")


def test_hugging_face_alone_needs_no_engine(tiny: Engine, articles: Path, main: Main, tmp_path: Path) -> None:
    flags = (
        "--test_hf",
        "--hf_model_location",
        tiny.hf,
        "--engine_dir",
        tmp_path / "absent",
        "--dataset_path",
        articles,
    )
    code, out, _ = main(*flags, "--output_len", 5, "--data_type", "bf16")
    assert code == 0
    assert "HF beam 0 result" in out
    code, _, err = main(*flags, "--output_len", 5, "--stop_ids", "3,264")
    assert (code, "token ids 264, the model has 0 to 263" in err) == (2, True)


def test_batch_size_changes_nothing_but_the_time(tiny: Engine, articles: Path, main: Main) -> None:
    results = []
    for batch_size, max_ite in ((1, 5), (4, 2)):
        flags = ("--batch_size", batch_size, "--max_ite", max_ite, "--output_len", 10)
        code, out, _ = main(*_both(tiny, articles), *flags)
        assert code == 0
        results.append((_rouge(out, "Engine"), _rouge(out, "HF")))
    assert results[0] == results[1]


def test_drafts_leave_results_as_they_are(
    tiny: Engine, articles: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["--max_batch_size", "2", "--max_input_len", "40", "--max_output_len", "20", "--paged_kv_cache"]
    build_engine(convert(tiny.hf, tmp_path / "ft"), tmp_path / "paged", *limits, "--tokens_per_block", "4")
    proposed: list[tuple[int, ...]] = []
    propose = PromptLookup.propose

    def listen(self: PromptLookup, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        proposed.append(propose(self, tokens, room))
        return proposed[-1]

    monkeypatch.setattr(PromptLookup, "propose", listen)
    flags = ["--test_engine", "--dataset_path", articles, "--output_len", 15, "--batch_size", 2]
    expected = _rouge(main(*flags, "--engine_dir", tiny.folder)[1], "Engine")
    assert not proposed
    code, out, _ = main(*flags, "--engine_dir", tmp_path / "paged", "--max_draft_len", 4)
    assert code == 0
    assert _rouge(out, "Engine") == expected
    assert 0 < max(map(len, proposed)) <= 4


def test_a_low_score_ends_with_1_after_everything_was_written(
    tiny: Engine, articles: Path, main: Main, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    flags = ("--output_len", 5, "--check-accuracy", "--rouge1_threshold", 99.5, "--report", report)
    code, out, err = main(*_both(tiny, articles), *flags)
    assert code == 1
    assert "not good enough" in err
    assert "above 99.5" in err
    assert "Engine beam 0 result" in out
    assert report.is_file()


def test_the_threshold_itself_is_not_enough() -> None:
    from gpt.errors import GptError
    from gpt.text.comparison import check_threshold

    check_threshold(15.001, 15.0)
    for score in (15.0, float("nan")):
        with pytest.raises(GptError):
            check_threshold(score, 15.0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["nothing to test", "--test_trt_llm", "--test_hf"]),
        (["--test_hf"], ["--test_hf needs a model", "--hf_model_location"]),
        (
            ["--test_engine", "--output_len", 5, "--num_beams", 4],
            ["--num_beams 4", "at most 3", "next: build.py ... --max_beam_width 4"],
        ),
        (["--test_engine", "--num_beams", 2, "--top_k", 0], ["--num_beams 2 with --top_k 0"]),
        (["--test_engine", "--top_k", -1, "--top_p", 1.5], ["--top_k -1", "--top_p 1.5: allowed are 0 to 1"]),
        (["--test_engine", "--temperature", 0.5], ["--temperature 0.5 with --top_k 1", "--top_k 0 draws from all"]),
        (["--test_engine", "--output_len", 5, "--top_k", 265], ["--top_k 265", "264 tokens"]),
        (["--test_engine", "--eval_type", "code_completion"], ["no column prompt and no column canonical_solution"]),
        (["--test_hf", "--hf_model_location", "x", "--check_accuracy"], ["--check_accuracy", "--test_trt_llm"]),
        (["--test_hf", "--hf_model_location", "x", "--max_draft_len", 3], ["--max_draft_len 3", "--test_trt_llm"]),
        (["--test_engine", "--max_draft_len", 3], ["the engine has no paged cache", "--paged_kv_cache"]),
        (["--test_engine", "--max_draft_len", 3, "--num_beams", 2], ["--max_draft_len 3 with beams"]),
        (["--test_engine", "--max_draft_len", 65], ["--max_draft_len 65", "0 (off) to 64"]),
        (
            ["--test_engine", "--test_hf", "--hf_model_location", "x", "--presence_penalty", 1],
            ["--presence_penalty 1: transformers has no such penalty", "without --test_hf"],
        ),
        (["--test_engine", "--output_len", 5, "--bad_words", ""], ["one of the words is empty"]),
        (["--test_engine", "--data_type", "int8"], ["unknown dtype 'int8'"]),
        (["--test_engine", "--dataset_path", "absent.jsonl"], ["there is no data set absent.jsonl"]),
        (["--test_engine", "--article_column", "text"], ["no column text", "article, highlights", "--article_column"]),
        (["--test_engine", "--highlights_column", "s"], ["no column s"]),
        (["--test_engine", "--batch_size", 5], ["--batch_size 5", "at most 4"]),
        (["--test_engine", "--output_len", 60], ["no room for an article"]),
        (["--test_engine", "--report", ROOT], ["is a folder"]),
        (["--test_engine", "--report", __file__ + "/below/report.html"], ["cannot be made"]),
        (["--test_engine", "--tokenizer", "/absent"], ["no such tokenizer folder"]),
        (["--test_engine", "--vocab_file", "absent"], ["no such sentencepiece model"]),
        (["--test_engine", "--output_len", 5, "--tokenizer", MODEL], ["does not belong to this model", "0 to 263"]),
        (["--test_engine", "--test_hf", "--hf_model_location", "/absent"], ["no such model folder"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tiny: Engine, articles: Path, main: Main, flags: list[object], expected: list[str]
) -> None:
    code, out, err = main("--engine_dir", tiny.folder, "--dataset_path", articles, *flags)
    assert (code, out) == (2, "")
    for part in expected:
        assert part in err
    assert "Traceback" not in err


def test_models_of_different_vocabularies_are_named(
    tiny: Engine, articles: Path, call_script: Main, make_gpt2: Callable[..., Path]
) -> None:
    other = make_gpt2("other", vocab_size=300)
    flags = ["--engine_dir", tiny.folder, "--dataset_path", articles, "--output_len", 2, "--max_ite", 1]
    told = "the engine has 264 tokens, {} has {}"
    for model, size in ((tiny.hf, 264), (other, 300)):
        sides = ["--test_engine", "--test_hf", "--hf_model_location", model, "--device", "cpu"]
        code, _, err = call_script(summarize.main, *sides, *flags)
        assert code == 0
        assert (told.format(model, size) in err) is (size == 300)
        assert "at most 1 by --batch_size and --max_ite" in err


def test_flags_without_effect_say_so(tiny: Engine, articles: Path, call_script: Main) -> None:
    flags = ["--engine_dir", tiny.folder, "--dataset_path", articles, "--output_len", 2, "--max_ite", 1]
    idle = ["--data_type", "fp16", "--rouge1_threshold", 14]
    code, _, err = call_script(summarize.main, "--test_engine", "--device", "cpu", *flags, *idle)
    assert code == 0
    assert "--data_type fp16 has no effect without --test_hf" in err
    assert "--tensorrt_llm_rouge1_threshold 14 has no effect without --check_accuracy" in err


def test_an_empty_data_set_is_explained(tiny: Engine, main: Main, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("article,highlights\n")
    code, _, err = main("--test_engine", "--engine_dir", tiny.folder, "--dataset_path", tmp_path / "empty.csv")
    assert code == 2
    assert "has no rows" in err


def test_a_bad_engine_or_model_is_exit_code_3(tiny: Engine, articles: Path, main: Main, tmp_path: Path) -> None:
    code, _, err = main("--test_engine", "--engine_dir", tmp_path / "absent", "--dataset_path", articles)
    assert (code, "no engine folder" in err) == (3, True)
    flags = ("--test_hf", "--hf_model_location", tmp_path, "--tokenizer", tiny.hf, "--engine_dir", tmp_path / "absent")
    code, _, err = main(*flags, "--dataset_path", articles)
    assert (code, "cannot be loaded" in err) == (3, True)
