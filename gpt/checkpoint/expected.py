"""Which files a checkpoint folder must have, by the table, and what is wrong with those it has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint import manifest
from gpt.checkpoint.config_ini import CONFIG_NAME
from gpt.checkpoint.layout import QuantFiles, quant_files, quant_tensors, tensors
from gpt.checkpoint.manifest import Manifest
from gpt.config import ModelConfig
from gpt.dtypes import FLOAT_DTYPES, ITEMSIZE
from gpt.errors import Problems
from gpt.files import is_lfs_pointer
from gpt.mapping import Mapping


@dataclass(frozen=True)
class ExpectedFile:
    """A file as the table wants it; `fixed` where its dtype is not the checkpoint's storage dtype, `scales` where all
    values must be above 0."""

    shape: tuple[int, ...]
    dtype: str
    fixed: bool
    scales: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def find_quant_files(folder: Path, listed: Manifest | None) -> QuantFiles:
    """What the folder has beside float weights: as the manifest says, else as the names of its files say."""
    return quant_files(listed.files if listed else [path.name for path in folder.glob("model.layers.*.bin")])


def expected_files(
    model: ModelConfig, world_size: int, dtype: str, quant: QuantFiles
) -> Iterator[tuple[str, ExpectedFile]]:
    """Name, shape and dtype of every weight file of a checkpoint stored in `dtype`."""
    for tensor in itertools.chain(tensors(model), quant_tensors(model, quant)):
        shape = tensor.file_shape(Mapping(world_size, 0), model)
        fixed, scales = tensor.dtype is not None, tensor.kind == "factor"
        file = ExpectedFile(shape, tensor.dtype or dtype, fixed, scales)
        for name in dict.fromkeys(tensor.file_name(rank) for rank in range(world_size)):
            yield name, file


def check_files(
    problems: Problems,
    folder: Path,
    model: ModelConfig,
    dtype: str,
    world_size: int,
    listed: Manifest | None,
    quant: QuantFiles,
) -> None:
    """Adds to `problems` each file that is missing, of another length, or contradicts the manifest."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    if model.n_layer > len(sizes):  # a damaged number must not become a list of billions of names
        problems.add(f"n_layer: {CONFIG_NAME} says {model.n_layer}, there are {len(sizes)} weight files")
        return
    expected = dict(expected_files(model, world_size, dtype, quant))
    for name, file in expected.items():
        if problem := _file_problem(folder / name, sizes.get(name), file):
            problems.add(problem)
        elif listed and name not in listed.files:
            problems.add(f"{name}: not in {manifest.FILE_NAME}")
        elif listed and listed.files[name].bytes != sizes[name]:
            problems.add(f"{name}: found {sizes[name]} bytes, {manifest.FILE_NAME} says {listed.files[name].bytes}")
    for name in listed.files if listed else ():
        if name not in expected:
            problems.add(f"{name}: in {manifest.FILE_NAME}, but {CONFIG_NAME} describes a model without it")


def _file_problem(path: Path, size: int | None, file: ExpectedFile) -> str | None:
    if size is None:
        return f"{path.name}: missing"
    if size == file.bytes:
        return None
    text = f"{path.name}: found {size} bytes, expected {file.bytes} for {list(file.shape)} in {file.dtype}"
    if is_lfs_pointer(path):
        return f"{path.name}: a Git LFS pointer, not the weights (git lfs pull fetches them)"
    fitting = [name for name in FLOAT_DTYPES if size == math.prod(file.shape) * ITEMSIZE[name]]
    if fitting and not file.fixed:
        text += f"; the size fits {' or '.join(fitting)}, so the dtype in {CONFIG_NAME} may be wrong"
    return text
