"""Distributed checkpoints in both formats give what a single weights file gives."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dist
import yaml
from tiny_nemo import GPT_NEXT, State, core_names, save_model, stacked, tiny_config, tiny_state

from gpt.checkpoint.nemo_distributed import read_distributed
from gpt.errors import CheckpointError
from nemo_ckpt_convert import ProgArgs, run_conversion

CONFIG = tiny_config(**GPT_NEXT, mcore_gpt=True)
BIASED = tiny_config(mcore_gpt=True)


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """torch warns that one process saves alone, which is what is meant."""


def files_of(source: Path, out: Path) -> dict[str, bytes]:
    folder = run_conversion(ProgArgs(out_dir=str(out), in_file=str(source), tensor_parallelism=2, processes=2))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def save_zarr(folder: Path, state: State, boxes: int, **changes: Any) -> None:
    """Each tensor in a grid of boxes, as ranks that hold parts of it write: a layer each, other axes cut in `boxes`."""
    for name, value in state.items():
        sizes = [1 if value.dim() > 1 and ".layers." in name else -(-value.shape[0] // boxes)]
        sizes += [-(-length // boxes) for length in value.shape[1:]]
        (folder / name).mkdir(parents=True)
        described = {
            "zarr_format": 2,
            "shape": list(value.shape),
            "chunks": sizes,
            "dtype": "bfloat16" if value.dtype == torch.bfloat16 else "<f4",
            "order": "C",
            "compressor": None,
            "filters": None,
            "fill_value": None,
        }
        (folder / name / ".zarray").write_text(json.dumps({**described, **changes}))
        for index in itertools.product(*(range(-(-n // size)) for n, size in zip(value.shape, sizes, strict=True))):
            box = torch.zeros(sizes, dtype=value.dtype)
            part = value[tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, sizes, strict=True))]
            box[tuple(slice(length) for length in part.shape)] = part
            content = box.view(torch.uint8).numpy().tobytes()
            (folder / name / ".".join(map(str, index))).write_bytes(content)


def save_torch_dist(folder: Path, state: dict[str, Any]) -> None:
    torch_dist.save(state, checkpoint_id=folder, no_dist=True)


def save_distributed(path: Path, config: dict[str, Any], save: Callable[[Path, State], None], **sizes: int) -> Path:
    path.mkdir()
    (path / "model_config.yaml").write_text(yaml.safe_dump({**config, **sizes}))
    save(path / "model_weights", stacked(core_names(tiny_state(config)), config["num_layers"]))
    return path


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["gpt-next", "biases"])
@pytest.mark.parametrize(
    "save",
    [
        lambda folder, state: save_zarr(folder, state, 1),
        lambda folder, state: save_zarr(folder, state, 3),
        save_torch_dist,
    ],
    ids=["zarr", "zarr in boxes that stick out", "torch_dist"],
)
def test_both_formats_give_what_one_file_gives(
    config: dict[str, Any], save: Callable[[Path, State], None], tmp_path: Path
) -> None:
    sizes = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
    }  # of the training, without meaning here
    distributed = save_distributed(tmp_path / "distributed", config, save, **sizes)
    plain = save_model(tmp_path / "plain", config, core_names(tiny_state(config)), mode=None)
    assert files_of(distributed, tmp_path / "a") == files_of(plain, tmp_path / "b")


def test_layers_that_are_not_stacked(tmp_path: Path) -> None:
    state = core_names(tiny_state(CONFIG))
    save_zarr(tmp_path / "model_weights", {name: value.bfloat16() for name, value in state.items()}, 2)
    found = read_distributed(tmp_path)
    assert found.keys() == state.keys()
    for name, value in state.items():
        rows = value.bfloat16().reshape(-1, value.shape[-1])
        assert found[name].shape == value.shape
        assert torch.equal(found[name].read(0, len(rows)), rows)
        middle = len(rows) // 3
        assert torch.equal(found[name].read(middle, len(rows)), rows[middle:])


def test_boxes_of_torch_dist_are_read_in_place(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.randn(7, 5), "decoder.layers.b": torch.randn(3, 6, 4).half(), "other": {"x": 1}}
    save_torch_dist(tmp_path / "model_weights", state)
    found = read_distributed(tmp_path)
    assert torch.equal(found["a"].read(2, 6), state["a"][2:6])
    for layer in range(3):
        assert torch.equal(found[f"decoder.layers.{layer}.b"].read(1, 6), state["decoder.layers.b"][layer, 1:])
    assert found.keys() == {"a", *(f"decoder.layers.{layer}.b" for layer in range(3))}


class _Code:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_code_in_the_metadata_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "model_weights").mkdir()
    (tmp_path / "model_weights" / ".metadata").write_bytes(pickle.dumps(_Code(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_distributed(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"compressor": {"id": "blosc"}}, "compressed"),
        ({"zarr_format": 3}, "version 2"),
        ({"order": "F"}, "C order"),
        ({"chunks": [0, 0]}, "version 2"),
        ({"chunks": [1]}, "version 2"),
        ({"chunks": [2, 3]}, "not 24 bytes long"),
        ({"shape": [8, 4]}, "2.0 is missing"),
        ({"shape": [0, 4]}, "empty"),
        ({"dimension_separator": "/../"}, "dimension_separator"),
    ],
)
def test_arrays_that_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    save_zarr(tmp_path / "model_weights", {"a": torch.zeros(4, 4)}, 2, **changes)
    with pytest.raises(CheckpointError, match="cannot be read: a") as raised:
        read_distributed(tmp_path)
    assert word in str(raised.value)


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    save_torch_dist(tmp_path / "model_weights", {"a": torch.zeros(400, 4)})
    (shard,) = (tmp_path / "model_weights").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="distcp"):
        read_distributed(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="distcp"):
        read_distributed(tmp_path)


def test_another_format_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "model_weights").mkdir()
    (tmp_path / "model_weights" / "weights.tensorstore").touch()
    with pytest.raises(CheckpointError, match="unknown format") as raised:
        read_distributed(tmp_path)
    assert "weights.tensorstore" in str(raised.value)
    assert "dist_ckpt_format" in str(raised.value)
