"""Virtual tokens for prompts: which task each prompt is for, and the ids that stand in front of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.checkpoint.prompt_table import Task, merge, read_tasks
from gpt.engine.folder import EngineInfo
from gpt.errors import ConfigError, Problems
from gpt.text.prompts import check_input_file

if TYPE_CHECKING:
    from gpt.runtime.virtual_tokens import VirtualTokens

TABLE_SUFFIXES = (".npy",)


def parse_tasks(text: str) -> tuple[int, ...]:
    """'0,1,0' -> (0, 1, 0).  Raises ConfigError listing everything that is no id of a task."""
    parts = [part.strip() for part in text.split(",")]
    problems = Problems()
    for position, part in enumerate(parts, start=1):
        if not (part.isascii() and part.isdecimal()):
            problems.add(f"value {position}: {part!r}")
    problems.raise_if_any(ConfigError, "--tasks is no list of task ids", hint="for example --tasks 0,1,0")
    return tuple(map(int, parts))


@dataclass(frozen=True)
class PromptTuning:
    """A table of virtual tokens together with the task of each prompt.

    tasks: what the table holds, each with its real rows.  chosen: one place in `tasks` per prompt.
    """

    tasks: tuple[Task, ...]
    chosen: tuple[int, ...]
    virtual: VirtualTokens

    def prepend(self, prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
        """The real virtual tokens of each prompt's task, as ids from `vocab_size` on, in front of its own ids."""
        counts = [len(self.tasks[task].values) for task in self.chosen]
        return [
            [*range(vocab_size, vocab_size + count), *prompt] for count, prompt in zip(counts, prompts, strict=True)
        ]

    def check_ids(self, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Raises ConfigError listing every virtual id behind the rows that the prompt's task has."""
        problems = Problems()
        for row, (prompt, chosen) in enumerate(zip(prompts, self.chosen, strict=True)):
            task = self.tasks[chosen]
            end = vocab_size + len(task.values)
            if unknown := sorted({token for token in prompt if token >= end}):
                shown = ", ".join(map(str, unknown[:5]))
                problems.add(f"prompt {row}: {shown}; task {chosen} ({task.name}) has {vocab_size} to {end - 1}")
        problems.raise_if_any(
            ConfigError,
            "virtual token ids outside the prompt table",
            hint=f"virtual token k of a task is written as vocab_size + k, here {vocab_size} + k",
        )


def load_prompt_tuning(
    path: Path | None, tasks: Sequence[int] | None, info: EngineInfo, num_prompts: int
) -> PromptTuning | None:
    """The table in `path` for prompts of `tasks`: one per prompt, one for all of them, or (None) task 0.

    None without a table.  Raises ConfigError where file, engine, tasks and prompts do not fit together, CheckpointError
    for a file that holds no usable table.
    """
    if path is None:
        if tasks is not None:
            raise ConfigError("--tasks without a table of virtual tokens", hint="--prompt_table <file.npy> names it")
        return None
    check_input_file(path, TABLE_SUFFIXES)
    import torch

    from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens

    known = tuple(read_tasks(path))
    chosen = (0,) if tasks is None else tuple(tasks)
    if len(chosen) == 1:
        chosen *= num_prompts
    virtual = VirtualTokens(torch.from_numpy(merge(known)), chosen)
    check_virtual_tokens(info.model, info.build, virtual, num_prompts)
    return PromptTuning(known, chosen, virtual)
