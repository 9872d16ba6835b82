"""Source tensors that are computed: transposed, put together, put into another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gpt.checkpoint.source import SourceTensor

if TYPE_CHECKING:
    import torch


class DerivedTensor:
    """A source tensor made from whole others when its first rows are asked for, forgotten with its last ones.

    Rows are read in order, which is how gpt.checkpoint.writer reads; a second reader at the same time makes its own
    copy of what it needs (`copy.copy` of the source keeps them apart).  Peak memory is the tensor itself and what
    `compute` needs.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, compute: Callable[[], torch.Tensor]):
        """compute: returns the values in `shape` and in the torch dtype named `dtype`."""
        self.shape = shape
        self.dtype = dtype
        self._compute = compute
        self._values: torch.Tensor | None = None

    def read(self, first: int, last: int) -> torch.Tensor:
        values = self._values  # another reader may forget them meanwhile
        if values is None:
            values = self._compute().reshape(-1, self.shape[-1])
        self._values = None if last == values.shape[0] else values
        return values[first:last]


def read_whole(source: SourceTensor) -> torch.Tensor:
    """All of a source tensor, in its own shape."""
    rows = source.shape[0] if len(source.shape) == 2 else 1
    return source.read(0, rows).reshape(source.shape)


def transposed(source: SourceTensor) -> DerivedTensor:
    """[out, in] as [in, out]."""
    return DerivedTensor(source.shape[::-1], source.dtype, lambda: read_whole(source).t())


def concatenated(sources: Sequence[SourceTensor]) -> DerivedTensor:
    """The sources side by side, along the last axis; all of one dtype."""
    shape = (*sources[0].shape[:-1], sum(source.shape[-1] for source in sources))

    def compute() -> torch.Tensor:
        import torch

        return torch.cat([read_whole(source) for source in sources], dim=-1)

    return DerivedTensor(shape, sources[0].dtype, compute)


def heads_apart(source: SourceTensor, num_heads: int) -> DerivedTensor:
    """A last axis of [heads, 3, D] as [3, heads, D]: what was Q, K, V head by head becomes all Q, all K, all V."""

    def compute() -> torch.Tensor:
        values = read_whole(source)
        by_head = values.reshape(*values.shape[:-1], num_heads, 3, -1)
        return by_head.transpose(-3, -2).reshape(values.shape)

    return DerivedTensor(source.shape, source.dtype, compute)
