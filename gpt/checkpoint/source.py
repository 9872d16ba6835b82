"""What a converter needs of a tensor in somebody else's file: shape and dtype first, values a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpt.dtypes import torch_dtype
from gpt.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class SourceTensor(Protocol):
    """A tensor in a file.  `dtype` is a torch name, `shape` the file's."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last (excluded) as [rows, columns]; a vector is one row.  Nothing stays in memory here."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose values lie in C order at `offset` bytes in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int  # bytes from the start of the file

    def read(self, first: int, last: int) -> torch.Tensor:
        import numpy as np
        import torch

        dtype = torch_dtype(self.dtype)
        columns = self.shape[-1]
        row_bytes = columns * dtype.itemsize
        count = (last - first) * row_bytes
        data = np.fromfile(self.path, dtype=np.uint8, count=count, offset=self.offset + first * row_bytes)
        if data.size != count:
            raise CheckpointError(f"the file became shorter while it was read: {self.path}")
        return torch.from_numpy(data).view(dtype).view(last - first, columns)
