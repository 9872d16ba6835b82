"""Tables of virtual tokens: read from what trains them, merged, written as one `.npy` with a description beside it.

The array is float32, [tasks, virtual tokens of the longest task, E]; shorter tasks end in rows of zeros.  The id of a
task is its place in the array.  `<name>.npy.json` tells which rows are real.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.checkpoint.hf_files import read_json
from gpt.checkpoint.nemo_archive import unpacked
from gpt.checkpoint.prompt_sources import ADAPTER_CONFIG, Task, read_adapter, read_archive
from gpt.errors import CheckpointError, Problems
from gpt.files import whole_file, write_text

if TYPE_CHECKING:
    import numpy as np

_FORMAT_VERSION = 1


def read_tasks(source: Path) -> list[Task]:
    """The tasks of a prompt-learning archive or its unpacked folder, of a PEFT adapter's folder, or of a written table.

    Raises ConfigError where there is no such input, CheckpointError for what is none of these, or damaged.
    """
    if source.suffix == ".npy" and source.is_file():
        tasks = _read_table(source)
    elif (source / ADAPTER_CONFIG).is_file():
        tasks = [read_adapter(source)]
    else:
        with tempfile.TemporaryDirectory(prefix="nemo-prompts-") as scratch:
            with unpacked(source, Path(scratch) / "unpacked") as folder:
                tasks = read_archive(source, folder)
    problems = Problems()
    for task in tasks:
        if 0 in task.values.shape:
            problems.add(f"{task.name}: an empty table, {list(task.values.shape)}")
        elif not _finite(task.values):
            problems.add(f"{task.name}: NaN or infinite values")
    problems.raise_if_any(CheckpointError, f"these tables cannot be used: {source}")
    return tasks


def merge(tasks: Sequence[Task]) -> np.ndarray:
    """[tasks, most virtual tokens, E].  Raises CheckpointError where the tasks belong to models of different width."""
    import numpy as np

    widths = {task.values.shape[1] for task in tasks}
    if len(widths) != 1:
        raise CheckpointError(
            "the tables belong to models of different hidden size" if tasks else "no tasks in these files",
            found=[f"{task.source}, {task.name}: {task.values.shape[1]}" for task in tasks] or None,
            hint="merge only tables that were trained for the same model" if tasks else None,
        )
    longest = max(len(task.values) for task in tasks)
    return np.stack([np.pad(task.values, ((0, longest - len(task.values)), (0, 0))) for task in tasks])


def description_path(path: Path) -> Path:
    """`prompts.npy.json` of `prompts.npy`."""
    return path.with_name(path.name + ".json")


def write_table(path: Path, tasks: Sequence[Task]) -> None:
    """Writes the merged array and its description; each is either whole or absent."""
    import numpy as np

    table = merge(tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "format_version": _FORMAT_VERSION,
        "hidden_size": table.shape[2],
        "tasks": [asdict(TaskEntry.of(index, task)) for index, task in enumerate(tasks)],
    }
    with whole_file(path) as file:
        np.save(file, table, allow_pickle=False)
        description_path(path).unlink(missing_ok=True)  # an old one would describe the new table
    write_text(description_path(path), json.dumps(description, indent=2) + "\n")


@dataclass(frozen=True)
class TaskEntry:
    """A task in the description of a table: its rows in the array are `[id, :virtual_tokens]`."""

    id: int
    name: str
    virtual_tokens: int
    source: str

    @classmethod
    def of(cls, index: int, task: Task) -> TaskEntry:
        return cls(index, task.name, len(task.values), task.source)


def read_description(path: Path) -> list[TaskEntry] | None:
    """The tasks of the table `path` as its description tells them, in the order of their ids; None where there is none.

    Raises CheckpointError where the description is damaged.
    """
    beside = description_path(path)
    if not beside.is_file():
        return None
    content = read_json(beside)
    try:
        if content["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, allowed: {_FORMAT_VERSION}")
        return [
            TaskEntry(int(entry["id"]), str(entry["name"]), int(entry["virtual_tokens"]), str(entry["source"]))
            for entry in content["tasks"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged description of a table: {beside}", found=error) from error


def _finite(values: np.ndarray) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all())


def _read_table(path: Path) -> list[Task]:
    """A table written before; without its description every row counts as a virtual token."""
    import numpy as np

    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CheckpointError(f"no table of virtual tokens: {path}", found=error) from error
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3 or table.dtype.kind != "f":
        raise CheckpointError(
            f"no table of virtual tokens: {path}",
            found=f"{list(table.shape)}, {table.dtype}",
            allowed="[tasks, virtual tokens, hidden size], a float type",
        )
    table = table.astype(np.float32)
    entries = read_description(path)
    if entries is None:
        return [Task(f"{path.stem}[{index}]", values, str(path)) for index, values in enumerate(table)]
    fits = [entry.id for entry in entries] == list(range(len(table)))
    if not fits or any(entry.virtual_tokens > table.shape[1] for entry in entries):
        raise CheckpointError(
            f"the description belongs to another table: {description_path(path)}",
            found=[f"task {entry.id} of {entry.virtual_tokens} tokens" for entry in entries],
            allowed=f"the tasks of an array of {list(table.shape)}",
            hint="convert the tables again",
        )
    return [Task(entry.name, table[entry.id, : entry.virtual_tokens], str(path)) for entry in entries]
