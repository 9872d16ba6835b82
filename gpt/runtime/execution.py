"""How steps are executed, whatever they compute: settings of a session.  Without torch, for command lines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """cuda_graphs: whether a GPU replays recorded steps; else the same kernels are launched one by one.

    batch_invariant: what a sequence gets does not depend, to the last bit, on what else is in its batch.  Prompts are
    computed one by one, and decode kernels add in an order that is the same for every number of rows.
    """

    cuda_graphs: bool = True
    batch_invariant: bool = False


DEFAULT_EXECUTION = Execution()
