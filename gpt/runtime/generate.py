"""The decoding loop: prompts of token ids in, new token ids and timings out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gpt.errors import ConfigError, GptError
from gpt.runtime.limits import check_prompts
from gpt.runtime.sampling import Sampler, SamplingConfig
from gpt.runtime.session import Session
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens


@dataclass
class Generation:
    """What one batch produced.

    tokens: the new tokens of each prompt, the end token included where it was generated.  context_ms: the prompts' step
    with the choice of the first token.  step_ms: one value per later token of the batch.
    """

    tokens: list[list[int]] = field(default_factory=list)
    context_ms: float = 0.0
    step_ms: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.tokens)

    @property
    def total_ms(self) -> float:
        return self.context_ms + sum(self.step_ms)


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_id: int | None,
    on_tokens: Callable[[Sequence[int | None]], None] | None = None,
    virtual: VirtualTokens | None = None,
    sampling: SamplingConfig | None = None,
    first_row: int = 0,
) -> Generation:
    """Continues each prompt until `end_id` or `max_new_tokens`.

    Among several ranks, what rank 0 was given counts: all arguments but `on_tokens`.

    virtual: the embeddings behind token ids V and above, for engines built for prompt tuning.

    on_tokens: called after each step with one new token per prompt, None for prompts that have ended.

    sampling: how tokens are chosen, greedily for None.  first_row: index of the first prompt in the whole input, which
    together with the seed decides what is drawn.

    Raises ConfigError for prompts the engine cannot take, GptError where the logits are no numbers.
    """
    session.comm.stage = "waiting for prompts"
    if sampling is not None:
        sampling = sampling.with_seed()
    request = (prompts, max_new_tokens, end_id, virtual, sampling, first_row)
    prompts, max_new_tokens, end_id, virtual, sampling, first_row = session.comm.broadcast_object(request)
    if max_new_tokens < 1:
        raise ConfigError("nothing to generate", found=f"{max_new_tokens} new tokens", allowed="at least 1")
    if virtual is not None:
        check_virtual_tokens(session.model, session.build, virtual, len(prompts))
    num_virtual = virtual.num_tokens if virtual is not None else 0
    check_prompts(session.model, session.build, prompts, max_new_tokens, num_virtual=num_virtual)
    sampler = _make_sampler(session, prompts, max_new_tokens, end_id, sampling, first_row)
    longest = max(len(prompt) for prompt in prompts)
    session.start(len(prompts), longest + max_new_tokens)
    session.limit_logits(1 if sampling is None else sampling.num_candidates)
    result = Generation(tokens=[[] for _ in prompts])
    running = [True] * len(prompts)
    chosen = torch.empty(0)
    begin = time.perf_counter()
    for step in range(max_new_tokens):
        session.comm.stage = f"new token {step}"
        logits = session.context(prompts, virtual) if step == 0 else session.generation(chosen)
        values, likeliest = logits.max(dim=-1)
        _check_finite(values, step)  # waits for the device
        chosen = likeliest if sampler is None else sampler.choose(logits)
        tokens = chosen.tolist()
        new: list[int | None] = [token if alive else None for token, alive in zip(tokens, running, strict=True)]
        for row, token in enumerate(new):
            if token is not None:
                result.tokens[row].append(token)
                running[row] = token != end_id
        now = time.perf_counter()
        if step == 0:
            result.context_ms = (now - begin) * 1e3
        else:
            result.step_ms.append((now - begin) * 1e3)
        if on_tokens is not None:
            on_tokens(new)
        if not any(running):
            break
        begin = time.perf_counter()
    return result


def _make_sampler(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_id: int | None,
    sampling: SamplingConfig | None,
    first_row: int,
) -> Sampler | None:
    """None where the largest logit decides."""
    if sampling is None or sampling.is_argmax:
        return None
    vocab_size = session.model.vocab_size
    sampling.check_fits(vocab_size, max_new_tokens)
    return Sampler(sampling, prompts, vocab_size=vocab_size, end_id=end_id, device=session.device, first_row=first_row)


def _check_finite(values: torch.Tensor, step: int) -> None:
    """The largest logit of a row is NaN or infinite as soon as anything before it overflowed."""
    if not math.isfinite(sum(values.tolist())):
        raise GptError(
            "the model computes values that are no numbers",
            found=f"NaN or infinite logits for new token {step}",
            hint="a model trained in bfloat16 overflows in float16: convert and build with --dtype bfloat16 or float32",
        )
