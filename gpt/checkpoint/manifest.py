"""manifest.json: what a checkpoint folder holds, file by file.

The converters here write it last, so that a folder of theirs without it is visibly incomplete.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import ModelConfig
from gpt.errors import CheckpointError, GptError
from gpt.files import write_text

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """One tensor file: `shape` and `dtype` of the bare array inside, its size and the xxh3_128 of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """`source` is the folder or file converted, `command` the command line, `files` the tensor files by name."""

    tool: str
    tool_version: str
    command: str
    source: str
    model: ModelConfig
    storage_dtype: str
    tensor_parallelism: int
    files: dict[str, FileRecord]
    tokenizer_files: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text(folder / FILE_NAME, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises CheckpointError for a damaged file or another format version."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
        except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise _damaged(path, error) from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has another format version: {path}",
                found=version,
                allowed=FORMAT_VERSION,
                hint="convert the model again with this version's tools",
            )
        try:
            return cls._from_json(content)
        except (GptError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        model = ModelConfig.from_json(content.pop("model"))
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return cls(
            model=model,
            files={name: dataclasses.replace(record, shape=tuple(record.shape)) for name, record in files.items()},
            tokenizer_files=tuple(content.pop("tokenizer_files")),
            **content,
        )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the list of the checkpoint's files is damaged: {path}",
        found=f"{type(error).__name__}: {error}",
        hint="convert the model again",
    )
