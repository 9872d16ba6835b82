"""The first named tensor in which two executions of one model differ, and how much every one does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

import torch

# Named intermediate results, by the step and the name the network gives them: "context, layers.0.attention".
Trace = Dict[str, torch.Tensor]
_MANY_ROWS = 8


@dataclass(frozen=True)
class Difference:
    """error: relative L2 distance of B from A; infinity where shapes differ or only one has numbers.  moved: how many
    of its rows are further away than `Comparison.row_bound`."""

    name: str
    error: float
    note: str = ""
    moved: int = 0
    num_rows: int = 0

    @property
    def moves_most_rows(self) -> bool:
        return self.num_rows >= _MANY_ROWS and 2 * self.moved > self.num_rows


@dataclass(frozen=True)
class Comparison:
    """differences: in the order of execution.  only_one: names that one side alone has.

    row_bound: where values are rounded to integers, and `bound` allows for what follows from one that goes to another:
    that happens to single rows, so that the first tensor with rows further away than this differs if most are.
    """

    differences: tuple[Difference, ...]
    only_one: tuple[str, ...]
    bound: float
    row_bound: float | None = None

    @property
    def first(self) -> Difference | None:
        """The first tensor that differs."""
        moved = next((difference for difference in self.differences if difference.moved), None)
        if moved is not None and moved.moves_most_rows:
            return moved
        return next((difference for difference in self.differences if difference.error > self.bound), None)

    def lines(self) -> Iterator[str]:
        """A line per tensor, then the verdict."""
        width = max((len(difference.name) for difference in self.differences), default=0)
        for difference in self.differences:
            mark = "  <-- differs" if difference.error > self.bound or difference is self.first else ""
            note = f"  {difference.note}" if difference.note else ""
            yield f"{difference.name:{width}}  {difference.error:.2e}{note}{mark}"
        if self.only_one:
            yield f"not compared, on one side only: {', '.join(self.only_one)}"
        allowed = f"{self.bound:g}"
        if self.row_bound is not None:
            allowed += f", nor first in most rows by more than {self.row_bound:g}"
        if self.first is None:
            yield f"no tensor of {len(self.differences)} differs by more than {allowed} (relative L2)"
        else:
            yield f"first difference: {self.first.name}, {self.first.error:.2e}, allowed {self.bound:g} (relative L2)"


def compare(a: Trace, b: Trace, bound: float, row_bound: float | None = None) -> Comparison:
    """Two traces in A's order; a tensor may have leading dimensions of another shape, [B, S, E] beside [B * S, E]."""
    shared = [name for name in a if name in b]
    only_one = tuple(name for name in (*a, *b) if name not in shared)
    differences = tuple(_difference(name, a[name], b[name], row_bound) for name in shared)
    return Comparison(differences, only_one, bound, row_bound)


def _difference(name: str, a: torch.Tensor, b: torch.Tensor, row_bound: float | None) -> Difference:
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return Difference(name, math.inf, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (x.detach().cpu().double().reshape(-1, x.shape[-1]) for x in (a, b))
    if not (a.isfinite().all() and b.isfinite().all()):
        same = torch.equal(a, b)
        return Difference(name, 0.0 if same else math.inf, "not all of its values are finite")
    distance, size = (a - b).norm().item(), a.norm().item()
    error = distance / size if size > 0 else (math.inf if distance > 0 else 0.0)
    if row_bound is None:
        return Difference(name, error)
    moved = int(((a - b).norm(dim=-1) > row_bound * a.norm(dim=-1)).sum())
    return Difference(name, error, f"in {moved} of {len(a)} rows" if moved else "", moved, len(a))
