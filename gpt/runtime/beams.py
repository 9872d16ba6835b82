"""Beam search: the decoding loop that follows several hypotheses per prompt.

The prompt is computed once; its beams share it, and a step reorders the cache where beams go on as others.  Scores are
those of `transformers`' generate: log-softmax of the logits, then penalties and blocks, summed up per hypothesis.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpt.comm import WAITING
from gpt.errors import ConfigError, GptError
from gpt.runtime.beam_config import BeamConfig
from gpt.runtime.generate import Generation, check_finite, make_sampler
from gpt.runtime.hypotheses import BeamSearch, Candidate, Hypothesis
from gpt.runtime.logprobs import TokenLogprob, record
from gpt.runtime.request import Request
from gpt.runtime.session import Session
from gpt.runtime.stopping import StopState


def generate_beams(session: Session, request: Request, beams: BeamConfig) -> Generation:
    """The best hypotheses of each prompt: rows p * n to p * n + n - 1 of the result are those of prompt p, best first,
    with n = `beams.num_returned`.

    The request's sampling gives penalties and blocks; it must be greedy.  Among several ranks, what rank 0 was given
    counts.

    Raises ConfigError for what the engine cannot take, GptError where the logits are no numbers or nothing can come.
    """
    session.comm.stage = WAITING
    request, has_stops = request.of_first_rank(session.comm)
    beams = session.comm.broadcast_object(beams)
    request.check(session.model, session.build)
    _check_fits(session, request, beams)
    prompts = request.prompts
    sampler = make_sampler(session, request, prompts)
    session.start(len(prompts) * beams.num_beams, request.longest)
    search = _Searches(session, request, beams, has_stops)
    result = Generation()
    chosen = _Step(torch.empty(0), [])
    begin = time.perf_counter()
    for step in range(request.max_new_tokens):
        session.comm.stage = f"new token {step}"
        logits = session.context(prompts, request.virtual) if step == 0 else session.generation(chosen.tokens)
        check_finite(logits.amax(dim=-1).tolist(), step)
        logprobs = logits.log_softmax(dim=-1)
        scores = logprobs if sampler is None else sampler.process(logprobs, may_block_all=True)
        if step == 0:  # of prompts, not yet of their beams
            first = [row for row in range(len(prompts)) for _ in range(beams.num_beams)]
            session.reorder(first)
            logprobs, scores = logprobs[first], scores[first]
            if sampler is not None:
                sampler.reorder(first)
        chosen = search.step(logprobs, scores)
        done = search.is_done
        if not done:
            session.reorder(chosen.sources)
            if sampler is not None:
                sampler.reorder(chosen.sources)
                sampler.append(chosen.tokens)
        now = time.perf_counter()
        if step == 0:
            result.context_ms = (now - begin) * 1e3
        else:
            result.step_ms.append((now - begin) * 1e3)
        if done:
            break
        begin = time.perf_counter()
    session.comm.stage = ""
    for hypothesis in search.best():
        result.tokens.append(list(hypothesis.tokens))
        result.scores.append(hypothesis.score)
        if request.num_top_logprobs is not None:
            result.logprobs.append(list(hypothesis.logprobs))
    return result


def _check_fits(session: Session, request: Request, beams: BeamConfig) -> None:
    sampling, limit = request.sampling, session.build.max_batch_size
    if not sampling.is_greedy:
        raise ConfigError("beams are searched, not drawn", found=sampling.describe(), hint="--top_k 1 or --num_beams 1")
    beams.check_fits(session.build, session.model.vocab_size)
    if len(request.prompts) > limit:
        raise ConfigError(
            "the request is larger than the engine",
            found=f"{len(request.prompts)} prompts in one batch",
            allowed=f"at most {limit}, the engine's --max_batch_size",
        )


@dataclass
class _Step:
    """What each row takes: a new token [B * K] on the device, behind what row `sources[row]` has."""

    tokens: torch.Tensor
    sources: list[int]


class _Searches:
    """The searches of all prompts and groups: row p * K + g * size + b is beam b of group g of prompt p."""

    def __init__(self, session: Session, request: Request, beams: BeamConfig, has_stops: bool):
        """has_stops: whether the first rank has stop words, whatever this one has."""
        self._session = session
        self._request = request
        self._beams = beams
        self._has_stops = has_stops
        self._num_new = 0
        self._searches = [
            [BeamSearch(beams, beams.group_size, request.max_new_tokens) for _ in range(beams.num_groups)]
            for _ in request.prompts
        ]
        num_rows, stops = len(request.prompts) * beams.num_beams, request.stops
        self._states: list[StopState] = [] if stops is None else [stops.start() for _ in range(num_rows)]

    @property
    def is_done(self) -> bool:
        return all(search.is_done for groups in self._searches for search in groups)

    def best(self) -> list[Hypothesis]:
        """The returned hypotheses of each prompt, whichever group found them."""
        result: list[Hypothesis] = []
        for groups in self._searches:
            found = [one for search in groups for one in search.best(self._beams.group_size)]
            result += sorted(found, key=lambda one: -one.score)[: self._beams.num_returned]
        return result

    def step(self, logprobs: torch.Tensor, scores: torch.Tensor) -> _Step:
        """logprobs, scores [B * K, V]: of the next tokens, before and after penalties and blocks."""
        beams, num_prompts = self._beams, len(self._searches)
        self._num_new += 1
        running = [score for groups in self._searches for search in groups for score in search.scores]
        totals = scores + torch.tensor(running, dtype=torch.float32, device=scores.device)[:, None]
        totals = totals.view(num_prompts, beams.num_groups, beams.group_size, -1)
        tokens, sources = [0] * len(running), list(range(len(running)))
        states = list(self._states)
        taken = totals.new_zeros(num_prompts, 1, totals.shape[-1])  # how often earlier groups took each token
        for group in range(beams.num_groups):
            part = totals[:, group] - beams.diversity_penalty * taken if group else totals[:, group]
            for prompt, candidates in enumerate(self._candidates(part, logprobs, group)):
                if not candidates:
                    continue
                first = prompt * beams.num_beams + group * beams.group_size
                for row, beam in enumerate(self._searches[prompt][group].step(candidates), start=first):
                    tokens[row], sources[row] = beam.token, first + beam.beam
                    if self._states:
                        states[row] = self._states[sources[row]].copy()
                        states[row].add(beam.token)
                    taken[prompt, 0, beam.token] += 1
        self._states = states
        return _Step(torch.tensor(tokens, device=scores.device), sources)

    def _candidates(self, totals: torch.Tensor, logprobs: torch.Tensor, group: int) -> list[list[Candidate]]:
        """totals [B, size, V] of one group -> the best 2 * size continuations of each prompt, best first; none for a
        search that is done."""
        beams, vocab_size = self._beams, totals.shape[-1]
        best, index = totals.flatten(1).topk(2 * beams.group_size, dim=-1)
        values = best.cpu().numpy()
        result: list[list[Candidate]] = []
        for prompt, places in enumerate(index.tolist()):
            search = self._searches[prompt][group]
            if search.is_done:
                result.append([])
                continue
            if values[prompt, 0] == -float("inf"):
                raise GptError(
                    "no token is left to choose",
                    found=f"every continuation of prompt {prompt} of the batch is blocked",
                    hint="a larger --no_repeat_ngram_size, fewer --bad_words, or a smaller --min_length",
                )
            pairs = [divmod(place, vocab_size) for place in places]
            first = prompt * beams.num_beams + group * beams.group_size
            ends = self._ends(first, pairs)
            records = self._records(logprobs, first, pairs)
            rows = zip(pairs, values[prompt], ends, records, strict=True)
            result.append([Candidate(beam, token, *rest) for (beam, token), *rest in rows])
        return result

    def _ends(self, first: int, pairs: Sequence[tuple[int, int]]) -> list[bool]:
        """Which of the (beam, token) end a text: by the end token, a stop word, or the length."""
        if self._num_new == self._request.max_new_tokens:
            return [True] * len(pairs)
        ends = [token == self._request.end_id for _, token in pairs]
        if not self._has_stops:
            return ends
        stopped = [self._states[first + beam].copy().add(token) for beam, token in pairs] if self._states else []
        stopped = self._session.comm.broadcast_object(stopped)
        return [end or stop for end, stop in zip(ends, stopped, strict=True)]

    def _records(
        self, logprobs: torch.Tensor, first: int, pairs: Sequence[tuple[int, int]]
    ) -> Sequence[TokenLogprob | None]:
        if self._request.num_top_logprobs is None:
            return [None] * len(pairs)
        rows, tokens = [first + beam for beam, _ in pairs], [token for _, token in pairs]
        return record(logprobs[rows], tokens, self._request.num_top_logprobs)
