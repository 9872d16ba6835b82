"""build.py from the outside: what it makes, what it says, what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import build_engine, convert, open_session

import build
from gpt.engine import tensor_file
from gpt.engine.folder import open_engine
from gpt.engine.tensor_file import map_tensor_file
from gpt.errors import EngineError
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session, load_torch_weights
from gpt.runtime.request import Request

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50", "--n_positions", "40"]


@pytest.fixture
def checkpoint(make_gpt2: Callable[..., Path], tmp_path: Path) -> Path:
    return convert(make_gpt2(), tmp_path / "ft")


def test_engine_folder(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--max_batch_size", "4", "--max_input_len", "40", "--max_output_len", "24", "--use_gemm_plugin"]
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), *flags]) == 0
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "config.json",
        "gpt_float32_tp1_rank0.engine",
        "tokenizer",
    ]
    text = (tmp_path / "e" / "config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["builder_config"]["max_input_len"] == 40
    assert config["builder_config"]["precision"] == "float32"
    assert config["plugin_config"]["gemm_plugin"] == "float32"
    assert config["plugin_config"]["gpt_attention_plugin"] is False
    assert config["engine"]["files"][0]["bytes"] == (tmp_path / "e" / "gpt_float32_tp1_rank0.engine").stat().st_size
    assert (tmp_path / "e" / "tokenizer" / "tokenizer.json").is_file()


def test_a_folder_of_fastertransformer_builds_and_runs(checkpoint: Path, tmp_path: Path) -> None:
    """Its own config.ini, no manifest, no tokenizer; the tanh form of GELU, which is what FasterTransformer means."""
    theirs = tmp_path / "theirs" / "1-gpu"
    theirs.mkdir(parents=True)
    for path in checkpoint.glob("*.bin"):
        (theirs / path.name).write_bytes(path.read_bytes())
    (theirs / "config.ini").write_text(
        "[gpt]\nmodel_name = gpt2\nhead_num = 4\nsize_per_head = 8\ninter_size = 128\nmax_pos_seq_len = 64\n"
        "num_layer = 2\nvocab_size = 301\nstart_id = 263\nend_id = 263\nweight_data_type = fp32\n"
        "tensor_para_size = 1\n"
    )
    tokens = []
    for source in (checkpoint, theirs):
        session = open_session(build_engine(source, tmp_path / source.parent.name / "engine"))
        assert session.model.eos_token_id == 263
        tokens.append(generate(session, Request([[1, 2, 3], [4]], max_new_tokens=30)).tokens)
    assert tokens[0] == tokens[1]


def test_dtype_converts(checkpoint: Path, tmp_path: Path) -> None:
    info = build_engine(checkpoint, tmp_path / "e", "--dtype", "bfloat16")
    assert info.files[0].name == "gpt_bfloat16_tp1_rank0.engine"
    weights, _ = map_tensor_file(info.engine_path(0))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_flags_that_contradict_the_checkpoint_are_named(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--n_layer", "7", "--n_head", "4", "--hidden_act", "relu", "--rotary_pct", "0.5", "--no_bias"]
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), *flags]) == 0
    told = capfd.readouterr().err
    for text in ("n_layer 7 is ignored: the checkpoint says 2", "hidden_act relu", "rotary_pct 0.5", "no_bias True"):
        assert text in told
    assert "n_head" not in told


def test_random_weights_are_stored_as_their_seed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    big = ["--n_layer", "4", "--n_embd", "256", "--n_head", "4", "--vocab_size", "9000"]
    info = build_engine(None, tmp_path / "a", *big, "--random_seed", "3")
    assert info.files[0].num_bytes < 1000
    again = build_engine(None, tmp_path / "b", *big, "--random_seed", "3")
    other = build_engine(None, tmp_path / "c", *big, "--random_seed", "4")
    first, second, third = (
        load_torch_weights(engine, Mapping(), torch.device("cpu"))["model.wte"] for engine in (info, again, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_drawn_seed_is_printed_and_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seeds = []
    for name in ("a", "b"):
        assert build.main([*SIZES, "--output_dir", str(tmp_path / name)]) == 0
        seeds.append(open_engine(tmp_path / name).build.seed)
        assert f"--random_seed {seeds[-1]}" in capfd.readouterr().err
    assert seeds[0] != seeds[1]


def test_default_limits_fit_the_positions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    info = build_engine(None, tmp_path / "e", *SIZES)
    assert info.build.max_seq_len == 40
    info = build_engine(None, tmp_path / "f", *SIZES, "--max_input_len", "30")
    assert (info.build.max_input_len, info.build.max_output_len) == (30, 10)


def test_estimate_and_times_are_told(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]) == 0
    told = capfd.readouterr().err
    assert "Model: 2 layers of 32, 4 heads of 8" in told
    assert told.index("Needed per rank") < told.index("Engine serialized") < told.index("Total time of building all 1")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--enable_context_fmha", "--enable-context-fmha-fp32-acc"], ["give one of the two"]),
        (["--use_inflight_batching"], ["--use_inflight_batching: needs --paged_kv_cache"]),
        (["--paged_kv_cache", "--target", "ada"], ["--paged_kv_cache with --backend tensorrt", "contiguous"]),
        (["--paged_kv_cache", "--tokens_per_block", "9999999999"], ["tokens_per_block: found 9999999999"]),
        (["--world_size", "4"], ["n_head 2 is not divisible by 4", "tensor parallelism of 1, 2"]),
        (["--target", "ada", "--strip_plan"], ["--strip_plan: run.py cannot put the weights back"]),
        (
            ["--world_size", "2", "--use_parallel_embedding", "--embedding_sharding_dim", "1"],
            ["cannot be cut by hidden size", "--embedding_sharding_dim 0"],
        ),
        (["--max_prompt_embedding_table_size", "10", "--use_lookup_plugin"], ["has no prompt table"]),
        (["--max_prompt_embedding_table_size", "-1"], ["max_prompt_embedding_table_size: found -1"]),
        (["--dtype", "float32", "--use_gemm_plugin", "float16"], ["float16 for the plugin, float32 for the engine"]),
        (["--max_input_len", "30", "--max_output_len", "11"], ["= 41", "n_positions = 40", "--max_input_len 29"]),
        (["--hidden_act", "gelou"], ["'gelou'", "gelu_new"]),
        (["--n_embd", "33"], ["33 is not divisible by n_head 2"]),
        (["--rotary_pct", "1.5", "--n_layer", "0"], ["n_layer: found 0"]),
        (["--n_layer", "2000000"], ["--n_layer 2000000", "1 to 10000"]),
        (["--rotary_pct", "1.5"], ["rotary_pct: found 1.5"]),
        (["--backend", "torch", "--target", "ada"], ["--target"]),
        (["--vocab_size", "99999999999"], ["vocab_size: found 99999999999"]),
    ],
)
def test_wrong_options(flags: list[str], told: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.main([*SIZES, *flags, "--output_dir", str(tmp_path / "e")]) == 2
    error = capfd.readouterr().err
    for text in told:
        assert text in error
    assert "Traceback" not in error
    assert not (tmp_path / "e").exists()


def test_missing_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--model_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "e")]) in (2, 3)
    assert "nowhere" in capfd.readouterr().err


def _truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.wpe.bin"
    path.write_bytes(path.read_bytes()[:-8])


def _remove(checkpoint: Path) -> None:
    (checkpoint / "model.layers.1.mlp.dense_h_to_4h.bias.0.bin").unlink()


def _damage_config(checkpoint: Path) -> None:
    (checkpoint / "config.ini").write_text("[gpt\nn_layer = many")


def _change_bytes(checkpoint: Path) -> None:
    path = checkpoint / "model.wpe.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_truncate, ["model.wpe.bin", "8184 bytes", "8192"]),
        (_remove, ["dense_h_to_4h.bias.0.bin", "missing"]),
        (_damage_config, ["config.ini"]),
        (_change_bytes, ["model.wpe.bin"]),
    ],
    ids=["truncated", "missing", "config", "changed"],
)
def test_bad_checkpoint(
    damage: Callable[[Path], None], told: list[str], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint)
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]) == 3
    error = capfd.readouterr().err
    for text in told:
        assert text in error
    assert not list((tmp_path / "e").glob("*"))


@pytest.mark.parametrize("flags", [[], ["--use_weight_only"]])
def test_values_that_an_engine_cannot_hold_are_counted(
    flags: list[str], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a folder without checksums, and in one that a float16 engine is made of."""
    (checkpoint / "manifest.json").unlink()
    for name, value in (("model.wpe.bin", 1e6), ("model.layers.1.mlp.dense_h_to_4h.weight.0.bin", math.nan)):
        values = np.fromfile(checkpoint / name, np.float32)
        values[[3, 5]] = value
        values.tofile(checkpoint / name)
    command = ["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), *flags]
    assert build.main([*command, "--dtype", "float16"]) == 3
    error = capfd.readouterr().err
    assert "model.wpe: 2 values up to 1e+06 do not fit float16" in error
    assert "model.layers.1.mlp.dense_h_to_4h.weight: 2 values are NaN or infinite" in error
    assert not list((tmp_path / "e").glob("*"))


@pytest.mark.parametrize("kept", ["config.json", "tokenizer/words.txt"])
def test_files_that_are_no_engine_s_are_left_alone(
    kept: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    (out / kept).parent.mkdir(parents=True)
    (out / kept).write_text('{"model_type": "gpt2"}', encoding="utf-8")
    command = ["--model_dir", str(checkpoint), "--output_dir", str(out)]
    assert build.main(command) == 2
    error = capfd.readouterr().err
    assert f"holds something else and is left alone: {out}" in error
    assert f"a folder without {kept.partition('/')[0]}, or one with an engine" in error
    assert (out / kept).read_text(encoding="utf-8") == '{"model_type": "gpt2"}'
    assert len(list(out.iterdir())) == 1
    (out / kept).rename(out / "notes.txt")
    if kept != "config.json":
        (out / "tokenizer").rmdir()
    assert build.main(command) == build.main(command) == 0  # other files do not matter, an engine is replaced
    next(out.glob("*.engine")).unlink()
    assert build.main(command) == 0


def test_the_number_of_ranks_chooses_among_several_conversions(make_gpt2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_gpt2()
    for world_size in (1, 2):
        convert(source, tmp_path / "ft", tp=world_size)
    for world_size, code in ((2, 0), (1, 0), (4, 3)):
        command = ["--model_dir", str(tmp_path / "ft"), "--world_size", str(world_size)]
        assert build.main([*command, "--output_dir", str(tmp_path / f"e{world_size}")]) == code
    assert len(open_engine(tmp_path / "e2").files) == 2


def test_a_file_where_the_engine_s_folder_should_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e").write_text("x", encoding="utf-8")
    for out in (tmp_path / "e", tmp_path / "e" / "f"):
        assert build.main([*SIZES, "--output_dir", str(out)]) == 2
        assert "the output path is a file" in capfd.readouterr().err


def test_full_disk_keeps_the_old_engine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    old = build_engine(None, tmp_path / "e", *SIZES)

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(tensor_file, "open", no_space, raising=False)
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]) == 1
    assert "no space left" in capfd.readouterr().err
    assert open_engine(tmp_path / "e").build_id == old.build_id
    assert not list((tmp_path / "e").glob(".partial-*"))


def test_no_room_is_seen_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]) == 1
    assert "does not fit" in capfd.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_killed_build_leaves_nothing_that_looks_whole(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; import gpt.engine.builder as b;"
        "b._copy_tokenizer = lambda *a: (print('writing', flush=True), time.sleep(60));"
        "import build; build.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if process.stdout is None or process.stdout.readline() != "writing\n":
            pytest.fail("the build did not reach its end")
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    assert list((tmp_path / "e").glob(".partial-*"))
    with pytest.raises(EngineError):
        open_engine(tmp_path / "e")
    build_engine(checkpoint, tmp_path / "e")
    assert not list((tmp_path / "e").glob(".partial-*"))


def _set(config: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for name in parents:
        config = config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("engine.format_version", 99, ["version 99", "version 1"]),
        ("engine.files", [], ["lists 0 files for 1 ranks"]),
        ("engine.build.world_size", 2, ["lists 1 files for 2 ranks"]),
        ("engine.model.n_head", 3, ["n_head 3"]),
        ("engine.model.novel", 3, ["novel: unknown key"]),
        ("engine", None, ["another tool"]),
        ("engine.build_id", "other", ["does not belong"]),
        ("engine.model.inter_size", 60, ["dense_h_to_4h"]),
    ],
)
def test_bad_engine(path: str, value: object, told: list[str], checkpoint: Path, tmp_path: Path) -> None:
    build_engine(checkpoint, tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    _set(config, path, value)
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError) as caught:
        load_session(open_engine(tmp_path / "e"), "cpu")
    for text in told:
        assert text in str(caught.value)
    assert caught.value.exit_code == 3


def test_truncated_missing_or_absent_engine(checkpoint: Path, tmp_path: Path) -> None:
    info = build_engine(checkpoint, tmp_path / "e")
    path = info.engine_path(0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EngineError, match="not whole"):
        open_engine(tmp_path / "e")
    path.unlink()
    with pytest.raises(EngineError) as caught:
        open_engine(tmp_path / "e")
    assert "is missing" in str(caught.value)
    (tmp_path / "e" / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        open_engine(tmp_path / "e")
    with pytest.raises(EngineError, match="no engine folder"):
        open_engine(tmp_path / "nowhere")
