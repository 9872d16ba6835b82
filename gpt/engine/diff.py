"""The first named tensor in which two executions of one model differ, and how much every one does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

import torch

# Named intermediate results, by the step and the name the network gives them: "context, layers.0.attention".
Trace = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """error: relative L2 distance of B from A; infinity where shapes differ or only one has numbers."""

    name: str
    error: float
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """differences: in the order of execution.  only_one: names that one side alone has."""

    differences: tuple[Difference, ...]
    only_one: tuple[str, ...]
    bound: float

    @property
    def first(self) -> Difference | None:
        """The first tensor above the bound."""
        return next((difference for difference in self.differences if difference.error > self.bound), None)

    def lines(self) -> Iterator[str]:
        """A line per tensor, then the verdict."""
        width = max((len(difference.name) for difference in self.differences), default=0)
        for difference in self.differences:
            mark = "  <-- differs" if difference.error > self.bound else ""
            note = f"  {difference.note}" if difference.note else ""
            yield f"{difference.name:{width}}  {difference.error:.2e}{note}{mark}"
        if self.only_one:
            yield f"not compared, on one side only: {', '.join(self.only_one)}"
        if self.first is None:
            yield f"no tensor of {len(self.differences)} differs by more than {self.bound:g} (relative L2)"
        else:
            yield f"first difference: {self.first.name}, {self.first.error:.2e}, allowed {self.bound:g} (relative L2)"


def compare(a: Trace, b: Trace, bound: float) -> Comparison:
    """Two traces in A's order; a tensor may have leading dimensions of another shape, [B, S, E] beside [B * S, E]."""
    shared = [name for name in a if name in b]
    only_one = tuple(name for name in (*a, *b) if name not in shared)
    return Comparison(tuple(_difference(name, a[name], b[name]) for name in shared), only_one, bound)


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return Difference(name, math.inf, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (x.detach().cpu().double().flatten() for x in (a, b))
    if not (a.isfinite().all() and b.isfinite().all()):
        same = torch.equal(a, b)
        return Difference(name, 0.0 if same else math.inf, "not all of its values are finite")
    distance, size = (a - b).norm().item(), a.norm().item()
    return Difference(name, distance / size if size > 0 else (math.inf if distance > 0 else 0.0))
