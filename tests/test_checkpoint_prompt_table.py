"""Tables of virtual tokens from NeMo's archives, PEFT's adapters and tables made before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_nemo import save_files, save_prompts, torch_bytes

from gpt.checkpoint.prompt_table import (
    Task,
    TaskEntry,
    description_path,
    merge,
    read_description,
    read_tasks,
    write_table,
)
from gpt.errors import CheckpointError, ConfigError


def table(rows: int, seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def save_adapter(path: Path, values: torch.Tensor, name: str = "prompt_embeddings", **changes: Any) -> Path:
    """A folder as PEFT's save_pretrained makes it."""
    path.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "token_dim": 16}
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    save_file({name: values}, path / "adapter_model.safetensors")
    return path


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_tasks(source)
    return str(raised.value)


@pytest.mark.parametrize("mode", ["w", "w:gz", None])
def test_an_archive_is_read_in_the_order_of_its_tasks(mode: str | None, tmp_path: Path) -> None:
    tables = {"zebra": table(5), "ant": table(3, seed=1).bfloat16()}
    tasks = read_tasks(save_prompts(tmp_path / "prompts.nemo", tables, mode=mode))
    assert [task.name for task in tasks] == ["zebra", "ant"]
    for task, expected in zip(tasks, tables.values(), strict=True):
        assert task.values.dtype == np.float32
        assert np.array_equal(task.values, expected.float().numpy())


def test_the_weights_of_the_first_rank_stand_in(tmp_path: Path) -> None:
    folder = save_prompts(tmp_path / "prompts", {"a": table(5)}, mode=None)
    (folder / "mp_rank_00").mkdir()
    (folder / "model_weights.ckpt").rename(folder / "mp_rank_00" / "model_weights.ckpt")
    assert len(read_tasks(folder)) == 1


def test_a_task_without_a_table_takes_no_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.console.log.propagate", True)
    templates = [{"taskname": "none"}, {"taskname": "b", "total_virtual_tokens": 2}]
    source = save_prompts(tmp_path / "p.nemo", {"a": table(5), "b": table(2)}, task_templates=templates)
    assert [task.name for task in read_tasks(source)] == ["b"]
    assert "the task none" in caplog.text
    assert "prompt_table.a." in caplog.text


def test_the_inference_table_of_an_adapter(tmp_path: Path) -> None:
    key = "model.language_model.adapter_layer.ptuning_adapter.{}"
    weights = {key.format("inference_table.prompt_table.taskname.prompt_embeddings.weight"): table(4)}
    weights[key.format("mlp_head.linear_1.weight")] = table(2)
    config = {"hidden_size": 16, "peft": {"peft_scheme": "ptuning"}}
    files = {"model_config.yaml": yaml.safe_dump(config).encode(), "model_weights.ckpt": torch_bytes(weights)}
    (task,) = read_tasks(save_files(tmp_path / "sentiment.nemo", files))
    assert task.name == "sentiment"
    assert np.array_equal(task.values, table(4).numpy())
    files["model_weights.ckpt"] = torch_bytes({"model.layers.0.adapter_layer.lora_kqv_adapter.linear_in": table(2)})
    assert "other adapters" in refusal(save_files(tmp_path / "lora.nemo", files))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_an_adapter_of_peft(kind: str, tmp_path: Path) -> None:
    (task,) = read_tasks(save_adapter(tmp_path / "poems", table(3), peft_type=kind))
    assert task.name == "poems"
    assert np.array_equal(task.values, table(3).numpy())


def test_an_adapter_of_peft_in_a_pickle(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "poems", table(3))
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors or adapter_model.bin" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(torch_bytes({"prompt_embeddings": table(3)}))
    assert np.array_equal(read_tasks(folder)[0].values, table(3).numpy())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "LORA"}, "LORA"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens"),
        ({"token_dim": 32}, "token_dim"),
        ({"name": "other"}, "prompt_embeddings"),
    ],
)
def test_adapters_that_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    assert word in refusal(save_adapter(tmp_path / "adapter", table(3), **changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"task_templates": [{"taskname": "a", "total_virtual_tokens": 7}]}, "7 virtual tokens"),
        ({"task_templates": None}, "task_templates"),
        ({"task_templates": [{"name": "a"}]}, "task_templates"),
        ({"task_templates": [{"taskname": "b"}]}, "no task"),
        ({"hidden_size": 32}, "hidden_size 32"),
    ],
)
def test_archives_that_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    assert word in refusal(save_prompts(tmp_path / "p.nemo", {"a": table(5)}, **changes))


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.zeros(0, 16), "empty"),
        (torch.zeros(4), "[4]"),
        (torch.zeros(2, 16, dtype=torch.int32), "int32"),
    ],
)
def test_values_that_are_refused(value: torch.Tensor, word: str, tmp_path: Path) -> None:
    files = {
        "model_config.yaml": yaml.safe_dump({"task_templates": [{"taskname": "a"}]}).encode(),
        "model_weights.ckpt": torch_bytes({"prompt_table": {"prompt_table.a.prompt_embeddings.weight": value}}),
    }
    assert word in refusal(save_files(tmp_path / "p.nemo", files))


def test_a_model_archive_is_no_table(tmp_path: Path) -> None:
    files = {"model_config.yaml": b"hidden_size: 16", "model_weights.ckpt": torch_bytes({"model.wte": table(2)})}
    message = refusal(save_files(tmp_path / "model.nemo", files))
    assert "without task_templates" in message
    assert "nemo_ckpt_convert.py" in message


def test_a_missing_input_is_a_wrong_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such archive"):
        read_tasks(tmp_path / "absent.nemo")


def test_merged_tables_are_padded_with_zeros() -> None:
    tasks = [Task("a", table(2).numpy(), "1"), Task("b", table(5, 1).numpy(), "2"), Task("c", table(3, 2).numpy(), "2")]
    merged = merge(tasks)
    assert merged.shape == (3, 5, 16)
    for index, task in enumerate(tasks):
        assert np.array_equal(merged[index, : len(task.values)], task.values)
        assert not merged[index, len(task.values) :].any()


def test_tables_of_different_width_are_refused_and_named() -> None:
    tasks = [Task("a", table(2).numpy(), "one.nemo"), Task("b", table(2, width=8).numpy(), "two.nemo")]
    with pytest.raises(CheckpointError, match="different hidden size") as raised:
        merge(tasks)
    assert raised.value.found == ["one.nemo, a: 16", "two.nemo, b: 8"]


def test_a_written_table_describes_itself_and_can_be_merged_again(tmp_path: Path) -> None:
    tasks = [Task("a", table(2).numpy(), "x.nemo"), Task("b", table(5, 1).numpy(), "x.nemo")]
    path = tmp_path / "new" / "prompts.npy"
    write_table(path, tasks)
    assert np.array_equal(np.load(path, allow_pickle=False), merge(tasks))
    assert read_description(path) == [TaskEntry(0, "a", 2, "x.nemo"), TaskEntry(1, "b", 5, "x.nemo")]
    assert json.loads(description_path(path).read_text())["hidden_size"] == 16
    again = read_tasks(path)
    assert [task.name for task in again] == ["a", "b"]
    assert [task.values.shape for task in again] == [(2, 16), (5, 16)]


@pytest.mark.parametrize(("broken", "rows"), [("numpy.save", 2), ("gpt.checkpoint.prompt_table.write_text", None)])
def test_a_description_never_outlives_its_table(
    broken: str, rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails on the way to a new table, what is beside a table describes this table or is absent."""

    def full_disk(*args: object, **options: object) -> None:
        raise OSError("no space left")

    path = tmp_path / "prompts.npy"
    write_table(path, [Task("a", table(2).numpy(), "x.nemo")])
    monkeypatch.setattr(broken, full_disk)
    with pytest.raises(OSError, match="no space"):
        write_table(path, [Task("b", table(5).numpy(), "y.nemo")])
    entries = read_description(path)
    assert (entries[0].virtual_tokens if entries else None) == rows
    assert np.load(path).shape[1] == (rows or 5)


def test_a_table_without_description_counts_every_row(tmp_path: Path) -> None:
    np.save(tmp_path / "foreign.npy", np.ones((2, 3, 16), np.float16))
    assert [(task.name, task.values.shape) for task in read_tasks(tmp_path / "foreign.npy")] == [
        ("foreign[0]", (3, 16)),
        ("foreign[1]", (3, 16)),
    ]
    assert read_description(tmp_path / "foreign.npy") is None


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY damaged", b"text"])
def test_a_damaged_table_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(content)
    assert "bad.npy" in refusal(tmp_path / "bad.npy")


def test_pickled_objects_in_a_table_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "objects.npy" in refusal(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    "description",
    [
        {"format_version": 2, "tasks": []},
        {"format_version": 1},
        {"format_version": 1, "tasks": [{"id": 0, "name": "a", "virtual_tokens": 9, "source": ""}]},
        {"format_version": 1, "tasks": []},
    ],
)
def test_a_description_that_does_not_fit_is_refused(description: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((1, 3, 16), np.float32))
    (tmp_path / "a.npy.json").write_text(json.dumps(description))
    assert "a.npy.json" in refusal(tmp_path / "a.npy")
