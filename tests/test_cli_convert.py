"""hf_gpt_convert.py as a command: what it prints and writes, and what it leaves behind."""

from __future__ import annotations

import configparser
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_gpt_convert
from gpt.checkpoint.store import Checkpoint
from gpt.errors import CheckpointError
from gpt.files import file_checksum

ROOT = Path(__file__).resolve().parent.parent

MakeGpt2 = Callable[..., Path]


def convert(source: Path, out: Path, *flags: str) -> int:
    return hf_gpt_convert.main(["-i", str(source), "-o", str(out), *flags])


def ini(folder: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(folder / "config.ini", encoding="utf-8")
    return parser["gpt"]


# What a good run does.


def test_arguments_are_printed_and_written(
    make_gpt2: MakeGpt2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_gpt2(), tmp_path / "out"
    code = convert(source, out, "--tensor_parallelism", "2", "-p", "1", "--storage-type=float16", "--model", "gpt2")
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "=============== Arguments ==============="]
    assert lines[-1] == "=" * 40
    assert {"tensor_parallelism: 2", "processes: 1", "storage_type: float16", "smoothquant: None"} <= set(lines)
    section = ini(out / "2-gpu")
    expected = {
        # command line, config.json, what readers use
        "tensor_parallelism": "2",
        "in_file": str(source),
        "model": "gpt2",
        "calibrate_kv_cache": "False",
        "architectures": "['GPT2LMHeadModel']",
        "attn_pdrop": "0.1",
        "n_inner": "None",
        "n_embd": "32",
        "storage_dtype": "float16",
        "multi_query_mode": "False",
        "intermediate_size": "128",
        "bias": "True",
    }
    assert {key: section[key] for key in expected} == expected


def test_the_manifest_lists_every_file(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source = make_gpt2()
    assert convert(source, tmp_path / "out", "-tp", "2", "-t", "bfloat16") == 0
    folder = tmp_path / "out" / "2-gpu"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["format_version"], manifest["tool"]) == (1, "hf_gpt_convert.py")
    assert manifest["source"] == str(source)
    assert manifest["command"] == f"python hf_gpt_convert.py -i {source} -o {tmp_path / 'out'} -tp 2 -t bfloat16"
    assert set(manifest["files"]) == {path.name for path in folder.glob("*.bin")}
    for name, record in manifest["files"].items():
        assert record["xxh3_128"] == file_checksum(folder / name)
        assert record["bytes"] == (folder / name).stat().st_size
        assert record["dtype"] == "bfloat16"
    assert manifest["files"]["model.layers.0.attention.dense.weight.1.bin"]["shape"] == [16, 32]


def test_tokenizer_files_travel_along(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source = make_gpt2()
    assert convert(source, tmp_path / "out") == 0
    copies = Checkpoint.open(tmp_path / "out").tokenizer_files
    assert len(copies) == 5
    for copy in copies:
        assert copy.read_bytes() == (source / copy.name).read_bytes()


def test_what_was_found_is_told(make_gpt2: MakeGpt2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_gpt2(dtype="bfloat16")
    assert convert(source, tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "Model: 2 layers of 32, 4 heads of 8, MLP 128 gelu_new" in told
    assert "vocabulary 301, bfloat16 in the files" in told
    assert "Tokenizer: fast, 264 tokens" in told
    (source / "tokenizer.json").write_text("{", encoding="utf-8")
    assert convert(source, tmp_path / "broken") == 0
    assert f"[W] Tokenizer: {source / 'tokenizer.json'} is no tokenizer" in capsys.readouterr().err
    assert convert(make_gpt2("none", tokenizer=False), tmp_path / "none") == 0
    assert "Tokenizer: none; run.py needs --tokenizer" in capsys.readouterr().err


def test_flags_without_effect_say_so(make_gpt2: MakeGpt2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset_cache_dir", "x", "--load-model-on-cpu", "--convert-model-on-cpu")
    assert convert(make_gpt2(), tmp_path / "out", *flags) == 0
    messages = capsys.readouterr().err
    assert "--dataset-cache-dir has no effect" in messages
    assert "--load-model-on-cpu and --convert-model-on-cpu have no effect" in messages


def test_odd_values_in_the_config_survive_the_ini_format(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source = make_gpt2()
    path = source / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(
        {"note": "100 %\nand [more] = x; #", "[odd]": 1, "a=b": 2, "N_Ctx": 1, "n_ctx": 2, "tensor_parallelism": 8}
    )
    path.write_text(json.dumps(config), encoding="utf-8")
    assert convert(source, tmp_path / "out") == 0
    section = ini(Checkpoint.open(tmp_path / "out").folder)
    assert section["note"] == "100 % and [more] = x; #"
    assert (section["tensor_parallelism"], section["n_ctx"]) == ("1", "2")


# Wrong command lines.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "llama"), "invalid choice: 'llama'"),
        (("-t", "int8"), "invalid choice: 'int8'"),
        (("-tp", "0"), "found 0, allowed: an integer of at least 1"),
        (("--procesess", "2"), "unrecognized arguments"),
    ],
)
def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        convert(tmp_path, tmp_path / "out", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# The output folder.


def test_another_checkpoint_is_replaced_with_force_only(
    make_gpt2: MakeGpt2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = make_gpt2("first"), make_gpt2("second", seed=1), tmp_path / "out"
    assert convert(first, out) == 0
    before = (out / "1-gpu" / "model.wte.bin").read_bytes()
    assert convert(second, out) == 2
    message = capsys.readouterr().err
    assert f"the output folder is in use: {out / '1-gpu'}" in message
    assert "--force" in message
    assert (out / "1-gpu" / "model.wte.bin").read_bytes() == before
    (second / "model.safetensors").rename(second / "elsewhere")
    assert convert(second, out, "--force") == 3
    assert (out / "1-gpu" / "model.wte.bin").read_bytes() == before
    (second / "elsewhere").rename(second / "model.safetensors")
    assert convert(second, out, "--force") == 0
    assert (out / "1-gpu" / "model.wte.bin").read_bytes() != before
    assert [path.name for path in out.iterdir()] == ["1-gpu"]


def test_several_numbers_of_ranks_live_side_by_side(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source, out = make_gpt2(), tmp_path / "out"
    assert convert(source, out) == 0
    assert convert(source, out, "-tp", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == ["1-gpu", "2-gpu"]


SLOW_CONVERSION = """
import sys, time
from gpt.checkpoint import writer
import hf_gpt_convert

append, calls = writer._OutputFile.append, iter(range(1000))

def append_and_stop(self, part):
    append(self, part)
    if next(calls) == 10:
        print("in the middle", flush=True)
        time.sleep(600)

writer._OutputFile.append = append_and_stop
hf_gpt_convert.main(sys.argv[1:])
"""


def test_a_kill_in_the_middle_leaves_nothing_that_looks_whole(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source, out = make_gpt2(), tmp_path / "out"
    command = [sys.executable, "-c", SLOW_CONVERSION, "-i", str(source), "-o", str(out), "-p", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "in the middle\n":
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in out.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".1-gpu.partial-")
    with pytest.raises(CheckpointError, match=r"no config\.ini") as caught:
        Checkpoint.open(out)
    assert "interrupted" in str(caught.value)
    assert convert(source, out) == 0
    assert [path.name for path in out.iterdir()] == ["1-gpu"]
    Checkpoint.open(out)


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys, hf_gpt_convert as h\ntry: h.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--storage-type" in result.stdout
