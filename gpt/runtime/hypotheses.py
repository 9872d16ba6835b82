"""The books of one beam search: which beams run, which hypotheses are complete, when nothing better can come.

Rules and float32 arithmetic are those of `transformers`' generate, so that scores that almost tie fall the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt.runtime.beam_config import BeamConfig
from gpt.runtime.logprobs import TokenLogprob

# The score of a beam that does not compete.  Finite, since minus infinity would turn into NaN in products and sums.
DEAD = np.float32(-1e9)


@dataclass(frozen=True)
class Candidate:
    """A running beam and one more token.

    beam: number of the beam in its search.  score: sum of the log-probabilities.  ends: whether this token ends the
    text.
    """

    beam: int
    token: int
    score: np.float32
    ends: bool
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Hypothesis:
    """score: as it competes, with the length penalty."""

    tokens: tuple[int, ...]
    score: float
    logprobs: tuple[TokenLogprob, ...] = ()


class BeamSearch:
    """One prompt's search, or one group's of it: `size` beams."""

    def __init__(self, config: BeamConfig, size: int, max_new_tokens: int):
        self._config = config
        self._size = size
        self._max_new_tokens = max_new_tokens
        self.num_new = 0
        self.tokens: list[tuple[int, ...]] = [()] * size
        self.logprobs: list[tuple[TokenLogprob, ...]] = [()] * size
        # All beams are the prompt: only the first one competes, or they would stay alike.
        self.scores = [np.float32(0), *[DEAD] * (size - 1)]
        self.finished: list[Hypothesis] = []
        self.is_done = False

    def step(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Takes the best 2 * size candidates, best first; returns those that the running beams go on as."""
        self.num_new += 1
        self._finish(candidates[: self._size])
        running = [candidate for candidate in candidates if not candidate.ends]
        # Where too few can go on, ended ones fill the rows and cannot win.
        ended = [candidate for candidate in candidates if candidate.ends]
        chosen = (running + ended)[: self._size]
        self.scores = [candidate.score + DEAD if candidate.ends else candidate.score for candidate in chosen]
        self.tokens = [(*self.tokens[candidate.beam], candidate.token) for candidate in chosen]
        self.logprobs = [self._logprobs(candidate) for candidate in chosen]
        self.is_done = not running or not self._can_improve()
        return chosen

    def best(self, count: int) -> list[Hypothesis]:
        return self.finished[:count]

    def _finish(self, candidates: Sequence[Candidate]) -> None:
        """Those of the best that end are complete; the best `size` of all complete ones are kept, best first."""
        divisor = self.num_new**self._config.length_penalty
        new = [
            Hypothesis(
                (*self.tokens[candidate.beam], candidate.token),
                float(candidate.score / np.float32(divisor)),
                self._logprobs(candidate),
            )
            for candidate in candidates
            if candidate.ends
        ]
        self.finished = sorted(self.finished + new, key=lambda one: -one.score)[: self._size]

    def _logprobs(self, candidate: Candidate) -> tuple[TokenLogprob, ...]:
        return () if candidate.logprob is None else (*self.logprobs[candidate.beam], candidate.logprob)

    def _can_improve(self) -> bool:
        config = self._config
        if len(self.finished) < self._size:
            return True
        if config.early_stopping is True:
            return False
        long = config.early_stopping == "never" and config.length_penalty > 0
        length = self._max_new_tokens if long else self.num_new
        possible = self.scores[0] / np.float32(length**config.length_penalty)
        return bool(possible > np.float32(self.finished[-1].score))
