"""One HTML page that a person can read: what was compared, how good and how fast it is, what was made of every text."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.text.evaluation import SideResult, count_identical
from gpt.text.plots import plot_scores, plot_step_times
from gpt.text.rouge import ROUGE_KEYS

if TYPE_CHECKING:
    from gpt.text.comparison import Comparison

_STYLE_SHEET = Path(__file__).with_name("report.css")
# Longer articles are folded, with this many characters to be seen.
_FOLD = 420
_PACKAGES = ("torch", "transformers", "tokenizers", "rouge_score")
_SERIES_CLASSES = ("first", "second")


def render(comparison: Comparison) -> str:
    """The page as a string: no scripts, nothing loaded from elsewhere, everything from outside escaped."""
    task = comparison.config.task
    title = f"{task.title}: " + " and ".join(result.side.name for result in comparison.results)
    articles = "\n".join(_article(comparison, number) for number in range(len(comparison.articles)))
    results = comparison.results
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE_SHEET.read_text(encoding="utf-8")}</style>
</head>
<body>
<main class="{comparison.config.eval_type}">
<h1>{escape(title)}</h1>
<p class="verdict soft">{_verdict(comparison)}</p>
<p class="soft small">Measured: {escape(task.measured)}.</p>
<div class="card">{_numbers(results)}</div>
<h2>Distribution and time</h2>
<div class="plots">
<figure class="card"><figcaption>ROUGE-1 per {task.noun}</figcaption>{plot_scores(results)}</figure>
<figure class="card"><figcaption>Time per new token</figcaption>{plot_step_times(results)}</figure>
</div>
<h2>Conditions</h2>
<div class="card">{_conditions(comparison)}</div>
<h2>{task.noun.capitalize()}s</h2>
{_legend(comparison)}
{articles}
</main>
</body>
</html>
"""


def _verdict(comparison: Comparison) -> str:
    results = comparison.results
    counted = comparison.config.task.count(len(comparison.articles))
    if len(results) == 1:
        return f"{counted}, ROUGE-1 {results[0].rouge['rouge1']:.2f}."
    difference = results[0].rouge["rouge1"] - results[1].rouge["rouge1"]
    speed = results[0].tokens_per_second / results[1].tokens_per_second
    identical = count_identical(results)
    return (
        f"{counted}: identical token ids for {identical}, ROUGE-1 differs by {difference:+.3f}, "
        f"{speed:.2f} times the tokens per second."
    )


def _numbers(results: Sequence[SideResult]) -> str:
    rows: list[tuple[str, list[float | None], int]] = [
        (f"ROUGE-{key.removeprefix('rouge')}", [result.rouge[key] for result in results], 3) for key in ROUGE_KEYS
    ]
    if any(result.same_first_line is not None for result in results):
        rows.append(("equal first lines, %", [result.first_line_percent for result in results], 1))
    rows += [
        ("tokens per second", [result.tokens_per_second for result in results], 1),
        ("ms per token", [result.ms_per_token for result in results], 3),
        ("ms per prompt batch", [sum(result.context_ms) / len(result.context_ms) for result in results], 3),
        ("new tokens", [result.num_tokens for result in results], 0),
        ("total latency, s", [result.latency_s for result in results], 3),
    ]
    head = "".join(f"<th>{_dot(index)}{escape(result.side.name)}</th>" for index, result in enumerate(results))
    if len(results) == 2:
        head += "<th>difference</th>"
    body = "\n".join(_number_row(name, values, digits) for name, values, digits in rows)
    return f'<table class="numbers"><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _number_row(name: str, values: Sequence[float | None], digits: int) -> str:
    cells = ["-" if value is None else f"{value:,.{digits}f}" for value in values]
    if len(values) == 2:
        first, second = values
        cells.append("-" if first is None or second is None else f"{first - second:+,.{digits}f}")
    return f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _conditions(comparison: Comparison) -> str:
    config = comparison.config
    rows = [("Made", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))]
    if comparison.engine is not None and config.test_engine:
        rows.append(("Engine", f"{config.engine_dir}: {comparison.engine.describe()}"))
    if config.hf_model is not None:
        rows.append(("Hugging Face", f"{config.hf_model}: {config.hf_dtype}"))
    source = config.dataset_path or config.task.data.name
    lengths = [len(prompt) for prompt in comparison.prompts]
    rows += [
        (f"{config.task.noun.capitalize()}s", f"{len(comparison.articles)} from {source}"),
        ("Batch size", str(config.batch_size)),
        ("Prompt", f"{min(lengths)} to {max(lengths)} tokens, at most {comparison.prompt_limit} kept"),
        ("New tokens", f"at most {config.output_len}, {config.decoding.describe()}"),
        ("Tokenizer", comparison.tokenizer_name),
        ("Device", comparison.device),
        ("Versions", ", ".join(_versions())),
    ]
    body = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    words = " ".join(f"<span>{escape(word)}</span>" for word in config.command.split())
    command = f"<tr><th>Command</th><td><code>{words}</code></td></tr>" if words else ""
    return f'<table class="conditions small"><tbody>{body}\n{command}</tbody></table>'


def _versions() -> list[str]:
    return [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in _PACKAGES)]


def _legend(comparison: Comparison) -> str:
    task = comparison.config.task
    legend = 'Marked: <mark class="shared">words that the reference has</mark>'
    if len(comparison.results) == 1:
        return f'<p class="soft small">{legend}.</p>'
    return (
        f'<p class="soft small">{legend}, '
        f'<mark class="differs">words in which the two {task.output_noun} differ</mark>. '
        f"Numbers: ROUGE-1, 2, L of the {task.noun}.</p>\n"
        '<label class="filter small"><input type="checkbox" id="only-different">'
        f"only {task.noun}s with different token ids</label>"
    )


def _article(comparison: Comparison, number: int) -> str:
    article = comparison.articles[number]
    results = comparison.results
    rows = [result.tokens[number] for result in results]
    same = all(row == rows[0] for row in rows)
    tag = ""
    if len(results) == 2:
        tag = '<span class="tag good">identical ids</span>' if same else '<span class="tag bad">different ids</span>'
    texts = [_trimmed(result.texts[number]) for result in results]
    shown = results[:1] if same else results
    lines = [f"<dt>Reference</dt><dd>{escape(article.reference)}</dd><span></span>"]
    for index, result in enumerate(shown):
        name = f"{_dot(0)}{_dot(1)}Both" if len(shown) < len(results) else _dot(index) + escape(result.side.name)
        other = texts[1 - index] if len(shown) == 2 else texts[index]
        summary = _marked(texts[index], article.reference, other)
        lines.append(f"<dt>{name}</dt><dd>{summary}</dd>{_scores(result, number)}")
    return (
        f'<article class="card{" same" if same else ""}" id="article-{number}">\n'
        f"<header><h3>{comparison.config.task.noun.capitalize()} {number}</h3>{tag}</header>\n{_source(article.text)}\n"
        f'<dl class="texts">\n' + "\n".join(lines) + "\n</dl>\n</article>"
    )


def _trimmed(text: str) -> str:
    """Without the blank in front of one line, but with the indentation of several."""
    return text.strip() if "\n" not in text.strip() else text.strip("\n").rstrip()


def _source(text: str) -> str:
    if len(text) <= _FOLD:
        return f'<p class="source">{escape(text)}</p>'
    start = text[:_FOLD].rsplit(None, 1)[0]
    return (
        f'<details class="source"><summary><span class="start">{escape(start)} …</span> '
        f'<span class="small">({len(text):,} characters)</span></summary>{escape(text)}</details>'
    )


def _scores(result: SideResult, number: int) -> str:
    first, *others = (f"{result.scores[number][key]:.1f}" for key in ("rouge1", "rouge2", "rougeL"))
    return f'<span class="scores"><b>{first}</b> · {" · ".join(others)}</span>'


def _marked(text: str, reference: str, other: str) -> str:
    """The text as HTML, its words marked where the reference has them and where the other summary differs."""
    if not text:
        return '<span class="empty">nothing</span>'
    words = re.findall(r"\s+|\S+", text)
    known = set(_bare_words(reference))
    other_words = re.findall(r"\s+|\S+", other)
    differing: set[int] = set()
    for operation, begin, end, _, _ in difflib.SequenceMatcher(None, words, other_words, autojunk=False).get_opcodes():
        if operation != "equal":
            differing.update(range(begin, end))
    return "".join(_mark(word, index in differing, known) for index, word in enumerate(words))


def _mark(word: str, differs: bool, known: set[str]) -> str:
    bare = _bare_words(word)
    shared = bool(bare) and all(part in known for part in bare)
    classes = [name for name, present in (("shared", shared), ("differs", differs)) if present and word.strip()]
    return f'<mark class="{" ".join(classes)}">{escape(word)}</mark>' if classes else escape(word)


def _bare_words(text: str) -> list[str]:
    """Words as ROUGE sees them: lower case, letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _dot(index: int) -> str:
    return f'<span class="dot {_SERIES_CLASSES[index]}"></span>'
