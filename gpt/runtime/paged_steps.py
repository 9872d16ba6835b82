"""From a plan to the step that every rank computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from gpt.dtypes import torch_dtype
from gpt.engine.host_lists import on_device
from gpt.engine.step import AheadStep, PagedStep
from gpt.runtime.scheduler import Part
from gpt.runtime.session import PagedRunsAhead, PagedSession


@dataclass(frozen=True)
class _Work:
    """A PagedStep in numbers of the host.  tasks: of prompt tuning, per sequence."""

    tokens: list[list[int]]
    num_past: list[int]
    tables: list[list[int]]
    wanted: list[int]
    tasks: list[int]


class StepRunner:
    """Among several ranks, the first one calls `run` and at last `end`, the others `follow`."""

    def __init__(self, session: PagedSession, prompt_table: torch.Tensor | None):
        """prompt_table: [tasks, virtual tokens, E]; sequences have tasks then."""
        self._session = session
        self._comm = session.comm
        self._num_done = 0
        self._virtual_per_task = 0
        self._table: torch.Tensor | None = None
        if prompt_table is not None:
            self._virtual_per_task = prompt_table.shape[1]
            self._table = prompt_table.to(session.device, torch_dtype(session.build.dtype)).flatten(0, 1)

    def run(self, parts: Sequence[Part]) -> torch.Tensor:
        """The logits [K, V] that continue sequences: of each part that reaches its end, for its last token and each
        one of its draft."""
        work = _work_of(parts, tasks=self._table is not None)
        self._comm.broadcast_object(work)
        return self._compute(work)

    @property
    def runs_ahead(self) -> bool:
        return isinstance(self._session, PagedRunsAhead)

    def run_ahead(self, parts: Sequence[Part], num_steps: int) -> Iterator[tuple[list[int], list[float]]]:
        """Sequences that are generating go on by themselves: per step their tokens and the tokens' logits.  All steps
        have to be taken from it."""
        sequences = [part.sequence for part in parts]
        work = AheadStep(
            ids=[sequence.tokens[-1] for sequence in sequences],
            num_past=[sequence.table.num_filled for sequence in sequences],
            ends=[sequence.max_len - 1 for sequence in sequences],
            tables=[sequence.table.blocks for sequence in sequences],
            num_steps=num_steps,
        )
        self._comm.broadcast_object(work)
        return self._compute_ahead(work)

    def end(self) -> None:
        self._comm.broadcast_object(None)

    def follow(self) -> None:
        while (work := self._comm.broadcast_object(None)) is not None:
            if isinstance(work, AheadStep):
                list(self._compute_ahead(work))
            else:
                self._compute(work)

    def _compute_ahead(self, work: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
        if not isinstance(self._session, PagedRunsAhead):
            raise TypeError(f"{type(self._session).__name__} does not run ahead")
        self._comm.stage = f"steps from {self._num_done} on"
        self._num_done += work.num_steps
        return self._session.run_paged_ahead(work)

    def _compute(self, work: _Work) -> torch.Tensor:
        self._comm.stage = f"step {self._num_done}"
        self._num_done += 1
        return self._session.run_paged(self._step(work))

    def _step(self, work: _Work) -> PagedStep:
        device = self._session.device
        num_new = tuple(map(len, work.tokens))
        positions = chain.from_iterable(
            range(past, past + count) for past, count in zip(work.num_past, num_new, strict=True)
        )
        width = max(map(len, work.tables))
        first_row = None
        if self._table is not None:
            first_rows = torch.tensor(work.tasks, dtype=torch.int32) * self._virtual_per_task
            first_row = first_rows.repeat_interleave(torch.tensor(num_new)).to(device)
        return PagedStep(
            ids=on_device(list(chain.from_iterable(work.tokens)), device),
            positions=on_device(list(positions), device),
            wanted=on_device(work.wanted, device, torch.int64),
            num_new=num_new,
            num_past=tuple(work.num_past),
            block_table=on_device([table + [0] * (width - len(table)) for table in work.tables], device),
            prompt_table=self._table,
            first_row=first_row,
        )


def _work_of(parts: Sequence[Part], *, tasks: bool) -> _Work:
    tokens: list[list[int]] = []
    wanted: list[int] = []
    starts = accumulate((part.num_new + len(part.draft) for part in parts), initial=0)
    for part, start in zip(parts, starts, strict=False):
        sequence, past = part.sequence, part.sequence.table.num_filled
        tokens.append([*sequence.tokens[past : past + part.num_new], *part.draft])
        if part.reaches_end:
            last = start + part.num_new - 1
            wanted += range(last, last + 1 + len(part.draft))
    return _Work(
        tokens=tokens,
        num_past=[part.sequence.table.num_filled for part in parts],
        tables=[part.sequence.table.blocks for part in parts],
        wanted=wanted,
        tasks=[part.sequence.task or 0 for part in parts] if tasks else [],
    )
