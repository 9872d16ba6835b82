"""run.py: log-probabilities in the lines of a file of results."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import build_engine, convert
from ranks import mpirun
from tiny_models import tiny_gpt2

import run
from gpt.runtime.logprobs import TokenLogprob
from gpt.text.result_file import ResultFile

LIMITS = ["--max_batch_size", "4", "--max_beam_width", "2", "--max_input_len", "40", "--max_output_len", "16"]
IN_FLIGHT = ["--paged_kv_cache", "--tokens_per_block", "4", "--max_num_tokens", "32", "--use_inflight_batching"]
TEXTS = [f"the number {n} and the other {'on and ' * (n % 3)}" for n in range(10)]
SAMPLES = ["--top_k", "30", "--seed", "4", "--num_return_sequences", "2"]
BEAMS = ["--num_beams", "2", "--length_penalty", "0.5"]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two ways of batching, and two ranks."""
    folder = tmp_path_factory.mktemp("engines")
    hf = tiny_gpt2(folder / "hf", vocab_size=264)
    made: dict[str, tuple[int, list[str]]] = {
        "static": (1, []),
        "in-flight": (1, IN_FLIGHT),
        "two": (2, ["--world_size", "2"]),
        "two, in-flight": (2, [*IN_FLIGHT, "--world_size", "2"]),
    }
    for name, (ranks, flags) in made.items():
        build_engine(convert(hf, folder / name / "ft", tp=ranks), folder / name / "engine", *LIMITS, *flags)
    return {name: folder / name / "engine" for name in made}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture
def main(source: Path, call_script: Main) -> Main:
    """`main(engine, *flags)` -> exit code, stdout, stderr."""
    given = ["--device", "cpu", "--max_output_len", 12, "--input_file", source]
    return lambda engine, *flags: call_script(run.main, *given, "--engine_dir", engine, *flags)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_prompt(path: Path) -> list[list[dict[str, Any]]]:
    """The objects of a --logprobs FILE, those of one prompt together, less what says which they are."""
    found: list[list[dict[str, Any]]] = []
    for line in lines(path):
        prompt, number = line.pop("prompt"), line.pop("result")
        if number == 0:
            found.append([])
        assert (prompt, number) == (len(found) - 1, len(found[-1]))
        found[-1].append(line)
    return found


@pytest.mark.parametrize(
    ("engine", "flags", "num_top"),
    [
        pytest.param("static", [], 3, id="static"),
        pytest.param("static", [*SAMPLES, "--stop_words", "e"], 1, id="static samples"),
        pytest.param("static", BEAMS, 2, id="beams"),
        pytest.param("static", [*BEAMS, "--num_return_sequences", "1"], 0, id="best beam"),
        pytest.param("in-flight", [], 0, id="in-flight"),
        pytest.param("in-flight", [*SAMPLES, "--stop_words", "e"], 2, id="in-flight samples"),
        pytest.param("in-flight", ["--max_draft_len", "3", "--repetition_penalty", "1.2"], 1, id="drafts"),
        pytest.param("in-flight", BEAMS, 1, id="in-flight beams"),
    ],
)
def test_they_are_those_of_a_file_of_their_own(
    engine: str, flags: list[str], num_top: int, engines: dict[str, Path], main: Main, tmp_path: Path
) -> None:
    plain, results, file = tmp_path / "plain.jsonl", tmp_path / "results.jsonl", tmp_path / "logprobs.jsonl"
    top = ["--top_logprobs", num_top]
    assert main(engines[engine], *flags, *top, "--logprobs", file)[0] == 0
    assert main(engines[engine], *flags, *top, "--logprobs", "--output_file", results)[0] == 0
    assert main(engines[engine], *flags, "--output_file", plain)[0] == 0
    found, expected = lines(results), by_prompt(file)
    logprobs = [line.pop("logprobs") for line in found]
    assert found == lines(plain)
    if "results" not in found[0]:
        logprobs = [[one] for one in logprobs]
    assert logprobs == expected
    assert {len(token.get("top", ())) for objects in expected for one in objects for token in one["tokens"]} == {
        num_top
    }
    assert {"score" in one for objects in expected for one in objects} == {BEAMS[0] in flags}


def test_rows_that_fail_have_none_and_token_ids_have_no_text(engines: dict[str, Path], tmp_path: Path) -> None:
    bare, source, out = tmp_path / "bare", tmp_path / "in.csv", tmp_path / "out.jsonl"
    bare.mkdir()
    for item in engines["in-flight"].iterdir():
        if item.is_file():
            (bare / item.name).symlink_to(item)
    source.write_text("5,6,7\n9,x\n8\n")
    flags = ["--engine_dir", bare, "--max_output_len", 4, "--input_file", source, "--output_file", out, "--logprobs"]
    assert run.main([str(flag) for flag in flags]) == 1
    first, wrong, last = lines(out)
    assert wrong == {"index": 1, "line": 2, "error": "column 2: no token id: 'x'"}
    for line in (first, last):
        assert [set(token) for token in line["logprobs"]["tokens"]] == [{"id", "logprob"}] * 4
        assert [token["id"] for token in line["logprobs"]["tokens"]] == line["tokens"]
        assert line["logprobs"]["total"] == sum(token["logprob"] for token in line["logprobs"]["tokens"])


@pytest.mark.parametrize(("engine", "flags"), [("in-flight", SAMPLES), ("static", BEAMS)])
def test_a_run_that_was_cut_goes_on(
    engine: str, flags: list[str], engines: dict[str, Path], main: Main, tmp_path: Path
) -> None:
    """Sums over another batch may have another order."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = [*flags, "--logprobs", "--top_logprobs", "2"]
    assert main(engines[engine], *flags, "--output_file", whole)[0] == 0
    assert main(engines[engine], *flags, "--output_file", out)[0] == 0
    out.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    assert main(engines[engine], *flags, "--output_file", out, "--resume")[0] == 0
    number = re.compile(r"-?\d+\.\d+(?:e-\d+)?")
    ours, expected = out.read_text(), whole.read_text()
    assert number.sub("", ours) == number.sub("", expected)
    values = [*map(float, number.findall(expected))]
    assert [*map(float, number.findall(ours))] == pytest.approx(values, abs=1e-5)


def test_no_bit_of_a_run_that_was_cut_differs_where_none_depends_on_the_batch(
    engines: dict[str, Path], main: Main, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--output_file", out, *SAMPLES, "--batch_invariant", "--logprobs"]
    assert main(engines["in-flight"], *flags, "--top_logprobs", 2)[0] == 0
    whole = out.read_bytes()
    for cut in (len(whole) // 3, len(whole) - 1, 7):
        out.write_bytes(whole[:cut])
        assert main(engines["in-flight"], *flags, "--top_logprobs", 2, "--resume")[0] == 0
        assert out.read_bytes() == whole
    out.write_bytes(whole[: len(whole) // 2])
    for other, told in (
        (flags[:-1], ["decoding.logprobs: True there, None now", "decoding.top_logprobs: 2 there, 0 now"]),
        (flags, ["decoding.top_logprobs: 2 there, 0 now"]),
    ):
        code, _, err = main(engines["in-flight"], *other, "--resume")
        assert (code, [line in err for line in told]) == (2, [True] * len(told))
    assert out.read_bytes() == whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("engine", "flags"), [("static", []), ("in-flight", []), ("in-flight", SAMPLES), ("static", BEAMS)]
)
def test_what_is_written_is_let_go(
    engine: str, flags: list[str], engines: dict[str, Path], main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than a batch's log-probabilities are there, 4 prompts of 10, and at the end those of the last step."""
    alive: list[int] = []
    append = ResultFile.append

    def count() -> int:
        return sum(type(one) is TokenLogprob for one in gc.get_objects())

    def counting(file: ResultFile, records: list[dict[str, Any]]) -> None:
        append(file, records)
        alive.append(count())

    monkeypatch.setattr(ResultFile, "append", counting)
    gc.collect()
    before = count()
    out = tmp_path / "out.jsonl"
    assert main(engines[engine], *flags, "--output_file", out, "--logprobs", "--end_id", 0)[0] == 0
    texts_per_prompt = 2 if flags else 1
    assert len(alive) > 2
    assert max(alive) - before <= 4 * texts_per_prompt * 12
    if flags != BEAMS:  # whose last batch is complete before its first line is written
        assert alive[-1] - before <= 4


@pytest.mark.mpi
@pytest.mark.parametrize("engine", ["two", "two, in-flight"])
def test_ranks_write_one_file(engine: str, engines: dict[str, Path], source: Path, main: Main, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(engines[engine.replace("two, ", "").replace("two", "static")], "--logprobs", one)[0] == 0
    flags = ["--engine_dir", engines[engine], "--max_output_len", 12, "--input_file", source]
    result = mpirun(2, "run.py", *flags, "--output_file", two, "--logprobs")
    assert (result.returncode, result.stdout) == (0, "")
    found = [line["logprobs"] for line in lines(two)]
    for ours, (theirs,) in zip(found, by_prompt(one), strict=True):
        assert [token["id"] for token in ours["tokens"]] == [token["id"] for token in theirs["tokens"]]
        values = [token["logprob"] for token in theirs["tokens"]]
        assert [token["logprob"] for token in ours["tokens"]] == pytest.approx(values, abs=1e-5)


def test_the_function_takes_true(engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, own = tmp_path / "out.jsonl", tmp_path / "own.jsonl"
    settings: dict[str, Any] = {"engine_dir": engines["static"], "input_text": TEXTS[:2], "device": "cpu"}
    assert run.generate(3, **settings, output_file=out, logprobs=True) == []
    assert len(run.generate(3, **settings, logprobs=str(own))) == 2
    assert len(run.generate(3, **settings, logprobs=False)) == 2
    assert [[line["logprobs"]] for line in lines(out)] == by_prompt(own)
    with pytest.raises(Exception, match="cannot be used together") as caught:
        run.generate(3, **settings, logprobs=True)
    assert "--logprobs without a file name and without --output_file" in str(caught.value)
