"""run.py: stop and bad words, several results, beams, log-probabilities, scores, and options that go against each
other."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import build_engine, convert
from tiny_models import tiny_gpt2
from transformers import GPT2LMHeadModel

import run
from gpt.runtime import load, scoring
from gpt.text.decoding_options import decoding_of_call
from gpt.text.tokenizer import load_tokenizer

PROMPTS = ("the end", "a", "in the north")
COUNT = 14
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("decoding") / "hf", vocab_size=264)


@pytest.fixture(scope="module")
def engine(hf_model: Path) -> Path:
    limits = ["--max_batch_size", "2", "--max_beam_width", "4", "--max_output_len", "30", "--max_input_len", "30"]
    folder = hf_model.parent / "engine"
    build_engine(convert(hf_model, hf_model.parent / "ft"), folder, *limits)
    return folder


@pytest.fixture
def main(engine: Path, call_script: Main) -> Main:
    """`main(*flags)` -> exit code, stdout, stderr of run.py with three prompts."""
    given = ["--engine_dir", engine, "--device", "cpu", "--max_output_len", COUNT, "--input_text", *PROMPTS]
    return lambda *flags: call_script(run.main, *given, *flags)


def outputs(out: str) -> list[str]:
    return re.findall(r'^Output: "(.*?)"\n(?=Input|Output|\Z)', out, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "streamed"])
def test_stop_words_cut_the_text(main: Main, streaming: list[str]) -> None:
    free = outputs(main()[1])
    stops = [free[0][4:7], free[2][:2]]
    code, out, _ = main("--stop_words", stops[0], "--stop_words", stops[1], *streaming)
    assert code == 0
    expected = [min((text.partition(stop)[0] for stop in stops), key=len) for text in free]
    assert outputs(out) == expected
    assert expected != free
    assert expected[2] == ""


def test_stop_ids_and_token_files(main: Main, hf_model: Path, tmp_path: Path) -> None:
    """Files keep the tokens that ended a row; text does not."""
    assert main("--output_npy", tmp_path / "free.npy")[0] == 0
    free = np.load(tmp_path / "free.npy").tolist()
    length = len(load_tokenizer(hf_model).encode(PROMPTS[0]))
    stop = free[0][length + 3 : length + 5]
    flags = ("--stop_ids", ",".join(map(str, stop)))
    assert main(*flags, "--output_npy", tmp_path / "a.npy")[0] == 0
    assert np.load(tmp_path / "a.npy").tolist()[0] == free[0][: length + 5] + [263] * (len(free[0]) - length - 5)
    kept = load_tokenizer(hf_model).decode(free[0][length : length + 3], skip_special=False)
    assert outputs(main(*flags)[1])[0] == kept
    assert outputs(main(*flags, "--streaming")[1])[0] == kept


def test_escapes_of_stop_words(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run, "run_prompts", lambda config, out: seen.append(config))
    main("--stop_words", r"\n\n", r"a\tb", r"\\n", "c:\\d")
    assert seen[0].decoding.stop_words == ("\n\n", "a\tb", "\\n", "c:\\d")


def test_bad_words_do_not_come(main: Main, hf_model: Path, tmp_path: Path) -> None:
    """As they stand and behind a blank."""
    flags = ("--top_k", 0, "--seed", 1, "--temperature", 3)
    tokenizer = load_tokenizer(hf_model)
    spelled = [tokenizer.encode("the"), tokenizer.encode(" the"), tokenizer.encode("q")]
    assert [len(ids) for ids in spelled] == [2, 1, 1]

    def rows(*more: object) -> list[list[int]]:
        assert main(*flags, "--num_return_sequences", 12, "--output_npy", tmp_path / "a.npy", *more)[0] == 0
        return np.load(tmp_path / "a.npy").tolist()

    def count(found: list[list[int]], token: int) -> int:
        return sum(row[-COUNT:].count(token) for row in found)

    free, blocked = rows(), rows("--bad_words", "the", "q")
    assert count(free, spelled[1][0]) > 0
    assert count(free, spelled[2][0]) > 0
    assert count(blocked, spelled[1][0]) == count(blocked, spelled[2][0]) == 0
    ids = ",".join(map(str, spelled[0])), str(spelled[1][0]), str(spelled[2][0]), str(tokenizer.encode(" q")[0])
    assert rows("--bad_ids", *ids[:3], ",".join(map(str, tokenizer.encode(" q")))) == blocked


def test_several_samples_per_prompt(main: Main, engine: Path, tmp_path: Path) -> None:
    """Rows of a prompt follow each other; the first is what it is alone; batches of two rows cut through prompts."""
    flags = ("--top_k", 0, "--seed", 4)
    alone = outputs(main(*flags)[1])
    code, out, err = main(*flags, "--num_return_sequences", 3)
    assert (code, err) == (0, "")
    texts = outputs(out)
    assert out.count("Input:") == 3
    assert texts[::3] == alone
    assert len(set(texts)) == 9
    assert main(*flags, "--num_return_sequences", 3, "--streaming")[1] == out
    assert main(*flags, "--num_return_sequences", 3, "--output_npy", tmp_path / "a.npy")[0] == 0
    assert np.load(tmp_path / "a.npy").shape[0] == 9


def hf_beams(hf_model: Path, prompt: str, **options: Any) -> list[str]:
    tokenizer = load_tokenizer(hf_model)
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = GPT2LMHeadModel.from_pretrained(hf_model).eval()
    rows = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, pad_token_id=263, **options
    )
    new = [row[ids.shape[1] :].tolist() for row in rows]
    return [tokenizer.decode(row[: row.index(263)] if 263 in row else row, skip_special=False) for row in new]


def test_beams_print_the_best_texts(main: Main, hf_model: Path) -> None:
    code, out, err = main("--num_beams", 4, "--length_penalty", 0.5)
    assert (code, err) == (0, "")
    expected = [
        text
        for prompt in PROMPTS
        for text in hf_beams(hf_model, prompt, num_beams=4, num_return_sequences=4, length_penalty=0.5)
    ]
    assert outputs(out) == expected
    assert out.count("Input:") == 3
    best = main("--num_beams", 4, "--length_penalty", 0.5, "--num_return_sequences", 1)[1]
    assert outputs(best) == expected[::4]
    groups = main("--num_beams", 4, "--num_beam_groups", 2, "--diversity_penalty", 5)
    assert groups[0] == 0
    assert outputs(groups[1]) != outputs(main("--num_beams", 4)[1])


def test_log_probabilities_of_outputs(main: Main, hf_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    assert main("--logprobs", path, "--top_logprobs", 2)[0] == 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["result"]) for line in lines] == [(0, 0), (1, 0), (2, 0)]
    tokenizer = load_tokenizer(hf_model)
    model = GPT2LMHeadModel.from_pretrained(hf_model).eval()
    for prompt, line in zip(PROMPTS, lines, strict=True):
        ids, new = tokenizer.encode(prompt), [token["id"] for token in line["tokens"]]
        with torch.inference_mode():
            exact = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        values = exact.gather(1, torch.tensor([new]).T)[:, 0]
        assert [token["logprob"] for token in line["tokens"]] == pytest.approx(values.tolist(), abs=1e-5)
        assert line["total"] == pytest.approx(values.sum().item(), abs=1e-4)
        best = [[one["id"] for one in token["top"]] for token in line["tokens"]]
        assert best == exact.topk(2).indices.tolist()
        assert line["tokens"][0]["text"] == tokenizer.decode(new[:1], skip_special=False)
    assert main("--num_beams", 2, "--logprobs", path)[0] == 0
    beams = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["score"] for line in beams] == pytest.approx([line["total"] / len(line["tokens"]) for line in beams])


def test_scores_of_prompts(main: Main, hf_model: Path, tmp_path: Path) -> None:
    code, out, err = main("--score_prompts", "--logprobs", tmp_path / "a.jsonl")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(hf_model)
    model = GPT2LMHeadModel.from_pretrained(hf_model).eval()
    printed = re.findall(r'Input: "(.*)"\nScore: (\d+) tokens?, (?:log-probability (\S+), perplexity (\S+)|no .*)', out)
    assert [text for text, *_ in printed] == list(PROMPTS)
    for prompt, line, (_, count, total, perplexity) in zip(PROMPTS, lines, printed, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        assert int(count) == ids.shape[1] - 1 == len(line["tokens"]) - 1
        assert "logprob" not in line["tokens"][0]
        if ids.shape[1] == 1:
            assert (perplexity, line["perplexity"]) == ("", None)
            continue
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss.item()
        assert float(perplexity) == pytest.approx(math.exp(loss), rel=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert float(total) == pytest.approx(-loss * (ids.shape[1] - 1), abs=1e-3)


def test_scores_appear_as_they_come(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = main("--score_prompts")[1]
    compute, calls = scoring._score, []

    def interrupted(*arguments: Any) -> scoring.Score:
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(scoring, "_score", interrupted)
    code, out, err = main("--score_prompts")
    assert (code, "2 of 3 prompts are scored" in err) == (130, True)
    assert whole.startswith(out)
    assert out.count("Score: ") == 2


def test_long_prompts_are_scored_in_parts(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = main("--score_prompts")[1]
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 3 * 4 * 264)
    parts = main("--score_prompts")[1]
    # Another number of rows may be another order of a product's sums.
    number = re.compile(r"\d+\.\d+")
    assert number.split(parts) == number.split(whole)
    assert [*map(float, number.findall(parts))] == pytest.approx([*map(float, number.findall(whole))], rel=1e-6)


def test_the_function_has_the_names_of_the_flags() -> None:
    flags = {action.dest for action in run.build_parser()._actions}
    own = set(inspect.signature(run.generate).parameters)
    others = flags - own - {"help", "tokenizer", "input_tokens", "score_prompts", "spawn"}
    decoding_of_call(**dict.fromkeys(others))  # raises TypeError for a name that it does not have


def test_the_function_takes_the_options(engine: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = main("--num_beams", 3, "--stop_words", "e", "--bad_ids", "5,6", "7", "--early_stopping", "never")
    texts = run.generate(
        COUNT,
        engine_dir=engine,
        input_text=PROMPTS,
        num_beams=3,
        device="cpu",
        stop_words="e",
        bad_ids=[(5, 6), (7,)],
        early_stopping="never",
    )
    assert capsys.readouterr().out == out
    assert texts == outputs(out)
    with pytest.raises(TypeError, match="unknown options: temprature"):
        run.generate(COUNT, engine_dir=engine, temprature=2.0)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num_beams", 4, "--top_k", 50], ["--num_beams 4 with --top_k 50", "searched"]),
        (["--num_beams", 5], ["--num_beams 5", "at most 4", "--max_beam_width"]),
        (["--num_beams", 4, "--streaming"], ["--streaming with --num_beams 4"]),
        (["--num_beams", 0], ["--num_beams 0"]),
        (["--early_stopping"], ["--early_stopping true without beams"]),
        (["--length_penalty", 2], ["--length_penalty 2 without beams"]),
        (["--diversity_penalty", 2, "--num_beams", 4], ["--num_beam_groups"]),
        (["--num_return_sequences", 3], ["all would be equal", "--top_k 0"]),
        (["--num_return_sequences", 3, "--num_beams", 2], ["--num_return_sequences 3", "--num_beams 2"]),
        (["--num_return_sequences", 0], ["--num_return_sequences 0"]),
        (["--top_logprobs", 3], ["without --logprobs"]),
        (["--top_logprobs", 265, "--logprobs", "a"], ["--top_logprobs 265", "264"]),
        (["--stop_words", "a", ""], ["--stop_words: one of the words is empty"]),
        (["--bad_words", ""], ["--bad_words: one of the words is empty"]),
        (["--stop_ids", "1,x"], ["--stop_ids takes token ids", "'1,x'"]),
        (["--stop_ids", "1,264"], ["264", "0 to 263"]),
        (["--bad_ids", "5,,6"], ["--bad_ids takes token ids"]),
        (["--top_k", 100000, "--top_p", 1.5], ["--top_p 1.5"]),
        (["--top_k", 100000], ["--top_k 100000", "264"]),
        (["--score_prompts", "--top_k", 5, "--streaming"], ["nothing to choose", "--streaming with --score_prompts"]),
        (["--score_prompts", "--max_draft_len", 2], ["--max_draft_len with --score_prompts"]),
        (
            ["--top_k", -1, "--num_beams", 0, "--num_return_sequences", 0, "--stop_words", ""],
            ["--top_k -1", "--num_beams 0", "--num_return_sequences 0", "--stop_words"],
        ),
    ],
)
def test_contradictions_are_refused_before_the_engine_is_loaded(
    main: Main, monkeypatch: pytest.MonkeyPatch, flags: list[object], told: list[str]
) -> None:
    monkeypatch.setattr(load, "load_session", lambda *args: pytest.fail("nothing is loaded for these options"))
    code, out, err = main(*flags)
    assert (code, out) == (2, "")
    for part in told:
        assert part in err
    assert "Traceback" not in err


def test_words_need_a_tokenizer(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text("5,6\n")
    bare = tmp_path / "engine"
    bare.mkdir()
    for item in engine.iterdir():
        if item.is_file():
            (bare / item.name).symlink_to(item)
    files = ["--engine_dir", bare, "--input_tokens", tmp_path / "in.csv", "--output_csv", tmp_path / "out.csv"]
    base = [*files, "--max_output_len", 4, "--device", "cpu"]
    for flags, told in ((["--stop_words", "a"], "--stop_ids"), (["--bad_words", "a"], "--bad_ids")):
        assert run.main([str(flag) for flag in [*base, *flags]]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out.csv").exists()
    assert run.main([str(flag) for flag in [*base, "--stop_ids", 5, "--bad_ids", 6]]) == 0


def test_the_length_is_required_to_make_text(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--engine_dir", str(engine)])
    assert caught.value.code == 2
    assert "--max_output_len" in capsys.readouterr().err
    assert run.main(["--engine_dir", str(engine), "--score_prompts", "--input_text", "the end"]) == 0
