"""The reader of FT folders: what it reads and what it refuses."""

from __future__ import annotations

import configparser
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.store import Checkpoint
from gpt.config import ModelConfig
from gpt.errors import CheckpointError, ConfigError
from gpt.mapping import Mapping
from hf_gpt_convert import ProgArgs, run_conversion

QKV = "model.layers.0.attention.query_key_value.weight"
DENSE = "model.layers.1.attention.dense.weight"

MakeGpt2 = Callable[..., Path]


@pytest.fixture
def converted(make_gpt2: MakeGpt2, tmp_path: Path) -> Path:
    """A float16 checkpoint for two ranks: <tmp>/out/2-gpu."""
    arguments = ProgArgs(str(tmp_path / "out"), str(make_gpt2()), tensor_parallelism=2, storage_type="float16")
    return run_conversion(arguments)


def tensor_named(model: ModelConfig, name: str) -> Tensor:
    return next(tensor for tensor in tensors(model) if tensor.name == name)


def edit_ini(folder: Path, changes: dict[str, str | None]) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(folder / "config.ini")
    for key, value in changes.items():
        if value is None:
            parser.remove_option("gpt", key)
        else:
            parser["gpt"][key] = value
    with open(folder / "config.ini", "w", encoding="utf-8") as file:
        parser.write(file)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


# Reading.


def test_a_folder_and_its_parent_are_the_same_checkpoint(converted: Path) -> None:
    for folder in (converted, converted.parent):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.folder == converted
        assert (checkpoint.world_size, checkpoint.storage_dtype, checkpoint.model.n_embd) == (2, "float16", 32)
        assert {path.name for path in checkpoint.tokenizer_files} == {
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "generation_config.json",
        }


def test_each_rank_reads_its_part(converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(converted)
    source = load_file(tmp_path / "hf" / "model.safetensors")
    tensor = tensor_named(checkpoint.model, QKV)
    q, k, v = source["transformer.h.0.attn.c_attn.weight"].half().split(32, dim=1)
    for rank in range(2):
        half = slice(16 * rank, 16 * rank + 16)
        part = checkpoint.read(tensor, Mapping(2, rank))
        assert (part.dtype, part.shape) == (torch.float16, (32, 48))
        assert torch.equal(part, torch.cat([q[:, half], k[:, half], v[:, half]], dim=1))
        dense = checkpoint.read(tensor_named(checkpoint.model, DENSE), Mapping(2, rank))
        assert torch.equal(dense, source["transformer.h.1.attn.c_proj.weight"].half()[half])


def test_another_number_of_ranks_names_the_command(converted: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(converted)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(tensor_named(checkpoint.model, QKV), Mapping(4, 0))
    assert caught.value.hint == (
        f"python hf_gpt_convert.py -i {tmp_path / 'hf'} -o {converted.parent} -tp 4 -t float16"
    )


def test_changed_bytes_are_noticed_when_they_are_read(converted: Path) -> None:
    path = converted / f"{DENSE}.1.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    checkpoint = Checkpoint.open(converted)
    tensor = tensor_named(checkpoint.model, DENSE)
    checkpoint.read(tensor, Mapping(2, 0))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        checkpoint.read(tensor, Mapping(2, 1))


def test_a_genuine_fastertransformer_folder(converted: Path) -> None:
    (converted / "manifest.json").unlink()
    (converted / "config.ini").write_text(
        "[gpt]\nmodel_name = gpt\nhead_num = 4\nsize_per_head = 8\ninter_size = 128\nmax_pos_seq_len = 64\n"
        "num_layer = 2\nvocab_size = 301\nstart_id = 263\nend_id = 263\n"
        "weight_data_type = fp16\ntensor_para_size = 2\n",
        encoding="utf-8",
    )
    checkpoint = Checkpoint.open(converted)
    assert (checkpoint.model.n_embd, checkpoint.model.n_layer, checkpoint.model.eos_token_id) == (32, 2, 263)
    assert (checkpoint.model.hidden_act, checkpoint.storage_dtype, checkpoint.world_size) == ("gelu_new", "float16", 2)
    assert checkpoint.read(tensor_named(checkpoint.model, QKV), Mapping(2, 1)).shape == (32, 48)


def test_without_a_manifest_the_head_is_tied_where_it_has_no_file(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source = make_gpt2(tie_word_embeddings=False)
    folder = run_conversion(ProgArgs(str(tmp_path / "out"), str(source)))
    (folder / "manifest.json").unlink()
    assert not Checkpoint.open(folder).model.tied_head
    (folder / "model.lm_head.weight.bin").unlink()
    assert Checkpoint.open(folder).model.tied_head


def test_the_number_of_ranks_comes_from_the_files_where_nothing_else_says_it(converted: Path, tmp_path: Path) -> None:
    (converted / "manifest.json").unlink()
    edit_ini(converted, {"tensor_parallelism": None})
    renamed = converted.rename(tmp_path / "some model")
    assert Checkpoint.open(renamed).world_size == 2


# What is refused.


def test_all_bad_files_are_in_one_report(converted: Path) -> None:
    (converted / f"{DENSE}.0.bin").unlink()
    with open(converted / f"{DENSE}.1.bin", "ab") as file:
        file.write(b"x")
    (converted / "model.wte.bin").write_bytes(b"")
    message = refusal(converted)
    assert f"{DENSE}.0.bin: missing" in message
    assert f"{DENSE}.1.bin: found 1025 bytes, expected 1024 for [16, 32] in float16" in message
    assert "model.wte.bin: found 0 bytes, expected 19264 for [301, 32] in float16" in message
    assert "convert the model again, with --force: python hf_gpt_convert.py -i" in message


def test_a_dtype_that_the_sizes_contradict_is_named(converted: Path) -> None:
    (converted / "manifest.json").unlink()
    edit_ini(converted, {"storage_dtype": "float32"})
    message = refusal(converted)
    assert "model.wpe.bin: found 4096 bytes, expected 8192 for [64, 32] in float32" in message
    assert "the size fits float16 or bfloat16, so the dtype in config.ini may be wrong" in message


def test_a_config_that_the_manifest_contradicts(converted: Path) -> None:
    edit_ini(converted, {"layer_norm_epsilon": "0.1", "storage_dtype": "bfloat16"})
    message = refusal(converted)
    assert "layer_norm_epsilon: config.ini says 0.1, manifest.json 1e-05" in message
    assert "storage_dtype: config.ini says bfloat16, manifest.json float16" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallelism": "4"}, "config.ini, tensor_parallelism: 4"),
        ({"n_embd": None, "n_layer": "two"}, "n_embd: missing"),
        ({"n_layer": "two"}, "n_layer: found 'two', allowed: int"),
        ({"n_layer": "2147483647"}, "n_layer: config.ini says 2147483647"),
        ({"n_head": "3"}, "n_embd 32 is not divisible by n_head 3"),
        ({"n_head": "1", "num_kv_heads": "1"}, "n_head 1 is not divisible by 2"),
        ({"storage_dtype": "float8"}, "unknown dtype 'float8'"),
        ({"activation_function": "mish"}, "hidden_act: found 'mish'"),
    ],
)
def test_configs_that_are_refused(converted: Path, changes: dict[str, str | None], message: str) -> None:
    edit_ini(converted, changes)
    assert message in refusal(converted)


@pytest.mark.parametrize(
    "text", ["", "n_embd = 32\n", "[gpt\nn_embd", "[gpt]\nn_embd = 1\nn_embd = 2\n", "[other]\na = 1\n"]
)
def test_a_damaged_config(converted: Path, text: str) -> None:
    (converted / "config.ini").write_text(text, encoding="utf-8")
    assert "damaged" in refusal(converted)


def test_a_config_that_is_no_text(converted: Path) -> None:
    (converted / "config.ini").write_bytes(b"\xff\xfe\x00")
    assert "damaged" in refusal(converted)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "files": 3, "model": {}}']
)
def test_a_damaged_manifest(converted: Path, text: str) -> None:
    (converted / "manifest.json").write_text(text, encoding="utf-8")
    assert "damaged" in refusal(converted)


def test_a_manifest_of_another_format_version(converted: Path) -> None:
    path = converted / "manifest.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "format_version": 99}), encoding="utf-8"
    )
    message = refusal(converted)
    assert "found:   99" in message
    assert "allowed: 1" in message


def test_a_manifest_that_lists_other_files(converted: Path) -> None:
    path = converted / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["files"]["model.more.bin"] = content["files"].pop("model.wpe.bin")
    content["files"]["model.wte.bin"]["bytes"] += 1
    path.write_text(json.dumps(content), encoding="utf-8")
    message = refusal(converted)
    assert "model.wpe.bin: not in manifest.json" in message
    assert "model.more.bin: in manifest.json" in message
    assert "model.wte.bin: found 19264 bytes, manifest.json says 19265" in message


def test_git_lfs_pointers_are_named(converted: Path) -> None:
    (converted / "model.wte.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8"
    )
    assert "model.wte.bin: a Git LFS pointer" in refusal(converted)


def test_folders_without_a_checkpoint(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refusal(tmp_path / "empty")
    assert "hf_gpt_convert.py -i" in refusal(tmp_path / "hf")
    shutil.copytree(converted, converted.parent / "1-gpu")
    assert "found:   1-gpu, 2-gpu" in refusal(converted.parent)
    assert "the folder's name: 1" in refusal(converted.parent / "1-gpu")
