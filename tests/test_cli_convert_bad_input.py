"""How hf_gpt_convert.py ends on each kind of bad input: one message, an exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_gpt_convert

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"

MakeGpt2 = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must fail with `code` and leave no output behind; its message."""

    def run(source: Path, *flags: str, code: int = 3) -> str:
        assert hf_gpt_convert.main(["-i", str(source), "-o", str(tmp_path / "out"), *flags]) == code
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error[error.index("error: ") :]

    return run


def convert(source: Path, out: Path, *flags: str) -> int:
    return hf_gpt_convert.main(["-i", str(source), "-o", str(out), *flags])


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    """Replaces tensors; in names, __ stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        full = "transformer." + name.replace("__", ".")
        weights[full] = tensor.to(weights[full].dtype)
    save_file(weights, folder / "model.safetensors")


def to_torch_file(folder: Path) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    return path


# Arguments.


def test_a_number_of_ranks_that_does_not_divide(make_gpt2: MakeGpt2, refused: Refused) -> None:
    message = refused(make_gpt2(n_embd=36, n_head=6), "-tp", "4", code=2)
    assert "n_head 6 is not divisible by 4" in message
    assert "tensor parallelism of 1, 2, 3, 6" in message


def test_a_full_disk(make_gpt2: MakeGpt2, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt.checkpoint import writer

    append, calls = writer._OutputFile.append, iter(range(1000))

    def append_until_full(self: writer._OutputFile, part: torch.Tensor) -> None:
        if next(calls) >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        append(self, part)

    monkeypatch.setattr(writer._OutputFile, "append", append_until_full)
    message = refused(make_gpt2(), code=1)
    assert "no space left on the device" in message


def test_too_little_space_is_known_beforehand(
    make_gpt2: MakeGpt2, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused(make_gpt2(), code=1)
    assert "1000 B free" in message
    assert "at least 145.1 KiB" in message


# Bad model folders.


def test_missing_and_empty_folders(tmp_path: Path, make_gpt2: MakeGpt2, refused: Refused) -> None:
    assert "no such model folder" in refused(tmp_path / "absent", code=2)
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refused(tmp_path / "empty")
    source = make_gpt2()
    assert f"-i {source}" in refused(source / "model.safetensors", code=2)
    (source / "model.safetensors").unlink()
    assert "no weights in" in refused(source)
    (source / "model.safetensors").symlink_to("../blobs/0123")
    assert "a link to ../blobs/0123, which is not there" in refused(source)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    assert "model.safetensors is no file" in refused(source)
    (tmp_path / "a.nemo").write_bytes(b"x")
    assert "nemo_ckpt_convert.py" in refused(tmp_path / "a.nemo", code=2)


def test_an_output_below_a_file(make_gpt2: MakeGpt2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("x", encoding="utf-8")
    assert convert(make_gpt2(), tmp_path / "notes") == 2
    assert f"the output path is a file\n  found:   {tmp_path / 'notes'}" in capsys.readouterr().err


def test_a_converted_folder_as_input(make_gpt2: MakeGpt2, tmp_path: Path, refused: Refused) -> None:
    assert convert(make_gpt2(), tmp_path / "first") == 0
    assert "converted already" in refused(tmp_path / "first" / "1-gpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers(make_gpt2: MakeGpt2, refused: Refused, name: str) -> None:
    source = make_gpt2()
    (source / name).write_text(POINTER, encoding="utf-8")
    message = refused(source)
    assert "Git LFS pointer" in message
    assert name in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "gpt2", }', "[" * 100_000])
def test_a_config_that_is_no_json_object(make_gpt2: MakeGpt2, refused: Refused, text: str) -> None:
    source = make_gpt2()
    (source / "config.json").write_text(text, encoding="utf-8")
    assert "JSON" in refused(source)


def test_an_unknown_architecture(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2()
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (source / "config.json").write_text(config, encoding="utf-8")
    message = refused(source)
    assert "model_type 'llama', architectures ['LlamaForCausalLM']" in message
    assert "allowed: model_type 'gpt2'" in message


def test_a_config_without_an_architecture(make_gpt2: MakeGpt2, tmp_path: Path, refused: Refused) -> None:
    source = make_gpt2()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["model_type"], config["architectures"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "--model names the family" in refused(source)
    assert convert(source, tmp_path / "out", "--model", "gpt2") == 0


def test_a_config_of_another_size(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source, bigger = make_gpt2(), make_gpt2("bigger", n_embd=64)
    (bigger / "config.json").replace(source / "config.json")
    message = refused(source)
    assert "wte.weight: found [301, 32], config.json wants [301, 64]" in message
    assert "... and " in message  # all of them are counted, not all are printed


def damaged_safetensors(data: bytes) -> dict[str, bytes]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]

    def with_header(change: dict[str, object]) -> bytes:
        text = json.dumps({**header, **change}).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return {
        "empty": b"",
        "short": data[:5],
        "half": data[: len(data) // 2],
        "one byte less": data[:-1],
        "one byte more": data + b"x",
        "huge header": (2**63).to_bytes(8, "little") + data[8:],
        "no json": data[:8] + b"\xff" * length + data[8 + length :],
        "overlap": with_header({second: header[first]}),
        "wrong shape": with_header({first: {**header[first], "shape": [7]}}),
        "negative": with_header({first: {**header[first], "data_offsets": [-4, 0]}}),
        "no entry": with_header({first: 3}),
        "list": len(b"[] ").to_bytes(8, "little") + b"[] ",
    }


def test_damaged_safetensors(make_gpt2: MakeGpt2, refused: Refused) -> None:
    path = make_gpt2() / "model.safetensors"
    for damage, data in damaged_safetensors(path.read_bytes()).items():
        path.write_bytes(data)
        assert f"truncated or corrupt: {path}" in refused(path.parent), damage


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0, 2, 100, -1000])
def test_truncated_torch_files(make_gpt2: MakeGpt2, refused: Refused, zipped: bool, part: int) -> None:
    source = make_gpt2()
    path = to_torch_file(source)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:part])
    message = refused(source)
    assert "corrupt" in message
    assert str(path) in message


def test_a_corrupt_torch_file(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2()
    path = to_torch_file(source)
    data = path.read_bytes()
    start = data.index(b"ctorch._utils")  # in the pickle
    path.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
    assert "corrupt" in refused(source)


class Attack:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_never_run(make_gpt2: MakeGpt2, tmp_path: Path, refused: Refused, zipped: bool) -> None:
    source, mark = make_gpt2(), tmp_path / "attacked"
    path = to_torch_file(source)
    torch.save({**torch.load(path), "more": Attack(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert "refused or corrupt" in refused(source)
    path.write_bytes(pickle.dumps(Attack(mark), protocol=2))
    assert "corrupt" in refused(source)
    path.write_bytes(pickle.dumps(Attack(mark), protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's about protocols would stand in the way of the message
        assert "found:   Unsupported operand" in refused(source)  # and not torch's advice how to run it
    assert not mark.exists()
    pickle.loads(pickle.dumps(Attack(mark)))  # the attack is real
    assert mark.exists()


def test_a_torch_file_with_more_than_tensors(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2()
    path = to_torch_file(source)
    torch.save({"model": torch.load(path), "step": 3}, path)
    message = refused(source)
    assert "'model': dict" in message
    assert "'step': int" in message
    torch.save([1, 2], path)
    assert "no dictionary of tensors" in refused(source)


def test_incomplete_shards(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2(max_shard_size="30KB")
    index = source / "model.safetensors.index.json"
    shards = sorted(source.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].unlink()
    message = refused(source)
    assert f"{shards[0].name}: missing" in message
    assert f"{shards[1].name}: missing" in message
    index.write_text('{"weight_map": {"wte.weight": "../hf/model.safetensors"}}', encoding="utf-8")
    assert "not a plain file name" in refused(source)
    index.write_text("{}", encoding="utf-8")
    assert "no weight_map" in refused(source)


def test_shards_that_contradict_their_index(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2(max_shard_size="30KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["transformer.more.weight"] = content["weight_map"]["transformer.wte.weight"]
    index.write_text(json.dumps(content), encoding="utf-8")
    assert "transformer.more.weight: not in model-0" in refused(source)


# Bad values.


def test_nan_infinity_and_overflow_are_counted_tensor_by_tensor(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2()
    change_weights(
        source,
        h__0__ln_1__bias=torch.tensor([float("nan")] * 2 + [0.0] * 30),
        h__1__attn__c_attn__weight=torch.full((32, 96), 0.1).index_fill(0, torch.tensor([5]), float("-inf")),
        wpe__weight=torch.full((64, 32), 0.1).index_fill(0, torch.tensor([1]), -70000.0),
    )
    message = refused(source, "-t", "float16")
    assert [line.strip(" -") for line in message.splitlines() if line.startswith("    - ")] == [
        "model.wpe: 32 values up to 7e+04 do not fit float16",
        "model.layers.0.input_layernorm.bias: 2 values are NaN or infinite",
        "model.layers.1.attention.query_key_value.weight: 96 values are NaN or infinite",
    ]
    assert "--storage-type bfloat16" in message


def test_large_values_are_fine_where_the_type_holds_them(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    source = make_gpt2()
    # Each fits float16, their sum does not.
    change_weights(source, wpe__weight=torch.full((64, 32), 65504.0), ln_f__bias=torch.full((32,), -65519.0))
    assert convert(source, tmp_path / "out", "-t", "float16") == 0
    change_weights(source, wpe__weight=torch.full((64, 32), 3.3e38))
    assert convert(source, tmp_path / "more", "-t", "bfloat16") == 0


def test_overflow_of_bfloat16(make_gpt2: MakeGpt2, refused: Refused) -> None:
    source = make_gpt2()
    change_weights(source, ln_f__bias=torch.full((32,), 3.4e38))
    assert "model.final_layernorm.bias: 32 values up to 3.4e+38 do not fit bfloat16" in refused(
        source, "-t", "bfloat16"
    )
