"""How likely the model finds given texts: the log-probability of each token behind those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt.comm import WAITING
from gpt.runtime.generate import check_finite
from gpt.runtime.limits import check_prompts
from gpt.runtime.logprobs import TokenLogprob, record
from gpt.runtime.session import Session
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens

# Logits of so many bytes are made at a time.
_LOGITS_BYTES = 1 << 28


@dataclass(frozen=True)
class Score:
    """logprobs: of the tokens from the second on, since the first one stands behind nothing."""

    logprobs: tuple[TokenLogprob, ...]

    @property
    def total(self) -> float:
        """The natural logarithm of the text's probability, given its first token."""
        return sum(one.logprob for one in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a text of one token."""
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan


def score(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    virtual: VirtualTokens | None = None,
    num_top_logprobs: int = 0,
    on_score: Callable[[int, Score], None] | None = None,
) -> list[Score]:
    """The score of each prompt, one after the other.  Virtual tokens condition what follows and are not scored.

    on_score: called with each prompt's number and score as they come.

    Among several ranks, what rank 0 was given counts.

    Raises ConfigError for prompts the engine cannot take, and for an engine that only tells the last token's logits;
    GptError where the logits are no numbers.
    """
    session.comm.stage = WAITING
    request = session.comm.broadcast_object((prompts, virtual, num_top_logprobs))
    prompts, virtual, num_top_logprobs = request
    if virtual is not None:
        check_virtual_tokens(session.model, session.build, virtual, len(prompts))
    num_virtual = virtual.num_tokens if virtual is not None else 0
    check_prompts(session.model, session.build, prompts, 0, num_virtual=num_virtual)
    scores: list[Score] = []
    for number, prompt in enumerate(prompts):
        session.comm.stage = f"prompt {number}"
        part = None if virtual is None else virtual.of_prompts([number])
        scores.append(_score(session, prompt, part, num_top_logprobs))
        if on_score is not None:
            on_score(number, scores[-1])
    session.comm.stage = ""
    return scores


def _score(session: Session, prompt: Sequence[int], virtual: VirtualTokens | None, num_top: int) -> Score:
    session.start(1, len(prompt))
    # Virtual tokens are no words: no logit tells how likely one is.
    scored = [place for place in range(1, len(prompt)) if prompt[place] < session.model.vocab_size]
    count = max(1, _LOGITS_BYTES // (4 * session.model.vocab_size))
    logprobs: list[TokenLogprob] = []
    for first in range(0, len(scored), count):
        part = scored[first : first + count]
        logits = session.prompt_logits(prompt, [place - 1 for place in part], virtual)
        check_finite(logits.amax(dim=-1).tolist(), first)
        logprobs += record(logits, [prompt[place] for place in part], num_top)
    return Score(tuple(logprobs))
