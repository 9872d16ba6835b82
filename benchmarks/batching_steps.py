"""What the steps over a paged cache were and took, seen from outside the session."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpt.engine.step import AheadStep, PagedStep
from gpt.runtime.session import PagedRunsAhead, PagedSession

# Rows of a step that are told apart.
_BUCKETS = (64, 128, 192, 256, 512)


@dataclass
class Call:
    """Of the session, for one step or several; a step of prompts and one of those that generate are two calls.

    prompt_tokens: new tokens of sequences with more than one.  rows: sequences with one.  begin: on the host's clock.
    begun, ended: events of a CUDA device around what it does.
    """

    num_steps: int
    prompt_tokens: int
    rows: int
    begin: float
    begun: Any = None
    ended: Any = None
    seconds: float = 0.0

    @property
    def device_s(self) -> float:
        return 0.0 if self.begun is None else self.begun.elapsed_time(self.ended) / 1e3


@dataclass
class StepLog:
    """Listens to a session's paged steps until `end`; each call lasts until the next one, whatever the host does."""

    session: PagedSession
    calls: list[Call] = field(default_factory=list)

    def start(self) -> None:
        session, run_paged = self.session, self.session.run_paged

        def run(step: PagedStep) -> torch.Tensor:
            new = [count for count in step.num_new if count > 1]
            call = self._begin(Call(1, sum(new), len(step.num_new) - len(new), time.perf_counter()))
            logits = run_paged(step)
            self._mark(call)
            return logits

        self._replace("run_paged", run)
        if isinstance(session, PagedRunsAhead):
            run_paged_ahead = session.run_paged_ahead

            def run_ahead(step: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
                call = self._begin(Call(step.num_steps, 0, len(step.ids), time.perf_counter()))
                results = run_paged_ahead(step)
                self._mark(call)
                return results

            self._replace("run_paged_ahead", run_ahead)

    def end(self) -> None:
        now = time.perf_counter()
        for call, following in zip(self.calls, [*self.calls[1:], None], strict=True):
            call.seconds = (now if following is None else following.begin) - call.begin
        for name in ("run_paged", "run_paged_ahead"):
            vars(self.session).pop(name, None)

    def _replace(self, name: str, listener: Callable[..., Any]) -> None:
        setattr(self.session, name, listener)

    def _begin(self, call: Call) -> Call:
        call.begun = self._event()
        self.calls.append(call)
        return call

    def _mark(self, call: Call) -> None:
        call.ended = self._event()

    def _event(self) -> Any:
        if self.session.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def summarize(calls: Sequence[Call]) -> list[dict[str, object]]:
    """A row for each kind of step and number of sequences that generate in it: how many, and what one of them took.

    Kinds: with "prompts", "single" steps of one token per sequence, mostly beside prompts, several "ahead".
    """
    kinds: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        kind = "prompts" if call.prompt_tokens else "ahead" if call.num_steps > 1 else "single"
        bucket = next((size for size in _BUCKETS if call.rows <= size), call.rows)
        kinds.setdefault((kind, bucket), []).append(call)
    rows: list[dict[str, object]] = []
    for (kind, bucket), group in sorted(kinds.items()):
        num_steps = sum(call.num_steps for call in group)
        rows.append(
            {
                "steps": kind,
                "rows_up_to": bucket,
                "count": num_steps,
                "prompt_tokens": round(statistics.mean(call.prompt_tokens for call in group)),
                "rows": round(sum(call.rows * call.num_steps for call in group) / num_steps),
                "ms": round(statistics.median(call.seconds / call.num_steps for call in group) * 1e3, 2),
                "device_ms": round(statistics.median(call.device_s / call.num_steps for call in group) * 1e3, 2),
                "seconds": round(sum(call.seconds for call in group), 3),
                "device_seconds": round(sum(call.device_s for call in group), 3),
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, object]]) -> None:
    lines: list[Iterable[object]] = [*(row.keys() for row in rows[:1]), *(row.values() for row in rows)]
    for line in lines:
        print("  " + "".join(f"{value!s:>15}" for value in line), flush=True)
