"""The files of a Hugging Face model folder: names and shapes of the weights first, values row by row later.

No model object is made and no code from the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.checkpoint.safetensors_file import read_safetensors
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.store import find_tokenizer_files
from gpt.checkpoint.torch_file import read_torch_file
from gpt.console import log
from gpt.errors import CheckpointError, ConfigError, Problems
from gpt.files import is_lfs_pointer, listing

_FORMATS: tuple[tuple[str, str, Callable[[Path], dict[str, SourceTensor]]], ...] = (
    ("model", "safetensors", read_safetensors),
    ("pytorch_model", "bin", read_torch_file),
)


def open_weights(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the folder by its name in the files; values are not read.

    safetensors before pytorch_model.bin where both are there, as Hugging Face chooses.  Raises CheckpointError for
    absent, truncated, corrupt or refused files.
    """
    for stem, suffix, read in _FORMATS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            _refuse_pointers([single])
            return read(single)
        if index.is_file():
            return _read_shards(index, read)
        for path in (single, index):
            if path.is_symlink() or path.exists():
                raise CheckpointError(
                    f"{path} is no file",
                    found=f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "something else",
                    hint="download the model's weights into this folder again",
                )
    raise CheckpointError(
        f"no weights in {folder}",
        found=listing(folder),
        allowed="model.safetensors or pytorch_model.bin, or the .index.json of either with its shards",
        hint="download the model's PyTorch weights into this folder",
    )


def find_tokenizer(folder: Path) -> list[Path]:
    """The tokenizer files of the folder, if any.  Raises CheckpointError for Git LFS pointers among them."""
    paths = find_tokenizer_files(folder)
    _refuse_pointers(paths)
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.  Raises CheckpointError for anything else."""
    _refuse_pointers([path])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"no valid JSON: {path}", found=f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"no JSON object: {path}", found=type(content).__name__, allowed='{"key": value, ...}')
    return content


def check_folder(folder: Path) -> None:
    """Raises ConfigError unless `folder` is one."""
    if folder.is_dir():
        return
    if folder.is_file():
        nemo = folder.suffix in (".nemo", ".gz", ".tgz", ".tar")
        hint = "nemo_ckpt_convert.py converts NeMo archives" if nemo else f"-i {folder.parent}"
        raise ConfigError("the input is a file", found=folder, allowed="the model's folder", hint=hint)
    raise ConfigError(
        "no such model folder",
        found=folder,
        allowed="a folder with config.json and weights",
        hint="models are not downloaded here: fetch the folder first and name its path",
    )


def _read_shards(index: Path, read: Callable[[Path], dict[str, SourceTensor]]) -> dict[str, SourceTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"no weight_map: {index}", hint="download the file again")
    problems = Problems()
    shards = sorted({str(name) for name in weight_map.values()})
    for name in shards:
        if Path(name).name != name:
            problems.add(f"{name}: not a plain file name")
        elif not (index.parent / name).is_file():
            problems.add(f"{name}: missing")
    problems.raise_if_any(CheckpointError, f"the shards of {index} are not all here", hint="download the missing files")
    _refuse_pointers([index.parent / name for name in shards])
    result: dict[str, SourceTensor] = {}
    owners: dict[str, str] = {}
    for shard in shards:
        for name, tensor in read(index.parent / shard).items():
            if name in owners:
                problems.add(f"{name}: in {owners[name]} and in {shard}")
            owners[name] = shard
            result[name] = tensor
    for name, shard in weight_map.items():
        if owners.get(name) != shard:
            problems.add(f"{name}: not in {shard}")
    problems.raise_if_any(CheckpointError, f"the shards contradict {index}", hint="download the files again")
    log.info("%d tensors in %d files", len(result), len(shards))
    return result


def _refuse_pointers(paths: list[Path]) -> None:
    pointers = [path.name for path in paths if is_lfs_pointer(path)]
    if pointers:
        raise CheckpointError(
            f"Git LFS pointers instead of the files themselves, in {paths[0].parent}",
            found=pointers,
            hint="run `git lfs install` and `git lfs pull` in that folder",
        )
