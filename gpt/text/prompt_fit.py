"""How long a prompt may be, and what becomes of a longer one."""

from __future__ import annotations

from collections.abc import Sequence

from gpt.config import BuildConfig, ModelConfig
from gpt.console import print_notice
from gpt.errors import ConfigError, Problems, first_lines

ON_LONG_PROMPT = ("refuse", "truncate")


def prompt_limit(
    model: ModelConfig, build: BuildConfig, max_new_tokens: int, asked: int | None, num_virtual: int = 0
) -> tuple[int, str]:
    """The tokens a prompt may have, and the reason.  asked: --max_input_length.  num_virtual: put in front of it.

    Raises ConfigError where no prompt fits.
    """
    limits = {
        f"the engine's --max_input_len {build.max_input_len}": build.max_input_len,
        f"the engine's {build.max_seq_len} slots less {max_new_tokens} new tokens": build.max_seq_len - max_new_tokens,
    }
    if model.learned_positions:
        room = model.n_positions - max_new_tokens
        limits[f"the model's {model.n_positions} positions less {max_new_tokens} new tokens"] = room
    if asked is not None:
        limits[f"--max_input_length {asked}"] = asked
    reason, limit = min(limits.items(), key=lambda item: item[1])
    hint = "a larger --max_input_length" if limit == asked else "a smaller --max_output_len"
    if num_virtual > 0:
        reason, limit = f"{reason} less {num_virtual} virtual tokens", limit - num_virtual
    if limit < 1:
        raise ConfigError("no room for a prompt", found=f"{reason}: {limit} tokens", hint=hint)
    return limit, reason


def last_tokens(tokens: Sequence[int], limit: int, num_virtual: int = 0) -> list[int]:
    """A prompt cut to `limit` tokens: its end is what a continuation follows.  num_virtual: in front, kept; fewer than
    `limit`.
    """
    if len(tokens) <= limit:
        return list(tokens)
    return [*tokens[:num_virtual], *tokens[num_virtual - limit :]]


def listed(lines: Sequence[str]) -> str:
    """How many, and each on a line of its own, the first ones of many."""
    return "\n  ".join([str(len(lines)), *first_lines(lines)])


def fit_prompts(prompts: Sequence[list[int]], limit: int, reason: str, *, truncate: bool) -> list[list[int]]:
    """All prompts, long ones cut and told of, or with `truncate` false refused: ConfigError lists them."""
    problems = Problems()
    for row, prompt in enumerate(prompts):
        if len(prompt) > limit:
            problems.add(f"prompt {row}: {len(prompt)} tokens")
    hint = "--on_long_prompt truncate keeps their ends; else shorten them"
    if not truncate:
        problems.raise_if_any(ConfigError, f"prompts of more than {limit} tokens: {reason}", hint=hint)
    elif problems:
        print_notice(f"Prompts cut to their last {limit} tokens ({reason}): {listed(problems.items)}")
    return [last_tokens(prompt, limit) for prompt in prompts]
