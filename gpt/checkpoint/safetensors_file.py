"""Tensors of a safetensors file: the header is parsed here, so that values can be read a few rows at a time.

Format: 8 bytes of header length (little endian), that much JSON, then the data, each tensor at its `data_offsets`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gpt.checkpoint.source import FileTensor, SourceTensor
from gpt.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEMSIZE["F8_E4M3"] = 1
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_DTYPES |= {"I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a file, values not read.  Raises CheckpointError for a file that is cut short or corrupt."""
    return dict(read_header(path)[0])


def read_header(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors of a file and its metadata.

    Layout: 8 bytes little-endian header length, that much JSON, then the data, each tensor at its data_offsets.
    Raises CheckpointError for a file that is cut short or corrupt.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise _corrupt(path, f"a header of {header_bytes} bytes in a file of {size}")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        spans = [(*_span(entry), name) for name, entry in header.items()]
        result = {
            name: FileTensor(path, shape, dtype, 8 + header_bytes + begin) for begin, _, shape, dtype, name in spans
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, f"{type(error).__name__} in the header: {error}") from error
    position = 0
    for begin, end, _, _, name in sorted(spans, key=lambda span: span[:2]):
        if begin != position:
            raise _corrupt(path, f"{name} begins at byte {begin} of the data, the tensor before it ends at {position}")
        position = end
    if 8 + header_bytes + position != size:
        raise _corrupt(path, f"{size} bytes, the header describes {8 + header_bytes + position}")
    return result, metadata


def _span(entry: dict[str, Any]) -> tuple[int, int, tuple[int, ...], str]:
    """begin, end, shape and dtype of a header entry.  Raises ValueError where they contradict each other."""
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    numbers = (begin, end, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
        raise ValueError(f"no sizes: {entry}")
    if dtype in _ITEMSIZE and end - begin != math.prod(shape) * _ITEMSIZE[dtype]:
        raise ValueError(f"{end - begin} bytes do not hold {list(shape)} in {dtype}")
    return begin, end, shape, _DTYPES.get(dtype, str(dtype).lower())


def _corrupt(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"truncated or corrupt: {path}", found=found, hint="download the file again")
