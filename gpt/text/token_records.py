"""Tokens and their log-probabilities as objects of a .jsonl file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.logprobs import TokenLogprob


def describe_token(token: int, one: TokenLogprob | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """id; text where there is a tokenizer; logprob and, where asked for, top: the likeliest tokens in the same form."""
    result = _name(token, tokenizer)
    if one is not None:
        result["logprob"] = one.logprob
        if one.top:
            result["top"] = [{**_name(other, tokenizer), "logprob": logprob} for other, logprob in one.top]
    return result


def describe_output(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprob], score: float | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """score: of a beam.  total: the natural logarithm of the whole text's probability.  tokens: see above."""
    return {
        **({} if score is None else {"score": score}),
        "total": sum(one.logprob for one in logprobs),
        "tokens": [describe_token(token, one, tokenizer) for token, one in zip(tokens, logprobs, strict=True)],
    }


def _name(token: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"id": token}
    return {"id": token, "text": tokenizer.decode([token], skip_special=False)}
