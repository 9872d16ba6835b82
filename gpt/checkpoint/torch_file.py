"""Tensors of a `pytorch_model.bin`.

torch unpickles it with `weights_only`, which builds tensors and refuses everything else, and maps the file instead of
reading it.  Where the kernel tells at which byte of the file a tensor lies, its values are read from there, so that
mapped pages do not pile up.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.checkpoint.source import FileTensor, SourceTensor
from gpt.console import log
from gpt.dtypes import dtype_name
from gpt.errors import CheckpointError, brief, first_lines

if TYPE_CHECKING:
    import torch

_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor in memory, or in mapped pages that the kernel may take back."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.values.dtype)

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.values.reshape(-1, self.shape[-1])[first:last]


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Raises CheckpointError for a truncated or corrupt file and for one that holds anything but tensors."""
    content = load_torch_file(path)
    strange = [
        f"{name!r}: {type(value).__name__}" for name, value in content.items() if not is_named_tensor(name, value)
    ]
    if strange:
        raise CheckpointError(
            f"more than a model's tensors: {path}",
            found=first_lines(strange),
            allowed="tensors by name",
            hint="save model.state_dict() alone",
        )
    return locate_tensors(path, content)


def load_torch_file(path: Path) -> dict[Any, Any]:
    """The dictionary in the file, its tensors in mapped pages where the format allows it.

    Raises CheckpointError for a truncated or corrupt file, and for one with anything in it that needs code to be run.
    """
    import torch

    with open(path, "rb") as file:
        mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if not mapped:
        log.info("%s has the format of torch before 1.6: it is read into memory whole", path.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused or corrupt: {path}",
            found=_reason(error),
            allowed="tensors by name; pickled code is never run",
            hint="use a safetensors version of the model, or download the file again",
        ) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(
            f"truncated or corrupt: {path}",
            found=f"{type(error).__name__}: {brief(error)}",
            hint="download the file again",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"no dictionary of tensors: {path}", found=type(content).__name__)
    return content


def _reason(error: pickle.UnpicklingError) -> str:
    """What the file wanted to run, in torch's long message; else what failed, without the advice to load it anyway."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"the pickle calls {match[1]}"
    failed = re.search(r"WeightsUnpickler error:\s+(.+)", str(error))
    return failed[1] if failed else brief(error)


def is_named_tensor(name: object, value: object) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided


def locate_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, SourceTensor]:
    """`tensors`, as `load_torch_file` read them from `path`, by their place in the file wherever that is known."""
    spans = _mapped_spans(path)
    return {name: _locate(path, tensor.detach(), spans) for name, tensor in tensors.items()}


def _mapped_spans(path: Path) -> list[tuple[int, int, int]]:
    """First address, end address and file offset of each stretch of this process's memory that maps `path`."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():  # Linux has it
        return []
    spans = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5] == os.path.realpath(path):
            first, end = (int(address, 16) for address in fields[0].split("-"))
            spans.append((first, end, int(fields[2], 16)))
    return spans


def _locate(path: Path, tensor: torch.Tensor, spans: list[tuple[int, int, int]]) -> SourceTensor:
    loaded = LoadedTensor(tensor)
    address = tensor.data_ptr()
    for first, end, offset in spans:
        if tensor.is_contiguous() and first <= address < address + tensor.nbytes <= end:
            return FileTensor(path, loaded.shape, loaded.dtype, address - first + offset)
    return loaded
