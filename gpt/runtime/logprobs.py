"""Log-probabilities of tokens as the model gives them, before penalties, blocks and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms.  top: (token, log-probability) of the likeliest ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def record(logits: torch.Tensor, chosen: torch.Tensor | Sequence[int], num_top: int = 0) -> list[TokenLogprob]:
    """Logits [K, V] as the model made them, ids [K] -> one record per line, with the `num_top` likeliest tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    index = torch.as_tensor(chosen, device=logprobs.device, dtype=torch.int64)
    values = logprobs.gather(1, index[:, None])[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprob(value) for value in values]
    best, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    tops = [tuple(zip(*line, strict=True)) for line in zip(ids.tolist(), best.tolist(), strict=True)]
    return [TokenLogprob(value, top) for value, top in zip(values, tops, strict=True)]
