"""Tables of virtual tokens: read from what trains them, merged, written as one `.npy` with a description beside it.

The array is float32, [tasks, virtual tokens of the longest task, E]; shorter tasks end in rows of zeros.  A task's id is
its place in the array.  `<name>.npy.json` tells which rows are real.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.checkpoint.hf_files import read_json
from gpt.checkpoint.nemo_archive import CONFIG_NAME, WEIGHTS_NAME, find_config, read_yaml, unpacked, weights_file
from gpt.console import log
from gpt.errors import CheckpointError, Problems
from gpt.files import whole_file, write_text

if TYPE_CHECKING:
    import numpy as np

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_TYPES = ("PROMPT_TUNING", "P_TUNING")
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Task:
    """What one task learned: `values` is [virtual tokens, E], float32.  `source` is the file it came from."""

    name: str
    values: np.ndarray
    source: str


def read_tasks(source: Path) -> list[Task]:
    """The tasks of a prompt-learning archive or its unpacked folder, of a PEFT adapter's folder, or of a written table.

    Raises ConfigError where there is no such input, CheckpointError for what is none of these, or damaged.
    """
    if source.suffix == ".npy" and source.is_file():
        tasks = _read_table(source)
    elif (source / _ADAPTER_CONFIG).is_file():
        tasks = [_read_adapter(source)]
    else:
        with tempfile.TemporaryDirectory(prefix="nemo-prompts-") as scratch:
            with unpacked(source, Path(scratch) / "unpacked") as folder:
                tasks = _read_archive(source, folder)
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
    description_path(path).unlink(missing_ok=True)  # an old one would describe the new table
    with whole_file(path) as file:
        np.save(file, table, allow_pickle=False)
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


def _float32(name: str, value: Any) -> np.ndarray:
    """A copy in memory of a mapped tensor.  Raises CheckpointError for anything but a matrix of floats."""
    import torch

    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(
            f"{name} is no table of virtual tokens", found=found, allowed="[virtual tokens, hidden size], a float type"
        )
    return value.detach().float().numpy().copy()


def _read_archive(source: Path, folder: Path) -> list[Task]:
    from gpt.checkpoint.torch_file import load_torch_file

    config_path = find_config(folder)
    config = read_yaml(config_path)
    root = config_path.parent
    path = weights_file(root) or weights_file(root / "mp_rank_00")
    if path is None:
        raise CheckpointError(
            f"no weights beside {CONFIG_NAME}: {source}",
            found=", ".join(sorted(entry.name for entry in root.iterdir())),
            allowed=f"{WEIGHTS_NAME}, here or in mp_rank_00/",
        )
    content = load_torch_file(path)
    if config.get("peft") is not None:
        tasks = [_adapter_task(source, content)]
    else:
        tasks = _template_tasks(source, config, content)
    width = config.get("hidden_size")
    for task in tasks:
        if isinstance(width, int) and task.values.shape[-1] != width:
            raise CheckpointError(
                f"the table does not fit the model it names: {source}",
                found=f"{task.name} is {task.values.shape[-1]} wide",
                allowed=f"hidden_size {width}",
            )
    return tasks


def _template_tasks(source: Path, config: dict[str, Any], content: dict[Any, Any]) -> list[Task]:
    """In the order of `task_templates`; one without a table takes no id, as in NeMo."""
    tables = content.get("prompt_table")
    templates = config.get("task_templates")
    problems = Problems()
    if not isinstance(tables, dict):
        found = ", ".join(sorted(map(str, content))[:6])
        problems.add(f"{WEIGHTS_NAME}: found {found or 'nothing'}, allowed: prompt_table, the tables of virtual tokens")
        tables = {}
    if not isinstance(templates, list) or not all(isinstance(item, dict) and "taskname" in item for item in templates):
        problems.add(f"{CONFIG_NAME}: task_templates: found {templates!r:.80}, allowed: a list with a taskname in each")
        templates = []
    tasks = []
    for template in templates:
        name = str(template["taskname"])
        table = tables.get(f"prompt_table.{name}.prompt_embeddings.weight")
        if table is None:
            log.warning("the task %s of the configuration has no table and gets no id", name)
            continue
        values = _float32(name, table)
        expected = template.get("total_virtual_tokens")
        if expected is not None and len(values) != expected:
            problems.add(f"{name}: {len(values)} rows, the configuration says {expected} virtual tokens")
        tasks.append(Task(name, values, str(source)))
    known = {f"prompt_table.{template['taskname']}.prompt_embeddings.weight" for template in templates}
    for key in tables.keys() - known:
        log.warning("the table %s belongs to no task of the configuration and is left out", key)
    if not tasks and not problems:
        problems.add("no task of the configuration has a table")
    problems.raise_if_any(CheckpointError, f"no usable prompt-learning archive: {source}")
    return tasks


def _adapter_task(source: Path, content: dict[Any, Any]) -> Task:
    """Later archives hold one task, as the inference table of an adapter."""
    state = content.get("state_dict", content)
    found = {str(key): value for key, value in state.items() if "adapter_layer.ptuning_adapter" in str(key)}
    tables = {key: value for key, value in found.items() if "inference_table" in key}
    if len(tables) != 1:
        raise CheckpointError(
            f"no table of virtual tokens: {source}",
            found=sorted(tables or found or map(str, state))[:10],
            allowed="one adapter_layer.ptuning_adapter.inference_table",
            hint="only prompt tuning has tables; other adapters change the weights themselves",
        )
    ((name, table),) = tables.items()
    return Task(source.stem, _float32(name, table), str(source))


def _read_adapter(folder: Path) -> Task:
    """PEFT's folder: adapter_config.json and `prompt_embeddings` [virtual tokens, E] in adapter_model.safetensors."""
    config = read_json(folder / _ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind not in _ADAPTER_TYPES:
        raise CheckpointError(
            f"an adapter of another kind: {folder}",
            found=f"peft_type {kind!r}",
            allowed=", ".join(_ADAPTER_TYPES),
            hint="other adapters have no virtual tokens in the embedding; merge them into the model instead",
        )
    values = _read_embeddings(folder)
    rows, width = values.shape
    problems = Problems()
    for name, found in (("num_virtual_tokens", rows), ("token_dim", width)):
        if config.get(name) not in (None, found):
            problems.add(f"{name}: {_ADAPTER_CONFIG} says {config[name]}, the table has {found}")
    problems.raise_if_any(CheckpointError, f"the adapter's files contradict each other: {folder}")
    return Task(folder.resolve().name, values, str(folder))


def _read_embeddings(folder: Path) -> np.ndarray:
    from gpt.checkpoint.safetensors_file import read_safetensors
    from gpt.checkpoint.torch_file import read_torch_file

    formats: tuple[tuple[str, Callable[[Path], dict[str, Any]]], ...] = (
        ("adapter_model.safetensors", read_safetensors),
        ("adapter_model.bin", read_torch_file),
    )
    for name, read in formats:
        path = folder / name
        if not path.is_file():
            continue
        tensors = read(path)
        table = tensors.get("prompt_embeddings")
        if table is None or len(table.shape) != 2:
            found = [f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items())[:6]]
            raise CheckpointError(
                f"no table of virtual tokens: {path}", found=found, allowed="prompt_embeddings with two axes"
            )
        return _float32(name, table.read(0, table.shape[0]))
    raise CheckpointError(
        f"no weights beside {_ADAPTER_CONFIG}: {folder}", allowed=" or ".join(name for name, _ in formats)
    )


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
