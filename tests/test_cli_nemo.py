"""The two converters of NeMo's files as their users meet them: flags, lines, exit codes, and the way to text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_nemo import (
    GPT_NEXT,
    nemo_logits,
    save_files,
    save_model,
    save_prompts,
    sentencepiece_model,
    tiny_config,
    tiny_state,
)

import build
import nemo_ckpt_convert
import nemo_prompt_convert
import run
from gpt.checkpoint.manifest import Manifest
from gpt.checkpoint.store import Checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config(**GPT_NEXT, tokenizer={"library": "sentencepiece", "model": "nemo:ab_tiny.model"})
    extra = {"ab_tiny.model": sentencepiece_model()}
    return save_model(tmp_path / "tiny.nemo", config, tiny_state(config), tp=2, extra=extra)


def test_a_conversion_shows_its_arguments_and_leaves_only_the_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", str(out), "-tp", "2", "-t", "float16", "-p", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "",
        "=============== Argument ===============",
        f"out_dir: {out}",
        f"in_file: {source}",
        "tensor_parallelism: 2",
        "processes: 1",
        "storage_type: float16",
        "force: False",
        "load_checkpoints_on_gpu: False",
        "verbose: False",
        "calibrate_kv_cache: False",
        "smoothquant: None",
        "smooth_dense_proj: False",
        "calib_data: None",
        "calib_column: text",
        "calib_size: 512",
        "calib_length: 512",
        "calib_batch_size: 8",
        "calib_device: auto",
        "calib_tokenizer: None",
        "dataset_cache_dir: None",
        "=" * 40,
    ]
    assert "unpacked: " in captured.err
    assert [path.name for path in out.iterdir()] == ["2-gpu"]
    assert not (out / "2-gpu" / "unpacked").exists()
    manifest = Manifest.load(out / "2-gpu")
    assert (manifest.tool, manifest.storage_dtype, manifest.tensor_parallelism) == (
        "nemo_ckpt_convert.py",
        "float16",
        2,
    )
    assert manifest.source == str(source)
    assert "-t float16" in manifest.command


def test_the_second_conversion_needs_force(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["-i", str(source), "-o", str(tmp_path / "out")]
    assert nemo_ckpt_convert.main(args) == 0
    assert nemo_ckpt_convert.main(args) == 2
    assert "--force" in capsys.readouterr().err
    assert nemo_ckpt_convert.main([*args, "--force"]) == 0


def test_flags_without_effect_say_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", out, "--load-checkpoints-on-gpu", "--verbose"]) == 0
    errors = capsys.readouterr().err
    assert "--load-checkpoints-on-gpu has no effect" in errors
    assert "model_config.yaml: {" in errors  # what --verbose adds


def test_exit_codes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert nemo_ckpt_convert.main(["-i", str(tmp_path / "absent.nemo"), "-o", out]) == 2
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", out, "-tp", "3"]) == 2
    (tmp_path / "bad.nemo").write_bytes(b"nothing")
    assert nemo_ckpt_convert.main(["-i", str(tmp_path / "bad.nemo"), "-o", out]) == 3
    assert capsys.readouterr().err.count("error: ") == 3
    assert not Path(out).exists()
    for wrong in (["-sq", "half"], ["-t", "int8"], ["-p", "0"]):
        with pytest.raises(SystemExit) as ended:
            nemo_ckpt_convert.main(["-i", str(source), "-o", out, *wrong])
        assert ended.value.code == 2


def test_the_right_converter_is_named(
    source: Path, make_gpt2: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = save_prompts(tmp_path / "prompts.nemo", {"a": torch.ones(2, 8)})
    for convert, wrong, code, right in (
        (nemo_ckpt_convert, prompts, 2, "nemo_prompt_convert.py"),
        (nemo_ckpt_convert, make_gpt2(), 3, "hf_gpt_convert.py"),
        (nemo_prompt_convert, source, 3, "nemo_ckpt_convert.py"),
    ):
        assert convert.main(["-i", str(wrong), "-o", str(tmp_path / "out")]) == code
        assert right in capsys.readouterr().err


def test_from_archive_to_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", str(out)]) == 0
    engine = tmp_path / "engine"
    limits = ["--max_input_len", "20", "--max_output_len", "8"]
    assert build.main(["--model_dir", str(out / "1-gpu"), "--output_dir", str(engine), *limits]) == 0
    capsys.readouterr()
    prompt = ["--input_text", "the fox", "--max_output_len", "8"]
    assert run.main(["--engine_dir", str(engine), *prompt]) == 0
    own = capsys.readouterr().out
    vocabulary = ["--vocab_file", str(out / "1-gpu" / "tokenizer.model")]
    assert run.main(["--engine_dir", str(engine), *prompt, *vocabulary]) == 0
    assert capsys.readouterr().out == own
    assert "the fox" in own


def test_greedy_ids_are_those_of_nemo(tmp_path: Path) -> None:
    config = tiny_config(**GPT_NEXT)
    state = tiny_state(config)
    source = save_model(tmp_path / "tiny.nemo", config, state, mode="w:gz")
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", str(tmp_path / "out")]) == 0
    engine, ids = tmp_path / "engine", [5, 17, 200]
    limits = ["--max_input_len", "8", "--max_output_len", "12"]
    assert build.main(["--model_dir", str(tmp_path / "out" / "1-gpu"), "--output_dir", str(engine), *limits]) == 0
    (tmp_path / "ids.csv").write_text(",".join(map(str, ids)) + "\n")
    flags = [
        "--input_tokens",
        str(tmp_path / "ids.csv"),
        "--output_npy",
        str(tmp_path / "ids.npy"),
        "--max_output_len",
        "12",
    ]
    assert run.main(["--engine_dir", str(engine), *flags]) == 0
    for _ in range(12):
        ids.append(int(nemo_logits(config, state, ids)[-1].argmax()))
    assert np.load(tmp_path / "ids.npy").tolist() == [ids]


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, os, gpt.checkpoint.writer as writer, nemo_ckpt_convert as script\n"
        "writer.write_config = lambda *args: os._exit(9)\n"
        f"script.main(['-i', {str(source)!r}, '-o', {str(out)!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 9
    assert not (out / "1-gpu").exists()
    assert nemo_ckpt_convert.main(["-i", str(source), "-o", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["1-gpu"]
    Checkpoint.open(out)


def test_prompt_tables_are_merged_and_their_tasks_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_prompts(tmp_path / "one.nemo", {"long": torch.ones(5, 16), "short": torch.ones(2, 16)})
    two = save_prompts(tmp_path / "two.nemo", {"other": torch.ones(4, 16)}, mode="w:gz")
    out = tmp_path / "table"
    args = ["-o", str(out), "-i", str(one), "--in-file", str(two), "-t", "fp16"]
    assert nemo_prompt_convert.main(args) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == ["", "=============== Argument ==============="]
    assert captured.out.splitlines()[-4:] == [
        "Task 0: long (5 virtual tokens)",
        "Task 1: short (2 virtual tokens)",
        "Task 2: other (4 virtual tokens)",
        "for build.py: --max_prompt_embedding_table_size 15",
    ]
    assert "--storage-type fp16 has no effect" in captured.err
    table = np.load(tmp_path / "table.npy")
    assert (table.shape, table.dtype) == ((3, 5, 16), np.float32)
    assert table.sum() == 11 * 16
    assert [task["virtual_tokens"] for task in json.loads((tmp_path / "table.npy.json").read_text())["tasks"]] == [
        5,
        2,
        4,
    ]
    assert nemo_prompt_convert.main(args) == 2
    assert nemo_prompt_convert.main([*args, "--force"]) == 0


def test_exit_codes_of_the_prompt_converter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "table.npy")
    narrow = save_prompts(tmp_path / "narrow.nemo", {"a": torch.ones(2, 8)})
    wide = save_prompts(tmp_path / "wide.nemo", {"a": torch.ones(2, 16)})
    assert nemo_prompt_convert.main(["-o", out, "-i", str(narrow), str(wide)]) == 3
    assert "different hidden size" in capsys.readouterr().err
    assert nemo_prompt_convert.main(["-o", out, "-i", str(tmp_path / "absent.nemo")]) == 2
    hostile = save_files(tmp_path / "hostile.nemo", {"../evil": b"x"})
    assert nemo_prompt_convert.main(["-o", out, "-i", str(hostile)]) == 3
    assert not Path(out).exists()
