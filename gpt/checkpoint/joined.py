"""Source tensors made of parts, for converters of models that several ranks saved.

A part of a linear weight is [out, in], the layout has [in, out].  Turning it needs all of it, so a joined weight is in
memory whole while it is written, and beside it a few MiB of a part.  Tables pass through row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.checkpoint.derived import DerivedTensor
from gpt.checkpoint.source import SourceTensor
from gpt.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Stacked:
    """Tables below one another."""

    parts: Sequence[SourceTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read(self, first: int, last: int) -> torch.Tensor:
        import torch

        blocks, start = [], 0
        for part in self.parts:
            begin, end = max(first - start, 0), min(last - start, part.shape[0])
            if begin < end:
                blocks.append(part.read(begin, end))
            start += part.shape[0]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


@dataclass(frozen=True)
class PlusOne:
    """1 + w, the sum taken in float32 whatever dtype w is stored in."""

    weight: SourceTensor
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.weight.read(first, last).float() + 1.0


def joined_inputs(shape: tuple[int, ...], parts: Sequence[SourceTensor]) -> DerivedTensor:
    """[in, out] from [out, in/R] of each rank."""

    def join() -> torch.Tensor:
        whole = _empty(shape, parts)
        for own_rows, part in zip(whole.chunk(len(parts)), parts, strict=True):
            for first, block in _blocks(part, 0, part.shape[0]):
                own_rows[:, first : first + len(block)] = block.t()
        return whole

    return DerivedTensor(shape, parts[0].dtype, join)


def joined_outputs(
    shape: tuple[int, ...], parts: Sequence[SourceTensor], first: int, last: int, columns: torch.Tensor | None = None
) -> DerivedTensor:
    """[in, out] from rows `first` to `last` (excluded) of [out/R, in] of each rank, or [out] from [out/R].

    `columns`, if given, is where each of these rows goes, the ranks' rows numbered one after the other.
    """

    def join() -> torch.Tensor:
        whole = _empty(shape, parts)
        position = 0
        for part in parts:
            for _, block in _blocks(part, first, last):
                place = slice(position, position + len(block))
                whole[:, place if columns is None else columns[place]] = block.t()
                position += len(block)
        return whole

    return DerivedTensor(shape, parts[0].dtype, join)


def _empty(shape: tuple[int, ...], parts: Sequence[SourceTensor]) -> torch.Tensor:
    import torch

    return torch.empty(shape if len(shape) == 2 else (1, *shape), dtype=torch_dtype(parts[0].dtype))


def _blocks(part: SourceTensor, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a matrix, a few MiB at a time, each block with the number of its first row; a vector is one column."""
    if len(part.shape) == 1:
        yield first, part.read(0, 1)[:, first:last].t()
        return
    step = max(1, _BLOCK_ELEMENTS // part.shape[1])
    for start in range(first, last, step):
        yield start, part.read(start, min(start + step, last))
