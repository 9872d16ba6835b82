"""What sequences over a paged cache have besides their blocks: samplers, stop words, drafts, results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gpt.runtime.generate import Generation, check_finite, make_sampler
from gpt.runtime.logprobs import TokenLogprob, record
from gpt.runtime.prompt_lookup import PromptLookup
from gpt.runtime.request import Request
from gpt.runtime.scheduler import Part, RunningSequence
from gpt.runtime.session import PagedSession
from gpt.runtime.stopping import StopState


@dataclass
class _State:
    """Of a sequence that has begun and not ended."""

    sampler_row: int
    stop: StopState | None
    lookup: PromptLookup


class Rows:
    """The rows of one call, from prompts to results.  Arguments as in `gpt.runtime.batcher.generate_paged`."""

    def __init__(
        self,
        session: PagedSession,
        request: Request,
        *,
        max_draft_len: int,
        on_token: Callable[[int, int], None] | None,
        on_end: Callable[[int], None] | None,
        on_logprobs: Callable[[int, list[TokenLogprob]], None] | None,
    ):
        self.result = Generation(tokens=[[] for _ in request.prompts])
        if request.num_top_logprobs is not None:
            self.result.logprobs = [[] for _ in request.prompts]
        self._request = request
        self._max_draft_len = max_draft_len
        self._on_token = on_token
        self._on_end = on_end
        self._on_logprobs = on_logprobs
        self._states: dict[int, _State] = {}
        self._sampler = make_sampler(session, request)

    def waiting(self) -> Iterator[RunningSequence]:
        """The sequences in order, each made when it is asked for."""
        request = self._request
        tasks = None if request.virtual is None else request.virtual.tasks
        for row, prompt in enumerate(request.prompts):
            sampler_row = -1
            if self._sampler is not None:
                sampler_row = self._sampler.open(prompt, request.keys[row])
            stop = None if request.stops is None else request.stops.start()
            self._states[row] = _State(sampler_row, stop, PromptLookup(self._max_draft_len))
            max_len = len(prompt) + request.max_new_tokens
            yield RunningSequence(row, list(prompt), max_len, None if tasks is None else tasks[row])

    @property
    def takes_likeliest(self) -> bool:
        """Whether a token is the one with the largest logit, and nothing else about the logits is asked for."""
        return self._sampler is None and self._request.num_top_logprobs is None and self._max_draft_len == 0

    def draft(self, sequence: RunningSequence, room: int) -> tuple[int, ...]:
        return self._states[sequence.index].lookup.propose(sequence.tokens, room)

    def advance(self, parts: Sequence[Part], logits: torch.Tensor) -> list[RunningSequence]:
        """Chooses tokens from logits [K, V] as `StepRunner.run` gives them; returns the sequences that have ended.

        A draft's next token counts only where the one before it was chosen.
        """
        values, likeliest = logits.max(dim=-1)
        oldest = self._oldest(part.sequence for part in parts if part.reaches_end)
        check_finite(values.tolist(), oldest)  # waits for the device
        greedy = likeliest.tolist() if self._sampler is None else []
        ended: list[RunningSequence] = []
        going: list[tuple[Part, int]] = []  # a part and its next line of logits
        line = 0
        for part in parts:
            if part.reaches_end:
                going.append((part, line))
                line += 1 + len(part.draft)
        num_right = 0  # tokens of each draft in `going` that were chosen
        while going:
            lines = [line for _, line in going]
            tokens = self._choose(logits, lines, greedy, [part.sequence.index for part, _ in going])
            still: list[tuple[Part, int]] = []
            for (part, line), token in zip(going, tokens, strict=True):
                if self._add(part.sequence, token):
                    ended.append(part.sequence)
                elif num_right < len(part.draft) and part.draft[num_right] == token:
                    still.append((part, line + 1))
                    continue
                if part.draft:
                    self._learn(part, num_right)
            going = still
            num_right += 1
        for sequence in ended:
            self._close(sequence.index)
        return ended

    def take(self, parts: Sequence[Part], tokens: Sequence[int], largest: Sequence[float]) -> list[RunningSequence]:
        """One token of each part, chosen by the device, with its logit; those of sequences that have ended do not
        count.  Returns the sequences that end with it."""
        going = [
            (part.sequence, token, value)
            for part, token, value in zip(parts, tokens, largest, strict=True)
            if part.sequence.index in self._states
        ]
        check_finite([value for _, _, value in going], self._oldest(sequence for sequence, _, _ in going))
        ended = [sequence for sequence, token, _ in going if self._add(sequence, token)]
        for sequence in ended:
            self._close(sequence.index)
        return ended

    def _oldest(self, sequences: Iterable[RunningSequence]) -> int:
        """New tokens of the one that has most."""
        return max((len(self.result.tokens[sequence.index]) for sequence in sequences), default=0)

    def _choose(
        self, logits: torch.Tensor, lines: list[int], greedy: Sequence[int], rows: Sequence[int]
    ) -> Sequence[int]:
        if self._sampler is None:
            tokens = [greedy[line] for line in lines]
        if self._sampler is not None or self._request.num_top_logprobs is not None:
            used = logits if len(lines) == len(logits) else logits[lines]
        if self._sampler is not None:
            tokens = self._sampler.choose(used, [self._states[row].sampler_row for row in rows]).tolist()
        if self._request.num_top_logprobs is not None:
            for row, entry in zip(rows, record(used, tokens, self._request.num_top_logprobs), strict=True):
                self.result.logprobs[row].append(entry)
        return tokens

    def _add(self, sequence: RunningSequence, token: int) -> bool:
        """Takes a sequence's next token; whether it was the last."""
        sequence.tokens.append(token)
        row = sequence.index
        self.result.tokens[row].append(token)
        if self._on_token is not None:
            self._on_token(row, token)
        stop = self._states[row].stop
        stopped = stop is not None and stop.add(token)
        return stopped or token == self._request.end_id or len(sequence.tokens) == sequence.max_len

    def _learn(self, part: Part, num_right: int) -> None:
        self._states[part.sequence.index].lookup.learn(len(part.draft), num_right)

    def _close(self, row: int) -> None:
        state = self._states.pop(row)
        if self._sampler is not None:
            self._sampler.close(state.sampler_row)
        self.result.tell_end(row, self._on_end, self._on_logprobs)

    def count_time(self, begin: float, *, context: bool) -> float:
        """Of a step that began at `begin` on time.perf_counter and ends now, which is returned."""
        now = time.perf_counter()
        if context:
            self.result.context_ms += (now - begin) * 1e3
        else:
            self.result.step_ms.append((now - begin) * 1e3)
        return now
