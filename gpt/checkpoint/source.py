"""What a converter needs of a tensor in somebody else's file: shape and dtype first, values a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpt.dtypes import FLOAT_DTYPES, torch_dtype
from gpt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BLOCK_VALUES = 1 << 20


class SourceTensor(Protocol):
    """A tensor in a file.  `dtype` is a torch name, `shape` the file's."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last (excluded) as [rows, columns]; a vector is one row.  Nothing stays in memory here."""
        ...


def equal_values(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two tables of floats hold the same values, whatever their types; a few rows are read at a time."""
    floats = {first.dtype, second.dtype} <= set(FLOAT_DTYPES)
    if not floats or first.shape != second.shape or len(first.shape) != 2 or 0 in first.shape:
        return False
    rows, columns = first.shape
    step = max(1, _BLOCK_VALUES // columns)
    blocks = ((row, min(row + step, rows)) for row in range(0, rows, step))
    return all(bool((first.read(*block) == second.read(*block)).all()) for block in blocks)


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
