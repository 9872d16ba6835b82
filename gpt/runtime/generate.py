"""The decoding loop: prompts of token ids in, new token ids and timings out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gpt.comm import WAITING
from gpt.errors import GptError
from gpt.runtime.logprobs import TokenLogprob, record
from gpt.runtime.request import Request
from gpt.runtime.sampling import Sampler
from gpt.runtime.session import RunsAhead, Session


@dataclass
class Generation:
    """What one batch produced.

    tokens: the new tokens of each row, the end token or stop word included where it was generated.  context_ms: the
    prompts' step with the choice of the first token.  step_ms: one value per later token of the batch.  logprobs: of
    the tokens, empty where nobody asked for them.  scores: of hypotheses of a beam search, the best of a prompt first.
    """

    tokens: list[list[int]] = field(default_factory=list)
    context_ms: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.tokens)

    @property
    def total_ms(self) -> float:
        return self.context_ms + sum(self.step_ms)

    def tell_end(
        self,
        row: int,
        on_end: Callable[[int], None] | None,
        on_logprobs: Callable[[int, list[TokenLogprob]], None] | None,
    ) -> None:
        """Of a row that has its last token.  Log-probabilities that somebody takes are kept here no longer: those of
        many prompts need more memory than everything else that is known of them."""
        if on_logprobs is not None and self.logprobs:
            on_logprobs(row, self.logprobs[row])
            self.logprobs[row] = []
        if on_end is not None:
            on_end(row)


def joined(parts: Sequence[Generation]) -> Generation:
    """What several batches produced, one behind the other, as one."""
    whole = Generation()
    for part in parts:
        whole.tokens += part.tokens
        whole.context_ms += part.context_ms
        whole.step_ms += part.step_ms
        whole.logprobs += part.logprobs
        whole.scores += part.scores
    return whole


def generate(
    session: Session,
    request: Request,
    *,
    on_tokens: Callable[[Sequence[int | None]], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    on_logprobs: Callable[[int, list[TokenLogprob]], None] | None = None,
) -> Generation:
    """Continues all prompts together.  Among several ranks, what rank 0 is asked for counts.

    on_tokens: called after each step with one new token per prompt, None for prompts that have ended.
    on_end: called with the number of each row once it has its last token.
    on_logprobs: called before that with (row, log-probabilities of its tokens) where the request asks for them; the
    result then has none.

    Raises ConfigError for prompts the engine cannot take, GptError where the logits are no numbers.
    """
    session.comm.stage = WAITING
    request, has_stops = request.of_first_rank(session.comm)
    request.check(session.model, session.build)
    prompts, max_new_tokens, num_top_logprobs = request.prompts, request.max_new_tokens, request.num_top_logprobs
    sampler = make_sampler(session, request, request.prompts)
    session.start(len(prompts), request.longest)
    if num_top_logprobs is None:
        session.limit_logits(request.sampling.num_candidates)
    rows = _Rows(session, request, has_stops)
    result = Generation(tokens=rows.tokens)
    if num_top_logprobs is not None:
        result.logprobs = [[] for _ in prompts]
    runs_ahead = num_top_logprobs is None and request.sampling.is_memoryless
    ahead: Iterator[tuple[list[int], list[float]]] | None = None
    chosen = torch.empty(0)
    begin = time.perf_counter()
    for step in range(max_new_tokens):
        session.comm.stage = f"new token {step}"
        if step > 0 and ahead is not None:
            tokens, largest = next(ahead)
        else:
            logits = run_context(session, request) if step == 0 else session.generation(chosen)
            values, likeliest = logits.max(dim=-1)
            largest = values.tolist()  # waits for the device
            chosen = likeliest if sampler is None else sampler.choose(logits)
            tokens = chosen.tolist()
        check_finite(largest, step)
        running = list(rows.running)
        new = rows.add(tokens)
        if num_top_logprobs is not None:
            for row, token_record in enumerate(record(logits, chosen, num_top_logprobs)):
                if running[row]:
                    result.logprobs[row].append(token_record)
        ended = [row for row, was in enumerate(running) if was and not rows.running[row]]
        if sampler is not None:
            for row in ended:
                sampler.close(row)
        now = time.perf_counter()
        if step == 0 and max_new_tokens > 1 and isinstance(session, RunsAhead) and runs_ahead:
            draws = None if sampler is None else sampler.draws_ahead(max_new_tokens - 1)
            ahead = session.run_ahead(chosen, max_new_tokens - 1, draws)
        if step == 0:
            result.context_ms = (now - begin) * 1e3
        else:
            result.step_ms.append((now - begin) * 1e3)
        if on_tokens is not None:
            on_tokens(new)
        for row in ended:
            result.tell_end(row, on_end, on_logprobs)
        if not any(rows.running):
            break
        begin = time.perf_counter()
    session.comm.stage = ""
    for row, alive in enumerate(rows.running):
        if alive:
            result.tell_end(row, on_end, on_logprobs)
    return result


class _Rows:
    """The sequences of a batch: their tokens, and which of them still run."""

    def __init__(self, session: Session, request: Request, has_stops: bool):
        """has_stops: whether the first rank has stop words, whatever this one has."""
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.running = [True] * len(request.prompts)
        self._comm = session.comm
        self._end_id = request.end_id
        self._has_stops = has_stops
        stops = request.stops
        self._states = [] if stops is None else [stops.start() for _ in request.prompts]

    def add(self, tokens: Sequence[int]) -> list[int | None]:
        """Takes one token per row; those of the rows that were running, None for the others."""
        new = [token if alive else None for token, alive in zip(tokens, self.running, strict=True)]
        for row, token in enumerate(new):
            if token is not None:
                self.tokens[row].append(token)
                self.running[row] = token != self._end_id
        if self._has_stops:
            for row in self._comm.broadcast_object(self._stopped(new)):
                self.running[row] = False
        return new

    def _stopped(self, new: Sequence[int | None]) -> list[int]:
        """Rows whose stop word came, as this rank's states say: those of the first rank count."""
        pairs = zip(self._states, new, strict=False)
        return [row for row, (state, token) in enumerate(pairs) if token is not None and state.add(token)]


def run_context(session: Session, request: Request) -> torch.Tensor:
    """The prompts' step, with neighbouring rows of one prompt computed once: logits [B, V] of all rows."""
    keys = request.keys
    firsts = [row for row, key in enumerate(keys) if row == 0 or key[0] != keys[row - 1][0]]
    if len(firsts) == len(keys):
        return session.context(request.prompts, request.virtual)
    part = request.of_rows(firsts)
    logits = session.context(part.prompts, part.virtual)
    counts = [after - row for row, after in zip(firsts, [*firsts[1:], len(keys)], strict=True)]
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    session.reorder(sources)
    return logits[sources]


def make_sampler(session: Session, request: Request, prompts: Sequence[Sequence[int]] = ()) -> Sampler | None:
    """None where the largest logit decides.  prompts: of the rows that it knows from the beginning.

    Raises ConfigError for settings that do not fit the model or the length of the output.
    """
    sampling, vocab_size = request.sampling, session.model.vocab_size
    if sampling.is_argmax:
        return None
    sampling.check_fits(vocab_size, request.max_new_tokens)
    return Sampler(
        sampling, prompts, vocab_size=vocab_size, end_id=request.end_id, device=session.device, keys=request.keys
    )


def check_finite(values: Sequence[float], step: int) -> None:
    """The largest logit of a row is NaN or infinite as soon as anything before it overflowed: GptError says so."""
    if not math.isfinite(sum(values)):
        raise GptError(
            "the model computes values that are no numbers",
            found=f"NaN or infinite logits for new token {step}",
            hint="a model trained in bfloat16 overflows in float16: convert and build with --dtype bfloat16 or float32",
        )
