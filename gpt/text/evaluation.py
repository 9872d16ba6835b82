"""Texts continued by our engine and by Hugging Face from the same token ids, timed and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpt.config import BuildConfig, ModelConfig
from gpt.console import progress
from gpt.errors import ConfigError
from gpt.text.dataset import CNN_DAILYMAIL, HUMANEVAL, Article, HubData
from gpt.text.pipeline import batches, check_vocabulary
from gpt.text.rouge import Scores, aggregate, score_texts
from gpt.text.run_results import final_text
from gpt.text.stop_words import StopWords
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation

# 1024 positions of GPT-2 less 100 new tokens and one more, as the original's evaluation has it.
MAX_PROMPT_TOKENS = 923


class Generate(Protocol):
    """Continues a batch of prompts, of which the first has index `first_row` among all."""

    def __call__(self, prompts: Sequence[Sequence[int]], /, *, first_row: int) -> Generation: ...


def prompt_text(article: str) -> str:
    """GPT-2's way of asking for a summary."""
    return (article + " TL;DR: ").strip().replace(" n't", "n't")


def function_part(code: str) -> str:
    """What still belongs to the function that a prompt began: all before the second or a later line in column 0.

    A model goes on with the next function when one is complete; a reference does not.
    """
    lines = code.splitlines(keepends=True)
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() and not line[0].isspace():
            return "".join(lines[:number])
    return code


def first_line(code: str) -> str:
    """The first line that is not blank, without the blanks around it."""
    return next((line.strip() for line in code.splitlines() if line.strip()), "")


@dataclass(frozen=True)
class Task:
    """What --eval_type asks of a model and how the answers are scored.

    data: where texts come from if no path is given.  prompt: text -> prompt.  scored: reference or output -> the part
    that is compared.  compares_first_line: whether equal first lines are counted.  measured: said beside the results.
    """

    title: str
    noun: str
    output_noun: str
    data: HubData
    prompt: Callable[[str], str]
    scored: Callable[[str], str]
    compares_first_line: bool
    measured: str

    def count(self, number: int) -> str:
        return f"{number} {self.noun}{'s' * (number != 1)}"


TASKS = {
    "summarize": Task(
        title="Summaries",
        noun="article",
        output_noun="summaries",
        data=CNN_DAILYMAIL,
        prompt=prompt_text,
        scored=str,
        compares_first_line=False,
        measured="words shared with the reference summary (ROUGE)",
    ),
    "code_completion": Task(
        title="Code completions",
        noun="prompt",
        output_noun="completions",
        data=HUMANEVAL,
        prompt=str,
        scored=function_part,
        compares_first_line=True,
        measured="text shared with the reference solution (ROUGE over words and numbers, equal first lines), up to the "
        "end of the function; no code is executed, so this is not a rate of working solutions",
    ),
}


@dataclass(frozen=True)
class Side:
    """One of the two sides of a comparison: what it is called in the log, and how it continues a batch of prompts, with
    `num_results` rows for each of them, the best first; noun: what the log calls those."""

    name: str
    label: str
    generate: Generate
    num_results: int = 1
    noun: str = "beam"


@dataclass(frozen=True)
class SideResult:
    """What one side made of all articles, one entry per article, the timings per batch.

    tokens: new ids with the end token where it came.  texts: the parts that are scored.  scores, rouge: per cent.
    latency_s: wall time of the calls.  same_first_line: None where the task does not compare first lines.  Of several
    results per article, all this is about the first; others: ROUGE of each of the others.
    """

    side: Side
    tokens: list[list[int]]
    texts: list[str]
    scores: list[Scores]
    rouge: Scores
    latency_s: float
    context_ms: list[float]
    step_ms: list[list[float]]
    same_first_line: list[bool] | None = None
    others: tuple[Scores, ...] = ()

    @property
    def first_line_percent(self) -> float | None:
        rows = self.same_first_line
        return None if rows is None else 100 * sum(rows) / len(rows)

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


def encode_articles(
    tokenizer: Tokenizer,
    articles: Sequence[Article],
    vocab_size: int,
    limit: int,
    to_prompt: Callable[[str], str] = prompt_text,
) -> list[list[int]]:
    """Token ids of each article's prompt; of long ones the last `limit`, which hold the request for a summary.

    Raises ConfigError for a tokenizer whose ids the model does not have.
    """
    prompts = [tokenizer.encode(to_prompt(article.text))[-limit:] for article in articles]
    check_vocabulary(tokenizer, prompts, vocab_size)
    return prompts


def evaluate(
    side: Side,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    tokenizer: Tokenizer,
    end_id: int | None,
    batch_size: int,
    task: Task,
    stops: StopWords | None = None,
) -> SideResult:
    """Runs all prompts through one side, timing the calls alone, and scores what `task` compares of the texts: they
    end before `stops`."""
    tokens: list[list[int]] = []
    context_ms: list[float] = []
    step_ms: list[list[float]] = []
    latency = 0.0
    steps = list(batches(prompts, batch_size))
    for first_row, batch in progress(steps, what=side.name, unit="batch"):
        begin = time.perf_counter()
        result = side.generate(batch, first_row=first_row)
        latency += time.perf_counter() - begin
        tokens += result.tokens
        context_ms.append(result.context_ms)
        step_ms.append(result.step_ms)
    scored = [task.scored(reference) for reference in references]
    outputs = [task.scored(final_text(row, tokenizer, end_id, stops, skip_special=True)) for row in tokens]
    tokens, texts = tokens[:: side.num_results], outputs[:: side.num_results]
    scores = score_texts(scored, texts)
    others = tuple(
        aggregate(score_texts(scored, outputs[number :: side.num_results])) for number in range(1, side.num_results)
    )
    same = None
    if task.compares_first_line:
        same = [first_line(text) == first_line(reference) for text, reference in zip(texts, references, strict=True)]
    return SideResult(side, tokens, texts, scores, aggregate(scores), latency, context_ms, step_ms, same, others)


def count_identical(results: Sequence[SideResult]) -> int:
    """Articles for which all sides made the same token ids."""
    return sum(all(row == rows[0] for row in rows) for rows in zip(*(result.tokens for result in results), strict=True))
