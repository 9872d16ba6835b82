"""Where virtual tokens come from: NeMo's prompt-learning archives and the adapters of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.checkpoint.hf_files import read_json
from gpt.checkpoint.nemo_archive import CONFIG_NAME, WEIGHTS_NAME, find_config, has_prompts, read_yaml, weights_file
from gpt.console import log
from gpt.errors import CheckpointError, Problems
from gpt.files import listing

if TYPE_CHECKING:
    import numpy as np

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_TYPES = ("PROMPT_TUNING", "P_TUNING")


@dataclass(frozen=True)
class Task:
    """What one task learned: `values` is [virtual tokens, E], float32.  `source` is the file it came from."""

    name: str
    values: np.ndarray
    source: str


def _float32(name: str, value: Any) -> np.ndarray:
    """A copy in memory of a mapped tensor.  Raises CheckpointError for anything but a matrix of floats."""
    import torch

    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(
            f"{name} is no table of virtual tokens", found=found, allowed="[virtual tokens, hidden size], a float type"
        )
    return value.detach().float().numpy().copy()


def read_archive(source: Path, folder: Path) -> list[Task]:
    """The tasks in `folder`, which has the files of the prompt-learning archive `source`.

    Raises CheckpointError for what is no such archive, damaged or contradictory.
    """
    from gpt.checkpoint.torch_file import load_torch_file

    config_path = find_config(folder)
    config = read_yaml(config_path)
    if not has_prompts(config):
        raise CheckpointError(
            f"no prompt-learning archive: {source}",
            found=f"{CONFIG_NAME} without task_templates or peft",
            hint="a model is converted with nemo_ckpt_convert.py",
        )
    root = config_path.parent
    path = weights_file(root) or weights_file(root / "mp_rank_00")
    if path is None:
        raise CheckpointError(
            f"no weights beside {CONFIG_NAME}: {source}",
            found=listing(root),
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


def read_adapter(folder: Path) -> Task:
    """PEFT's folder: adapter_config.json and `prompt_embeddings` [virtual tokens, E] in adapter_model.safetensors.

    Raises CheckpointError for other kinds of adapters, and for files that contradict each other.
    """
    config = read_json(folder / ADAPTER_CONFIG)
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
            problems.add(f"{name}: {ADAPTER_CONFIG} says {config[name]}, the table has {found}")
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
        f"no weights beside {ADAPTER_CONFIG}: {folder}", allowed=" or ".join(name for name, _ in formats)
    )
