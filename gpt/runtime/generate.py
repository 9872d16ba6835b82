"""The decoding loop: prompts of token ids in, new token ids and timings out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gpt.comm import WAITING
from gpt.errors import ConfigError, GptError
from gpt.runtime.limits import check_prompts
from gpt.runtime.logprobs import TokenLogprob, record
from gpt.runtime.sampling import Sampler
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.session import RunsAhead, Session
from gpt.runtime.stopping import Stops
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens


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
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_id: int | None,
    on_tokens: Callable[[Sequence[int | None]], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    virtual: VirtualTokens | None = None,
    sampling: SamplingConfig | None = None,
    keys: Sequence[tuple[int, ...]] | None = None,
    stops: Stops | None = None,
    num_top_logprobs: int | None = None,
) -> Generation:
    """Continues each prompt until `end_id`, a stop word or `max_new_tokens`.

    Among several ranks, what rank 0 was given counts: all arguments but `on_tokens` and `on_end`.

    virtual: the embeddings behind token ids V and above, for engines built for prompt tuning.

    on_tokens: called after each step with one new token per prompt, None for prompts that have ended.
    on_end: called with the number of each row once it has its last token.

    sampling: how tokens are chosen, greedily for None.  keys: (index of the prompt, number of the sample) of each row,
    which together with the seed decide what is drawn; neighbouring rows may be samples of one prompt, which is then
    computed once.

    stops: what ends a row besides `end_id`.  num_top_logprobs: asks for the tokens' log-probabilities, with those of so
    many of the likeliest tokens.

    Raises ConfigError for prompts the engine cannot take, GptError where the logits are no numbers.
    """
    session.comm.stage = WAITING
    if sampling is not None:
        sampling = sampling.with_seed()
    keys = [(row,) for row in range(len(prompts))] if keys is None else list(keys)
    request = (prompts, max_new_tokens, end_id, virtual, sampling, keys, stops is not None, num_top_logprobs)
    request = session.comm.broadcast_object(request)
    prompts, max_new_tokens, end_id, virtual, sampling, keys, has_stops, num_top_logprobs = request
    check_request(session, prompts, max_new_tokens, virtual)
    sampler = _make_sampler(session, prompts, max_new_tokens, end_id, sampling, keys)
    session.start(len(prompts), max(map(len, prompts)) + max_new_tokens)
    if num_top_logprobs is None:
        session.limit_logits(1 if sampling is None else sampling.num_candidates)
    rows = _Rows(session, len(prompts), end_id, stops, has_stops)
    result = Generation(tokens=rows.tokens)
    if num_top_logprobs is not None:
        result.logprobs = [[] for _ in prompts]
    runs_ahead = num_top_logprobs is None and (sampling is None or sampling.is_memoryless)
    ahead: Iterator[tuple[list[int], list[float]]] | None = None
    chosen = torch.empty(0)
    begin = time.perf_counter()
    for step in range(max_new_tokens):
        session.comm.stage = f"new token {step}"
        if step > 0 and ahead is not None:
            tokens, largest = next(ahead)
        else:
            logits = run_context(session, prompts, keys, virtual) if step == 0 else session.generation(chosen)
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
            if on_end is not None:
                on_end(row)
        if not any(rows.running):
            break
        begin = time.perf_counter()
    session.comm.stage = ""
    for row, alive in enumerate(rows.running):
        if alive and on_end is not None:
            on_end(row)
    return result


class _Rows:
    """The sequences of a batch: their tokens, and which of them still run."""

    def __init__(self, session: Session, num_rows: int, end_id: int | None, stops: Stops | None, has_stops: bool):
        """has_stops: whether the first rank has stop words, whatever this one has."""
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.running = [True] * num_rows
        self._comm = session.comm
        self._end_id = end_id
        self._has_stops = has_stops
        self._states = [] if stops is None else [stops.start() for _ in range(num_rows)]

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


def check_request(
    session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, virtual: VirtualTokens | None
) -> None:
    """Raises ConfigError for what the engine cannot take."""
    if max_new_tokens < 1:
        raise ConfigError("nothing to generate", found=f"{max_new_tokens} new tokens", allowed="at least 1")
    if virtual is not None:
        check_virtual_tokens(session.model, session.build, virtual, len(prompts))
    num_virtual = virtual.num_tokens if virtual is not None else 0
    check_prompts(session.model, session.build, prompts, max_new_tokens, num_virtual=num_virtual)


def run_context(
    session: Session,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, ...]],
    virtual: VirtualTokens | None,
) -> torch.Tensor:
    """The prompts' step, with neighbouring rows of one prompt computed once: logits [B, V] of all rows."""
    firsts = [row for row, key in enumerate(keys) if row == 0 or key[0] != keys[row - 1][0]]
    if len(firsts) == len(keys):
        return session.context(prompts, virtual)
    part = None if virtual is None else virtual.of_prompts(firsts)
    logits = session.context([prompts[row] for row in firsts], part)
    counts = [after - row for row, after in zip(firsts, [*firsts[1:], len(keys)], strict=True)]
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    session.reorder(sources)
    return logits[sources]


def _make_sampler(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_id: int | None,
    sampling: SamplingConfig | None,
    keys: Sequence[tuple[int, ...]],
) -> Sampler | None:
    """None where the largest logit decides."""
    if sampling is None or sampling.is_argmax:
        return None
    vocab_size = session.model.vocab_size
    sampling.check_fits(vocab_size, max_new_tokens)
    return Sampler(sampling, prompts, vocab_size=vocab_size, end_id=end_id, device=session.device, keys=keys)


def check_finite(values: Sequence[float], step: int) -> None:
    """The largest logit of a row is NaN or infinite as soon as anything before it overflowed: GptError says so."""
    if not math.isfinite(sum(values)):
        raise GptError(
            "the model computes values that are no numbers",
            found=f"NaN or infinite logits for new token {step}",
            hint="a model trained in bfloat16 overflows in float16: convert and build with --dtype bfloat16 or float32",
        )
