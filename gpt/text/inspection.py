"""The result of an inspection in words and as JSON, with what the artifact's tokenizer adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt.checkpoint.inspection import Inspection
from gpt.text.tokenizer import load_tokenizer

_KEY_WIDTH = 16


def add_tokenizer(result: Inspection) -> None:
    """Loads the tokenizer that lies with the artifact, and compares its size with the embedding's."""
    if result.tokenizer_dir is None:
        if result.model is not None:
            result.facts["tokenizer"] = "none; run.py needs --tokenizer or --vocab_file for text"
        return
    with result.collecting():
        tokenizer = load_tokenizer(result.tokenizer_dir)
        kind = type(tokenizer).__name__.removesuffix("Tokenizer").lower()
        line = f"{kind}, {tokenizer.vocab_size} tokens, end id {tokenizer.end_id}"
        size = result.model.vocab_size if result.model is not None else tokenizer.vocab_size
        if tokenizer.vocab_size < size:
            line += f"; the last {size - tokenizer.vocab_size} rows of the embedding have no token (padding)"
        elif tokenizer.vocab_size > size:
            result.problems.append(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {size} rows: "
                f"ids from {size} on have no embedding; tokens were added after the training, or it is another model's"
            )
        result.facts["tokenizer"] = line


def as_json(result: Inspection) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "kind": result.kind,
        "facts": result.facts,
        "next_step": result.next_step,
        "problems": result.problems,
    }


def as_text(result: Inspection) -> str:
    """A heading, one line per fact, then the problems."""
    lines = [f"{result.path}: {result.kind}"]
    facts = result.facts if result.next_step is None else {**result.facts, "next_step": result.next_step}
    for key, value in facts.items():
        first, *others = _value_lines(value)
        lines.append(f"  {key.replace('_', ' '):{_KEY_WIDTH}}{first}")
        lines += [" " * (_KEY_WIDTH + 2) + other for other in others]
    if not result.problems:
        return "\n".join([*lines, "  no problems found"])
    count = len(result.problems)
    lines.append(f"  {count} problem{'s' * (count != 1)}:")
    return "\n".join([*lines, *(f"    - {problem}" for problem in result.problems)])


def _value_lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [", ".join(f"{key} {'unknown' if entry is None else entry}" for key, entry in value.items())]
    if isinstance(value, (list, tuple)):
        return [str(entry) for entry in value] or ["none"]
    return [f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)]
