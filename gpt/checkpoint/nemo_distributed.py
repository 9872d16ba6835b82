"""Distributed checkpoints: a folder of shards, from however many ranks, in place of one weights file per rank.

Two formats hold the same thing, whole tensors cut into boxes.  zarr: a folder per tensor, with `.zarray` and one file
per box of a regular grid.  torch_dist: `.metadata`, a pickle that tells which box lies where in the `*.distcp` files,
each box one of torch's zip files.  The pickle is read without its classes, the values in place, row by row.

Tensors of the layers are stacked, `decoder.layers.<name>` [L, ...], unless the layers differ.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpt.checkpoint.source import FileTensor, SourceTensor
from gpt.dtypes import ITEMSIZE, torch_dtype
from gpt.errors import CheckpointError
from gpt.files import listing

if TYPE_CHECKING:
    import torch

FOLDER_NAME = "model_weights"
_METADATA = ".metadata"
_ZIP_HEADER_BYTES = 30  # of a member, before its name and extra field
_STACKED = re.compile(r"(.*\bdecoder\.layers)\.(?!\d)(.+)")
_ZARR_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, EOFError, RecursionError)


@dataclass(frozen=True)
class _Box:
    """Part of a tensor: where it begins in the tensor, and its values; both with the tensor's number of axes."""

    begin: tuple[int, ...]
    values: FileTensor


@dataclass(frozen=True)
class BoxedTensor:
    """A vector or matrix, put together from boxes; `layer` is its place in a stacked tensor, else None."""

    shape: tuple[int, ...]
    dtype: str
    boxes: Sequence[_Box]
    layer: int | None = None

    def read(self, first: int, last: int) -> torch.Tensor:
        import torch

        if len(self.shape) == 1:
            first, last = 0, 1
        rows = torch.empty(last - first, self.shape[-1], dtype=torch_dtype(self.dtype))
        for box in self.boxes:
            layer, row, column = self._as_matrix(box.begin, 0)
            num_layers, num_rows, num_columns = self._as_matrix(box.values.shape, 1)
            begin, end = max(first, row), min(last, row + num_rows)
            inside = (self.layer or 0) - layer
            if begin >= end or not 0 <= inside < num_layers:
                continue
            start = inside * num_rows + begin - row
            width = min(num_columns, self.shape[-1] - column)  # the last boxes of a grid stick out
            part = box.values.read(start, start + end - begin)
            rows[begin - first : end - first, column : column + width] = part[:, :width]
        return rows

    def _as_matrix(self, sizes: tuple[int, ...], missing: int) -> tuple[int, int, int]:
        """Layer, row, column of a box's corner or size; axes that the tensor lacks are `missing`."""
        stacked = 0 if self.layer is None else 1
        row = sizes[stacked] if len(self.shape) == 2 else missing
        return (sizes[0] if stacked else missing), row, sizes[-1]


def is_distributed(folder: Path) -> bool:
    return (folder / FOLDER_NAME).is_dir()


def read_distributed(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint by name, those of stacked layers one by one.

    Raises CheckpointError for another format, compressed or damaged shards, and boxes that do not fill a tensor.
    """
    shards = folder / FOLDER_NAME
    if (shards / _METADATA).is_file():
        found = _read_torch_dist(shards)
    elif arrays := sorted(shards.glob("*/.zarray")):
        found = {path.parent.name: _read_zarr(path) for path in arrays}
    else:
        raise CheckpointError(
            f"a distributed checkpoint of an unknown format: {FOLDER_NAME}/",
            found=listing(shards),
            allowed="zarr arrays, or torch_dist shards with .metadata",
            hint="save the model in NeMo with dist_ckpt_format torch_dist or zarr, or without distributed checkpoints",
        )
    result: dict[str, SourceTensor] = {}
    for name, tensor in found.items():
        if 0 in tensor.shape:
            raise _unreadable(name, ValueError(f"an empty tensor, {list(tensor.shape)}"))
        match = _STACKED.fullmatch(name)
        if not match:
            result[name] = tensor
            continue
        for layer in range(tensor.shape[0]):
            result[f"{match[1]}.{layer}.{match[2]}"] = dataclasses.replace(tensor, shape=tensor.shape[1:], layer=layer)
    return result


def _read_zarr(path: Path) -> BoxedTensor:
    """zarr version 2, uncompressed, in C order; the file `1.0.2` is the box at 1, 0, 2 of the grid."""
    name = path.parent.name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shape, sizes = tuple(map(int, content["shape"])), tuple(map(int, content["chunks"]))
        separator = content.get("dimension_separator", ".")
        dtype = _ZARR_DTYPES.get(content["dtype"], str(content["dtype"]))
        if content["zarr_format"] != 2 or content["order"] != "C" or len(shape) != len(sizes) or min(sizes) < 1:
            raise ValueError("not version 2, in C order")
        if content["compressor"] is not None or content.get("filters"):
            raise ValueError("compressed")
        if separator not in (".", "/"):
            raise ValueError(f"dimension_separator {separator!r}")
    except _DAMAGE as error:
        raise _unreadable(name, error) from error
    boxes = []
    for index in _grid(shape, sizes):
        file = path.parent / separator.join(map(str, index))
        expected = math.prod(sizes) * ITEMSIZE.get(dtype, 1)
        if not file.is_file() or file.stat().st_size != expected:
            raise _unreadable(name, ValueError(f"{file.name} is missing or not {expected} bytes long"))
        begin = tuple(place * size for place, size in zip(index, sizes, strict=True))
        boxes.append(_Box(begin, FileTensor(file, sizes, dtype, 0)))
    return BoxedTensor(shape, dtype, boxes)


def _grid(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    return itertools.product(*(range(-(-length // size)) for length, size in zip(shape, sizes, strict=True)))


class _Record:
    """What every object of a pickle becomes: its arguments and state, without the class's code."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state


class _Inert(pickle.Unpickler):
    """Builds records in place of objects, so that nothing the file names is imported or called."""

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Record,), {"__module__": module})


def _read_torch_dist(shards: Path) -> dict[str, BoxedTensor]:
    try:
        metadata: Any = _Inert(io.BytesIO((shards / _METADATA).read_bytes())).load()
        places = {
            (index.fqn, _sizes(index.offset)): info
            for index, info in metadata.storage_data.items()
            if hasattr(index, "offset")  # else it is no tensor
        }
        tensors = {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}
        return {name: _boxed(shards, name, entry, places) for name, entry in tensors.items()}
    except (*_DAMAGE, pickle.UnpicklingError) as error:
        raise _unreadable(_METADATA, error) from error


def _boxed(shards: Path, name: str, entry: Any, places: dict[tuple[str, tuple[int, ...]], Any]) -> BoxedTensor:
    shape, dtype = _sizes(entry.size), entry.properties.args[0].__name__
    boxes = []
    for chunk in entry.chunks:
        begin, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        info = places[name, begin]
        path = shards / Path(info.relative_path).name
        offset = _find_data(path, info.offset, info.length, math.prod(sizes) * ITEMSIZE.get(dtype, 1))
        boxes.append(_Box(begin, FileTensor(path, sizes, dtype, offset)))
    if sum(math.prod(box.values.shape) for box in boxes) != math.prod(shape):
        raise _unreadable(name, ValueError(f"its shards do not fill {list(shape)}"))
    return BoxedTensor(shape, dtype, boxes)


def _sizes(size: Any) -> tuple[int, ...]:
    """torch.Size is pickled as a call with one tuple."""
    return tuple(map(int, size.args[0]))


def _find_data(path: Path, offset: int, length: int, num_bytes: int) -> int:
    """Where in the file the values of a box lie: they are the only stored member of its zip that is as long."""
    if not path.is_file():
        raise _unreadable(path.name, ValueError("missing"))
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(_Part(file, offset, length)) as archive:
                (member,) = (item for item in archive.infolist() if re.fullmatch(r".+/data/\d+", item.filename))
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise _unreadable(path.name, error) from error
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != num_bytes:
            raise _unreadable(path.name, ValueError(f"a shard of {member.file_size} bytes, expected {num_bytes}"))
        file.seek(offset + member.header_offset)
        header = file.read(_ZIP_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return offset + member.header_offset + _ZIP_HEADER_BYTES + name_bytes + extra_bytes


class _Part:
    """Some bytes of an open file as a file of their own, for reading."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        self.file, self.offset, self.length = file, offset, length
        self.position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.file.seek(self.offset + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def _unreadable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"a distributed checkpoint that cannot be read: {name}",
        found=f"{type(error).__name__}: {error}",
        allowed="whole, uncompressed zarr version 2 arrays, or torch_dist shards",
        hint="copy the model again, or save it in NeMo with another dist_ckpt_format",
    )
