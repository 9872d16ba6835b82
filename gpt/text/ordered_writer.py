"""Results of many prompts, put into the order of the input and written as soon as everything before them is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpt.console import progress
from gpt.text.result_file import ResultFile

if TYPE_CHECKING:
    from gpt.runtime.logprobs import TokenLogprob
    from gpt.text.run_job import Job


@dataclass
class Output:
    """One of the texts of a prompt.  logprobs: of its tokens where they are asked for.  score: of a beam."""

    tokens: list[int] = field(default_factory=list)
    logprobs: Sequence[TokenLogprob] = ()
    score: float | None = None


class OrderedWriter:
    """Only the first rank has a file.  What is written is let go."""

    def __init__(self, job: Job, file: ResultFile | None, num_done: int):
        self.num_done = num_done
        self.outputs: list[Output] = []
        self._job = job
        self._file = file
        self._pending: Sequence[int] = ()
        self._count = job.config.decoding.num_results
        self._missing: dict[int, int] = {}
        self._ready: dict[int, list[Output]] = {index: [] for index in job.problems if index >= num_done}
        self._bar = progress(
            total=len(job.rows), what="Prompts", unit="prompt", initial=num_done, always=file is not None
        )

    def begin(self, pending: Sequence[int]) -> None:
        """pending: the index of each prompt that is computed; `count` rows each are told of by `add` and `end`."""
        self._pending = pending
        self.outputs = [Output() for _ in range(len(pending) * self._count)]
        self._missing = dict.fromkeys(range(len(pending)), self._count)
        self._bar.update(len(self._ready))
        self._write()

    def add(self, row: int, token: int) -> None:
        self.outputs[row].tokens.append(token)

    def add_logprobs(self, row: int, logprobs: Sequence[TokenLogprob]) -> None:
        self.outputs[row].logprobs = logprobs

    def end(self, row: int) -> None:
        place = row // self._count
        self._missing[place] -= 1
        if self._missing[place] == 0:
            first = place * self._count
            self._ready[self._pending[place]] = self.outputs[first : first + self._count]
            self.outputs[first : first + self._count] = [Output() for _ in range(self._count)]
            self._bar.update()
            self._write()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        records = []
        while self.num_done in self._ready:
            records.append(self._job.record(self.num_done, self._ready.pop(self.num_done)))
            self.num_done += 1
        if records and self._file is not None:
            self._file.append(records)
