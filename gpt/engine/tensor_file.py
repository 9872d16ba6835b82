"""A rank's weights in one safetensors file, written as a stream and read through the memory map.

The safetensors package reads what is written here.  It does not do the writing or the reading for two reasons: its
writer wants every tensor in memory at once, and neither side aligns tensors, while vector loads from a mapped file want
64-byte starts.  The format forbids holes, so alignment is reached with filler tensors named `filler.<n>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash  # checksums at memory speed; nobody attacks a folder of weights through its checksum

from gpt.checkpoint.safetensors_file import read_header
from gpt.console import progress
from gpt.dtypes import ITEMSIZE, torch_dtype
from gpt.errors import CheckpointError, EngineError

_ALIGNMENT = 64
_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
}
_FILLER = "filler."


def write_tensor_file(
    path: Path,
    layout: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str],
    what: str,
) -> str:
    """Writes `tensors`, which must come in the order, dtypes and shapes of `layout`; returns the file's xxh3_128
    checksum.

    One tensor is in memory at a time.  `what` labels the progress bar.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    fillers: dict[str, int] = {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        num_bytes = torch.Size(shape).numel() * ITEMSIZE[dtype]
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
        if filler := -offset % _ALIGNMENT:
            entries[f"{_FILLER}{len(fillers)}"] = {
                "dtype": "U8",
                "shape": [filler],
                "data_offsets": [offset, offset + filler],
            }
            fillers[name] = filler
            offset += filler
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file, progress(total=offset, what=what, unit="B") as bar:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(header).to_bytes(8, "little"))
        put(header)
        for name, tensor in tensors:
            dtype, shape = layout[name]
            if tuple(tensor.shape) != tuple(shape):
                raise EngineError(f"{name} has the wrong shape", found=tuple(tensor.shape), allowed=shape)
            if tensor.dtype != torch_dtype(dtype):
                raise EngineError(f"{name} has the wrong dtype", found=tensor.dtype, allowed=dtype)
            put(tensor.reshape(-1).view(torch.uint8).numpy().data)
            put(bytes(fillers.get(name, 0)))
            bar.update(tensor.nbytes)
    return digest.hexdigest()


def map_tensor_file(path: Path, data: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file as read-only views of its memory map (CPU), and its metadata.

    Nothing is copied: pages are read when a tensor is first used and shared by all processes that map the file.
    data: the file's bytes elsewhere, uint8 [size], to be viewed in place of the map.
    Raises EngineError for a file that is cut short or is no such file.
    """
    try:
        header, metadata = read_header(path)
    except CheckpointError as error:
        raise _damaged(path, error.found) from error
    layout = {name: tensor for name, tensor in header.items() if not name.startswith(_FILLER)}
    if not layout:
        return {}, metadata
    if data is None:
        data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    result = {}
    for name, tensor in layout.items():
        if tensor.dtype not in _CODES:
            raise _damaged(path, f"{name} in {tensor.dtype}")
        dtype = torch_dtype(tensor.dtype)
        num_bytes = torch.Size(tensor.shape).numel() * dtype.itemsize
        result[name] = data[tensor.offset : tensor.offset + num_bytes].view(dtype).view(tensor.shape)
    return result, metadata


def _damaged(path: Path, found: object) -> EngineError:
    return EngineError(f"{path} is damaged", found=found, hint="build the engine again with build.py")
