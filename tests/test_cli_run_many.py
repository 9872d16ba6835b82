"""run.py with many prompts from a file to a file: kinds of input, what cannot be run, kills, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from engines import build_engine, convert
from tiny_models import tiny_gpt2

import run
from gpt.text.result_file import ResultFile

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ["--max_batch_size", "4", "--max_input_len", "40", "--max_output_len", "16", "--dtype", "float32"]
PAGED = ["--paged_kv_cache", "--tokens_per_block", "4", "--max_num_tokens", "32"]
TEXTS = [f"the number {n} and the other {'on and ' * (n % 3)}" for n in range(20)]
SAMPLED = ["--top_k", "30", "--seed", "4"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = convert(tiny_gpt2(folder / "hf"), folder / "ft")
    made = {"contiguous": [], "paged": PAGED, "in-flight": [*PAGED, "--use_inflight_batching"]}
    for name, flags in made.items():
        build_engine(checkpoint, folder / name, *LIMITS, "--max_beam_width", "2", *flags)
    return {name: folder / name for name in made}


def flags(engine: Path, source: Path, target: Path, *more: str) -> list[str]:
    paths = ["--engine_dir", str(engine), "--input_file", str(source), "--output_file", str(target)]
    return [*paths, "--max_output_len", "12", *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def test_results_are_the_texts_of_each_prompt_alone(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    alone = run.generate(12, engine_dir=engines["contiguous"], input_text=TEXTS, top_k=30, seed=4)
    drafted = run.generate(12, engine_dir=engines["paged"], input_text=TEXTS, top_k=30, seed=4, max_draft_len=3)
    assert drafted == alone
    capfd.readouterr()
    for name, engine in engines.items():
        out = tmp_path / f"{name}.jsonl"
        assert run.main(flags(engine, source, out, *SAMPLED)) == 0
        assert capfd.readouterr() == ("", f"20 results in {out}\n")
        assert [record["text"] for record in lines(out)] == alone
        assert [(record["index"], record["line"]) for record in lines(out)] == [(n, n + 1) for n in range(20)]


def test_drafts_change_no_text(engines: dict[str, Path], source: Path, tmp_path: Path) -> None:
    plain, drafted = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert run.main(flags(engines["in-flight"], source, plain, *SAMPLED)) == 0
    assert run.main(flags(engines["in-flight"], source, drafted, *SAMPLED, "--max_draft_len", "4")) == 0
    assert drafted.read_bytes() == plain.read_bytes()


def test_all_kinds_of_files_give_the_same(engines: dict[str, Path], source: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"words": TEXTS}), tmp_path / "in.parquet")
    quoted = [text.replace('"', '""') for text in TEXTS]
    (tmp_path / "in.csv").write_text("id,words\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(quoted)))
    texts = set()
    for name, column in (("in.txt", ""), ("in.jsonl", ""), ("in.parquet", "words"), ("in.csv", "words")):
        out = tmp_path / f"{name}.out"
        more = ["--column", column] if column else []
        assert run.main(flags(engines["in-flight"], tmp_path / name, out, *more)) == 0
        records = lines(out)
        first = 2 if name == "in.csv" else 1  # behind the header
        assert [record.pop("line") for record in records] == list(range(first, first + len(TEXTS)))
        texts.add(json.dumps(records))
    assert len(texts) == 1


def test_token_files_need_no_tokenizer(engines: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("5,6,7\n9,x\n8\n\n9999\n")
    np.save(tmp_path / "in.npy", np.array([[5, 6, 7]], dtype=np.int32))
    outs = tmp_path / "csv.jsonl", tmp_path / "npy.jsonl"
    assert run.main(flags(engines["in-flight"], tmp_path / "in.csv", outs[0])) == 1
    assert run.main(flags(engines["in-flight"], tmp_path / "in.npy", outs[1])) == 0
    assert lines(outs[0])[0] == lines(outs[1])[0]
    errors = [record.get("error", "") for record in lines(outs[0])]
    assert errors[1] == "column 2: no token id: 'x'"
    assert errors[3] == "an empty prompt"
    assert errors[4].startswith("token id 9999")
    assert errors[0] == errors[2] == ""


def test_texts_without_a_tokenizer_are_refused_once(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out.jsonl"
    shutil.copytree(engines["in-flight"], bare, ignore=shutil.ignore_patterns("tokenizer"))
    assert run.main(flags(bare, source, out)) == 2
    assert "no tokenizer to read the prompts" in capfd.readouterr().err
    assert not out.exists()


def test_rows_that_cannot_be_run_are_listed_and_the_others_run(
    engines: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long = "x" * 50
    rows = [b'{"text": "the"}', b"", b"{oops", b'{"other": 1}', b'{"text": null}', b'{"text": "\xff"}', b'"bare"']
    half = b'{"text": "a\\ud83d"}'  # JSON can name what UTF-8 cannot hold
    source.write_bytes(b"\n".join([*rows, json.dumps({"text": long}).encode(), half]))
    assert run.main(flags(engines["in-flight"], source, out, "--column", "text")) == 1
    told = capfd.readouterr().err
    assert "7 of 9 prompts could not be run" in told
    assert "line 9: character 2 is a byte that is not UTF-8, or half of a surrogate pair" in told
    for line, why in ((2, "an empty line"), (3, "no JSON"), (4, "no 'text'"), (5, "no text"), (6, "not UTF-8")):
        assert f"line {line}: {why}" in told
        assert why in lines(out)[line - 1]["error"]
    assert "line 8: 50 tokens, at most 40 fit (the engine's --max_input_len 40)" in told
    assert "text" in lines(out)[0]
    assert "text" in lines(out)[6]
    assert run.main(flags(engines["in-flight"], source, out, "--column", "text", "--resume")) == 1
    assert len(lines(out)) == 9


def test_rows_of_a_table_are_told_by_the_lines_of_the_file(engines: dict[str, Path], tmp_path: Path) -> None:
    """Quoted cells have line breaks in them, and empty lines are no rows."""
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_bytes(b'id,text\n1,"the\nend"\n\n2,\n3,\xff\n4\n5,' + b"a" * 140_000 + b"\n6,the\n")
    assert run.main(flags(engines["in-flight"], source, out, "--column", "text")) == 1
    found = [(record["line"], record.get("error", "")) for record in lines(out)]
    assert [line for line, _ in found] == [2, 5, 6, 7, 8, 9]
    for (_, error), why in zip(
        found, ("", "an empty prompt", "not UTF-8", "no text", "140000 tokens", ""), strict=True
    ):
        assert why in error if why else not error


def test_a_table_of_texts_without_its_column_is_explained(
    engines: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("id,text\none,the\n")
    assert run.main(flags(engines["in-flight"], source, out)) == 2
    told = capfd.readouterr().err
    assert "line 1: column 1: no token id: 'id'" in told
    assert "--column NAME" in told
    assert not out.exists()


def test_long_prompts_are_cut_where_that_is_asked_for(
    engines: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("ab" * 20 + "\n" + "ab" * 5 + "\n")
    asked = ["--on_long_prompt", "truncate", "--max_input_length", "10"]
    assert run.main(flags(engines["in-flight"], source, out, *asked)) == 0
    first, second = lines(out)
    assert (first["truncated_from"], "truncated_from" in second) == (40, False)
    assert first["text"] == second["text"]
    assert capfd.readouterr().err == f"2 results in {out}\nPrompts cut to what fits: 1\n  line 1: 40 tokens\n"
    base = ["--engine_dir", str(engines["in-flight"]), "--max_output_len", "12", "--input_file", str(source)]
    assert run.main([*base, *asked]) == 0
    told = "Prompts cut to their last 10 tokens (--max_input_length 10): 1\n  prompt 0: 40 tokens\n"
    assert capfd.readouterr().err == told
    assert run.main([*base, *asked[2:]]) == 2
    told = capfd.readouterr().err
    assert "prompt 0: 40 tokens" in told
    assert "--on_long_prompt truncate" in told


def test_several_results_per_prompt(engines: dict[str, Path], source: Path, tmp_path: Path) -> None:
    drawn, searched = tmp_path / "drawn.jsonl", tmp_path / "searched.jsonl"
    assert run.main(flags(engines["in-flight"], source, drawn, *SAMPLED, "--num_return_sequences", "3")) == 0
    assert {len(record["results"]) for record in lines(drawn)} == {3}
    assert run.main(flags(engines["in-flight"], source, searched, "--num_beams", "2")) == 0
    texts = run.generate(12, engine_dir=engines["contiguous"], input_text=TEXTS, num_beams=2)
    assert [text for record in lines(searched) for text in record["results"]] == texts


def killed_at(target: Path, num_lines: int, arguments: list[str]) -> None:
    """Starts run.py and kills it as soon as its output has so many lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if target.exists() and target.read_bytes().count(b"\n") >= num_lines:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    assert process.wait() in (-signal.SIGKILL, 0)


def test_a_killed_run_goes_on_where_it_was(engines: dict[str, Path], tmp_path: Path) -> None:
    source, whole, out = tmp_path / "in.txt", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(TEXTS * 20) + "\n")
    assert run.main(flags(engines["in-flight"], source, whole, *SAMPLED)) == 0
    for num_lines in (1, 150):
        killed_at(out, num_lines, flags(engines["in-flight"], source, out, *SAMPLED, "--resume"))
        assert whole.read_bytes().startswith(out.read_bytes())
    assert out.read_bytes().count(b"\n") >= 150
    assert run.main(flags(engines["in-flight"], source, out, *SAMPLED, "--resume")) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_line_cut_short_is_made_again(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run.main(flags(engines["in-flight"], source, out, *SAMPLED[:2])) == 0  # the seed is drawn, and kept
    whole = out.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1, 3, 0):
        out.write_bytes(whole[:cut])
        capfd.readouterr()
        assert run.main(flags(engines["in-flight"], source, out, *SAMPLED[:2], "--resume")) == 0
        assert out.read_bytes() == whole
    assert "20 results" in capfd.readouterr().err


def test_results_of_other_work_are_left_alone(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run.main(flags(engines["in-flight"], source, out)) == 0
    whole = out.read_bytes()
    assert run.main(flags(engines["in-flight"], source, out)) == 2
    assert "--resume goes on with them" in capfd.readouterr().err
    assert run.main(flags(engines["in-flight"], source, out, "--resume", *SAMPLED)) == 2
    assert "decoding.sampling.top_k: 1 there, 30 now" in capfd.readouterr().err
    source.write_text("other\n")
    assert run.main(flags(engines["in-flight"], source, out, "--resume")) == 2
    assert "input: " in capfd.readouterr().err
    source.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    out.write_bytes(b"mine\n" + whole)
    assert run.main(flags(engines["in-flight"], source, out, "--resume")) == 2
    assert "line 1 is not result 0" in capfd.readouterr().err
    (tmp_path / "out.jsonl.job.json").unlink()
    assert run.main(flags(engines["in-flight"], source, out, "--resume")) == 2
    assert "is not the beginning of this work" in capfd.readouterr().err


def test_a_full_disk_is_said_and_leaves_whole_lines(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "full.jsonl"
    out.symlink_to("/dev/full")
    assert run.main(flags(engines["in-flight"], source, out)) == 1
    told = capfd.readouterr().err
    assert "cannot be written further: No space left on device" in told
    assert "--resume" in told


def test_a_pipe_takes_the_lines_as_they_come(engines: dict[str, Path], source: Path, tmp_path: Path) -> None:
    pipe, whole = tmp_path / "pipe", tmp_path / "whole.jsonl"
    assert run.main(flags(engines["in-flight"], source, whole)) == 0
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        assert run.main(flags(engines["in-flight"], source, pipe)) == 0
        assert reader.communicate()[0] == whole.read_bytes()
    assert not (tmp_path / "pipe.job.json").exists()
    assert run.main(flags(engines["in-flight"], source, pipe, "--resume")) == 2


def test_a_full_disk_takes_no_texts_along(
    engines: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--engine_dir", str(engines["contiguous"]), "--max_output_len", "4", "--input_text", "the"]
    assert run.main(arguments) == 0
    expected = capfd.readouterr().out
    assert run.main([*arguments, "--logprobs", "/dev/full"]) == 1
    assert capfd.readouterr() == (
        expected,
        "error: no space left on the device (/dev/full)\n  next:    free space or choose another output folder\n",
    )


def test_a_write_that_fails_halfway_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ResultFile(tmp_path / "out.jsonl", {}, resume=False)
    file.append([{"index": 0}])
    write = os.write
    calls: list[int] = []

    def half(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(Exception, match="No space left") as caught:
        file.append([{"index": 1}, {"index": 2}])
    assert "1 results are in it" in str(caught.value)
    file.close()
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"index": 0}\n'


def test_two_processes_cannot_write_one_file(
    engines: dict[str, Path], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    held = ResultFile(out, {}, resume=False)
    assert run.main(flags(engines["in-flight"], source, out)) == 2
    assert "another process writes" in capfd.readouterr().err
    held.close()


def test_ctrl_c_says_how_to_go_on(
    engines: dict[str, Path],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert run.main(flags(engines["in-flight"], source, whole)) == 0
    append = ResultFile.append

    def interrupted(file: ResultFile, records: list[dict[str, Any]]) -> None:
        append(file, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "append", interrupted)
    assert run.main(flags(engines["in-flight"], source, out)) == 130
    assert "of 20 results are in" in capfd.readouterr().err
    monkeypatch.undo()
    assert run.main(flags(engines["in-flight"], source, out, "--resume")) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--resume"], "--resume without --output_file"),
        (["--output_file", "o.jsonl", "--streaming"], "results go to one place"),
        (
            ["--output_file", "o.jsonl", "--logprobs", "l.jsonl"],
            "--logprobs without a file name puts them into the lines",
        ),
        (["--logprobs", "--top_logprobs", "2"], "--logprobs without a file name and without --output_file"),
        (["--score_prompts", "--logprobs"], "--logprobs without a file name and without --output_file"),
        (["--score_prompts", "--output_file", "o.jsonl", "--logprobs"], "--output_file with --score_prompts"),
        (["--output_file", "o.jsonl", "--score_prompts"], "--output_file with --score_prompts"),
        (["--output_file", "o.csv"], "--output_file o.csv: it gets lines of JSON"),
        (["--stop_words", "\udcff"], "--stop_words: one of the words is no text: character 1"),
        (["--max_draft_len", "3"], "the engine has no paged cache"),
        (["--max_draft_len", "99"], "--max_draft_len 99: allowed are 0 (off) to 64"),
        (["--column", "words"], "--column names a column of a table"),
        (["--max_draft_len", "3", "--num_beams", "2"], "--max_draft_len 3 with beams"),
        (["--max_draft_len", "3", "--batch_invariant"], "--max_draft_len 3 with --batch_invariant"),
    ],
)
def test_what_cannot_be_asked_for(
    more: list[str],
    told: str,
    engines: dict[str, Path],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--engine_dir", str(engines["contiguous"]), "--max_output_len", "4", "--input_file", str(source)]
    assert run.main([*arguments, *more]) == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("in.parquet", b"PAR0", "is no parquet file"),
        ("in.csv", b"a,b\n1,2\n", "has no column 'words'"),
        ("in.jsonl", b"", "holds no prompts"),
        ("in.xml", b"", "input file format not supported"),
    ],
)
def test_files_that_are_not_what_they_say(
    name: str,
    content: bytes,
    told: str,
    engines: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = flags(engines["in-flight"], tmp_path / name, tmp_path / "out.jsonl", "--column", "words")
    assert run.main(arguments) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
