"""Summaries of articles by our engine and by Hugging Face, from the same token ids, timed and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.config import BuildConfig, ModelConfig
from gpt.console import progress
from gpt.errors import ConfigError
from gpt.text.dataset import Article
from gpt.text.pipeline import batches, check_vocabulary, without_end
from gpt.text.rouge import Scores, aggregate, score_texts
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation

# 1024 positions of GPT-2 less 100 new tokens and one more, as the original's evaluation has it.
MAX_PROMPT_TOKENS = 923

Generate = Callable[[Sequence[Sequence[int]]], "Generation"]


@dataclass(frozen=True)
class Side:
    """One of the two sides of a comparison: what it is called in the log, and how it continues a batch of prompts."""

    name: str
    label: str
    generate: Generate


@dataclass(frozen=True)
class SideResult:
    """What one side made of all articles, one entry per article, the timings per batch.

    tokens: new ids with the end token where it came.  scores, rouge: per cent.  latency_s: wall time of the calls.
    """

    side: Side
    tokens: list[list[int]]
    texts: list[str]
    scores: list[Scores]
    rouge: Scores
    latency_s: float
    context_ms: list[float]
    step_ms: list[list[float]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences over the time of the calls, prompts included."""
        return self.num_tokens / self.latency_s

    @property
    def ms_per_token(self) -> float | None:
        """Mean time of a generation step, which makes one token per sequence; None where there was none."""
        steps = [ms for batch in self.step_ms for ms in batch]
        return sum(steps) / len(steps) if steps else None


def prompt_text(article: str) -> str:
    """GPT-2's way of asking for a summary."""
    return (article + " TL;DR: ").strip().replace(" n't", "n't")


def max_prompt_tokens(
    output_len: int, model: ModelConfig | None, build: BuildConfig | None, hf_positions: int | None
) -> int:
    """How many tokens of an article every side can take with `output_len` new ones behind them.

    Raises ConfigError naming the limit that leaves no room.
    """
    limits = {"the limit of this evaluation": MAX_PROMPT_TOKENS}
    if build is not None:
        limits[f"the engine's --max_input_len {build.max_input_len}"] = build.max_input_len
        slots = f"the engine's --max_input_len + --max_output_len {build.max_seq_len} less --output_len {output_len}"
        limits[slots] = build.max_seq_len - output_len
    if model is not None and model.learned_positions:
        room = model.n_positions - output_len
        limits[f"the model's {model.n_positions} positions less --output_len {output_len}"] = room
    if hf_positions is not None:
        room = hf_positions - output_len
        limits[f"the Hugging Face model's {hf_positions} positions less --output_len {output_len}"] = room
    reason, limit = min(limits.items(), key=lambda item: item[1])
    if limit < 1:
        raise ConfigError("no room for an article", found=f"{reason}: {limit} tokens", hint="a smaller --output_len")
    return limit


def encode_articles(tokenizer: Tokenizer, articles: Sequence[Article], vocab_size: int, limit: int) -> list[list[int]]:
    """Token ids of each article with the request behind it; of long ones the last `limit`, which hold the request.

    Raises ConfigError for a tokenizer whose ids the model does not have.
    """
    prompts = [tokenizer.encode(prompt_text(article.text))[-limit:] for article in articles]
    check_vocabulary(tokenizer, prompts, vocab_size)
    return prompts


def evaluate(
    side: Side,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    tokenizer: Tokenizer,
    end_id: int | None,
    batch_size: int,
) -> SideResult:
    """Runs all prompts through one side, timing the calls alone, and scores the texts."""
    tokens: list[list[int]] = []
    context_ms: list[float] = []
    step_ms: list[list[float]] = []
    latency = 0.0
    steps = list(batches(prompts, batch_size))
    for _, batch in progress(steps, what=side.name, unit="batch"):
        begin = time.perf_counter()
        result = side.generate(batch)
        latency += time.perf_counter() - begin
        tokens += result.tokens
        context_ms.append(result.context_ms)
        step_ms.append(result.step_ms)
    texts = [tokenizer.decode(without_end(row, end_id)) for row in tokens]
    scores = score_texts(references, texts)
    return SideResult(side, tokens, texts, scores, aggregate(scores), latency, context_ms, step_ms)


def count_identical(results: Sequence[SideResult]) -> int:
    """Articles for which all sides made the same token ids."""
    return sum(all(row == rows[0] for row in rows) for rows in zip(*(result.tokens for result in results), strict=True))
