"""Prompt tuning: learned embeddings that stand in front of a prompt as tokens with ids behind the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.config import BuildConfig, ModelConfig
from gpt.errors import ConfigError, Problems

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VirtualTokens:
    """table: [tasks, tokens per task, E], any float dtype, shorter tasks padded at the end.  tasks: one per prompt.

    Token id V + k of a prompt is row k of its task.
    """

    table: torch.Tensor
    tasks: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Virtual tokens per task."""
        return int(self.table.shape[1])

    def of_prompts(self, prompts: Iterable[int]) -> VirtualTokens:
        """The same table for some of the prompts, by index; one may be there several times."""
        return VirtualTokens(self.table, tuple(self.tasks[prompt] for prompt in prompts))


def check_virtual_tokens(model: ModelConfig, build: BuildConfig, virtual: VirtualTokens, num_prompts: int) -> None:
    """Raises ConfigError listing everything in which table and tasks do not fit the engine and the prompts."""
    problems = Problems()
    shape = tuple(virtual.table.shape)
    if build.max_prompt_embedding_table_size == 0:
        problems.add("the engine was built without prompt tuning (--max_prompt_embedding_table_size)")
    elif len(shape) != 3:
        problems.add(f"the table is {list(shape)}, allowed: [tasks, virtual tokens, {model.n_embd}]")
    else:
        if shape[2] != model.n_embd:
            problems.add(f"the table is {shape[2]} wide, the model {model.n_embd}")
        if shape[0] * shape[1] > build.max_prompt_embedding_table_size:
            problems.add(
                f"{shape[0]} tasks of {shape[1]} virtual tokens, "
                f"the engine's --max_prompt_embedding_table_size is {build.max_prompt_embedding_table_size}"
            )
        if len(virtual.tasks) != num_prompts:
            problems.add(f"{len(virtual.tasks)} tasks for {num_prompts} prompts")
        for task in sorted({task for task in virtual.tasks if not 0 <= task < shape[0]}):
            problems.add(f"task {task}: the table has tasks 0 to {shape[0] - 1}")
    problems.raise_if_any(
        ConfigError,
        "the prompt table does not fit",
        hint="build.py --max_prompt_embedding_table_size <tasks x virtual tokens>; one task per prompt in --tasks",
    )
