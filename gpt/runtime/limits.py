"""The limits an engine was built with, checked before a step and explained in its own terms."""

from __future__ import annotations

from collections.abc import Sequence

from gpt.config import BuildConfig, ModelConfig
from gpt.errors import ConfigError, Problems


def check_start(model: ModelConfig, build: BuildConfig, batch_size: int, max_seq_len: int) -> None:
    """Raises ConfigError where a batch does not fit the engine, with the numbers and the flags to change."""
    problems = Problems()
    if batch_size > build.max_batch_size * build.max_beam_width:
        limit = f"the engine's --max_batch_size is {build.max_batch_size}"
        if build.max_beam_width > 1:
            limit += f" with beams of --max_beam_width {build.max_beam_width}"
        problems.add(f"{batch_size} sequences in one batch, {limit}")
    if max_seq_len > build.max_seq_len:
        problems.add(
            f"sequences of {max_seq_len} tokens, the engine holds {build.max_seq_len} "
            f"(--max_input_len {build.max_input_len} + --max_output_len {build.max_output_len})"
        )
    if model.learned_positions and max_seq_len > model.n_positions:
        problems.add(f"sequences of {max_seq_len} tokens, the model has {model.n_positions} positions")
    problems.raise_if_any(
        ConfigError,
        "the request is larger than the engine",
        hint="shorten the request, or build the engine with larger limits",
    )


def check_prompts(
    model: ModelConfig,
    build: BuildConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    num_virtual: int = 0,
) -> None:
    """Raises ConfigError listing every prompt that is empty, too long, or has token ids that nothing stands for.

    num_virtual: virtual tokens per task, whose ids follow the vocabulary.
    """
    problems = Problems()
    for row, prompt in enumerate(prompts):
        if not prompt:
            problems.add(f"prompt {row}: no tokens")
            continue
        if len(prompt) > build.max_input_len:
            num_tokens = _describe_length(prompt, model.vocab_size, num_virtual)
            problems.add(f"prompt {row}: {num_tokens}, the engine was built with --max_input_len {build.max_input_len}")
        elif len(prompt) + max_new_tokens > build.max_seq_len:
            problems.add(
                f"prompt {row}: {len(prompt)} + {max_new_tokens} new tokens, the engine holds {build.max_seq_len} "
                f"(--max_input_len {build.max_input_len} + --max_output_len {build.max_output_len})"
            )
        elif model.learned_positions and len(prompt) + max_new_tokens > model.n_positions:
            num_tokens = f"{len(prompt)} + {max_new_tokens} new tokens"
            problems.add(f"prompt {row}: {num_tokens}, the model has {model.n_positions} positions")
        unknown = sorted({token for token in prompt if not 0 <= token < model.vocab_size + num_virtual})
        if unknown:
            shown = ", ".join(map(str, unknown[:5]))
            allowed = f"0 to {model.vocab_size - 1}"
            if num_virtual:
                allowed += f", virtual tokens {model.vocab_size} to {model.vocab_size + num_virtual - 1}"
            problems.add(f"prompt {row}: token ids {shown} outside the vocabulary, allowed: {allowed}")
    problems.raise_if_any(
        ConfigError,
        "the prompts do not fit the engine",
        hint="shorten them (run.py --on_long_prompt truncate keeps their ends), ask for fewer new tokens, or build the "
        "engine with a larger --max_input_len / --max_output_len",
    )


def _describe_length(prompt: Sequence[int], vocab_size: int, num_virtual: int) -> str:
    """Virtual tokens count like all others, which somebody who typed only the text may not expect."""
    in_front = sum(vocab_size <= token < vocab_size + num_virtual for token in prompt)
    return f"{len(prompt)} tokens" + (f", {in_front} of them virtual" if in_front else "")
