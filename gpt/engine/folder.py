"""The engine folder: one file per rank, config.json that describes them, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config import BuildConfig, ModelConfig
from gpt.console import human_bytes
from gpt.engine.original_config import builder_config, plugin_config
from gpt.errors import ConfigError, EngineError, Problems, rethrow_as
from gpt.files import check_folder_place, listing

CONFIG_NAME = "config.json"
_FORMAT_VERSION = 1
TOKENIZER_FOLDER = "tokenizer"
STAGING_PREFIX = ".partial-"  # of the folder in which a build works
_REBUILD = "build it with build.py --output_dir <folder>"


@dataclass(frozen=True)
class EngineFile:
    """One rank's file as config.json records it; checksum is xxh3_128."""

    name: str
    num_bytes: int
    checksum: str


@dataclass(frozen=True)
class EngineInfo:
    """An engine folder whose files are all there and as long as they should be; `source` says what it was made of."""

    folder: Path
    model: ModelConfig
    build: BuildConfig
    library: Dict[str, str]
    build_id: str
    files: tuple[EngineFile, ...]
    source: Dict[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        return self.build.backend

    @property
    def tokenizer_dir(self) -> Path | None:
        """Where the checkpoint's tokenizer travelled to, if it had one."""
        path = self.folder / TOKENIZER_FOLDER
        return path if path.is_dir() else None

    def engine_path(self, rank: int) -> Path:
        return self.folder / self.files[rank].name

    def describe(self) -> str:
        """One line: what this engine is."""
        model = self.model
        size = human_bytes(sum(file.num_bytes for file in self.files))
        weights = "random weights" if self.build.seed is not None else size
        shape = f"{model.n_layer} x {model.n_embd}, vocabulary {model.vocab_size}"
        quant = self.build.quant.describe()
        return ", ".join(part for part in (f"{self.backend} {self.build.dtype}", quant, shape, weights) if part)


def engine_file_name(dtype: str, world_size: int, rank: int) -> str:
    return f"gpt_{dtype}_tp{world_size}_rank{rank}.engine"


def engine_config(
    model: ModelConfig,
    build: BuildConfig,
    library: Dict[str, str],
    build_id: str,
    files: list[EngineFile],
    source: Dict[str, Any],
) -> str:
    """The text of config.json: the original's two objects, and `engine` with everything needed to run and to explain
    it."""
    content = {
        "builder_config": builder_config(model, build),
        "plugin_config": plugin_config(build),
        "engine": {
            "format_version": _FORMAT_VERSION,
            "build_id": build_id,
            "library": dict(library),
            "model": model.to_json(),
            "build": build.to_json(),
            "source": dict(source),
            "files": [
                {"name": file.name, "rank": rank, "bytes": file.num_bytes, "xxh3_128": file.checksum}
                for rank, file in enumerate(files)
            ],
        },
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def check_replaceable(folder: Path) -> None:
    """Raises ConfigError where an engine in `folder` would take the place of files that are not an engine's."""
    check_folder_place(folder)
    config = folder / CONFIG_NAME
    kept = [path.name for path in (config, folder / TOKENIZER_FOLDER) if path.exists()]
    ours = any(folder.glob("*.engine")) or any(folder.glob(f"{STAGING_PREFIX}*"))
    if kept and not ours and not (config.is_file() and b'"builder_config"' in config.read_bytes()):
        raise ConfigError(
            f"the output folder holds something else and is left alone: {folder}",
            found=listing(folder),
            allowed=f"a folder without {' and '.join(kept)}, or one with an engine",
            hint="choose another --output_dir",
        )


def open_engine(folder: Path | str) -> EngineInfo:
    """Reads and checks an engine folder.  Raises EngineError listing everything that is wrong with it."""
    folder = Path(folder)
    engine = _read_engine_object(folder)
    version = engine.get("format_version")
    if version != _FORMAT_VERSION:
        raise EngineError(
            f"the engine in {folder} has another format",
            found=f"version {version}",
            allowed=f"version {_FORMAT_VERSION}",
            hint="build it again with this version's build.py",
        )
    try:
        model = ModelConfig.from_json(engine["model"])
        build = BuildConfig.from_json(engine["build"])
        files = tuple(EngineFile(file["name"], int(file["bytes"]), file["xxh3_128"]) for file in engine["files"])
        library, source = dict(engine["library"]), dict(engine.get("source", {}))
        info = EngineInfo(folder, model, build, library, str(engine["build_id"]), files, source)
    except ConfigError as error:
        raise rethrow_as(error, EngineError, f"{folder / CONFIG_NAME} is damaged") from error
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"{folder / CONFIG_NAME} is damaged", found=f"{type(error).__name__}: {error}", hint=_REBUILD
        ) from error
    _check_files(info)
    return info


def _read_engine_object(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise EngineError(f"there is no engine folder {folder}", hint=_REBUILD)
    path = folder / CONFIG_NAME
    if not path.is_file():
        what = "an unfinished build" if any(folder.glob("*.engine*")) else "no engine"
        raise EngineError(f"{folder} holds {what}", found=f"no {CONFIG_NAME}", hint=_REBUILD)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read", found=str(error), hint=_REBUILD) from error
    engine = content.get("engine") if isinstance(content, dict) else None
    if not isinstance(engine, dict):
        foreign = isinstance(content, dict) and "builder_config" in content
        found = "an engine of another tool (no `engine` object in config.json)" if foreign else "no `engine` object"
        raise EngineError(f"{folder} cannot be run by this tool", found=found, hint=_REBUILD)
    return engine


def _check_files(info: EngineInfo) -> None:
    problems = Problems()
    if len(info.files) != info.build.world_size:
        problems.add(f"{CONFIG_NAME} lists {len(info.files)} files for {info.build.world_size} ranks")
    for rank, file in enumerate(info.files):
        path = info.folder / file.name
        if Path(file.name).name != file.name:
            problems.add(f"rank {rank}: {file.name!r} is no file name")
        elif not path.is_file():
            problems.add(f"rank {rank}: {file.name} is missing")
        elif (size := path.stat().st_size) != file.num_bytes:
            problems.add(f"rank {rank}: {file.name} has {size} bytes, built with {file.num_bytes}")
    problems.raise_if_any(EngineError, f"the engine in {info.folder} is not whole", hint=_REBUILD)
