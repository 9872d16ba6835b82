"""`.nemo` archives: tar files, plain or gzip, unpacked with suspicion, and the files that are looked for inside.

An archive comes from anywhere: nothing may be written outside the folder it is unpacked into, nothing but regular files
and folders is made, and neither a member nor a header may grow beyond what the archive can honestly hold.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from gpt.console import human_bytes, log
from gpt.errors import CheckpointError, ConfigError, GptError
from gpt.files import is_lfs_pointer, listing

CONFIG_NAME = "model_config.yaml"
WEIGHTS_NAME = "model_weights.ckpt"
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_MEMBERS = 100_000
_MAX_HEADER_BYTES = 1 << 20  # long names and pax attributes; the archive's own reader takes them into memory whole
_MAX_YAML_BYTES = 10 << 20
# What gzip may make of an archive: weights hardly shrink, so anything near the bound is no model.
_MAX_EXPANSION = 20
_ALWAYS_ALLOWED_BYTES = 64 << 20


@contextmanager
def unpacked(source: Path, scratch: Path) -> Iterator[Path]:
    """The folder with the archive's files: `source` itself if it is one, else `scratch`, made here and removed again.

    Raises ConfigError where there is no such input, CheckpointError for what is no archive or a hostile one.
    """
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise ConfigError("no such archive", found=source, allowed="a .nemo file or a folder with its content")
    scratch.mkdir()
    try:
        started = time.perf_counter()
        num_bytes = unpack(source, scratch)
        log.info("%s unpacked: %s, %.1f s", source, human_bytes(num_bytes), time.perf_counter() - started)
        yield scratch
    except GptError as error:  # the folder vanishes: its files are told by their names in the archive
        folder, name = f"{scratch}{os.sep}", f"{source}: "
        error.what = error.what.replace(folder, name)
        if isinstance(error.found, (str, Exception)):
            error.found = str(error.found).replace(folder, name)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def unpack(source: Path, folder: Path) -> int:
    """Unpacks `source` into the empty `folder` and returns the number of bytes; see `unpacked` for what it raises."""
    total = 0
    compressed = is_compressed(source)
    with open(source, "rb") as file:
        size = source.stat().st_size
        allowed = max(_ALWAYS_ALLOWED_BYTES, size * (_MAX_EXPANSION if compressed else 1))
        stream: Any = _SmallHeaders(gzip.GzipFile(fileobj=file) if compressed else file)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for count, member in enumerate(archive):
                    total += member.size
                    _check_member(source, member, count)
                    _check_size(source, total, allowed, folder, member.size)
                    _extract(archive, member, folder)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, UnicodeError) as error:
            raise _not_an_archive(source, error) from error
    return total


def is_compressed(source: Path) -> bool:
    """Whether `source` is a gzip file."""
    with open(source, "rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


class _SmallHeaders:
    """A stream for tarfile, which reads data in small parts but a header, whatever length it claims, in one."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile):
        self._stream = stream
        self.seek = stream.seek
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {human_bytes(size)}")
        return self._stream.read(size)


def _check_member(source: Path, member: tarfile.TarInfo, count: int) -> None:
    # Windows' rules know every separator, drive and root that any system knows.
    path = PureWindowsPath(member.name)
    problem = None
    if path.anchor:
        problem = "an absolute path"
    elif ".." in path.parts:
        problem = "a path out of the archive"
    elif not (member.isreg() or member.isdir()):
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}
        problem = kinds.get(member.type, "a device or another special file")
    elif count >= _MAX_MEMBERS:
        problem = f"more than {_MAX_MEMBERS} files"
    if problem:
        raise CheckpointError(
            f"an unsafe archive, nothing of it was used: {source}",
            found=f"{problem}: {member.name!r}",
            allowed="regular files and folders inside the archive",
            hint="do not trust this file; get the model from its maker",
        )


def _check_size(source: Path, total: int, allowed: int, folder: Path, size: int) -> None:
    if total > allowed:
        raise CheckpointError(
            f"an unsafe archive, nothing of it was used: {source}",
            found=f"it unpacks to {human_bytes(total)} or more",
            allowed=f"{human_bytes(allowed)} for a file of its size",
            hint="if you trust the file, unpack it with tar and name the folder instead",
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise GptError(
            f"not enough space to unpack {source}",
            found=f"{human_bytes(free)} free at {folder.parent}",
            allowed=f"{human_bytes(size)} for the next file in it",
            hint="free space, choose another output folder, or unpack it elsewhere and name that folder",
        )


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / member.name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    data = archive.extractfile(member)
    if data is None or target.exists():
        raise tarfile.ReadError(f"{member.name} is there twice")
    with open(target, "xb") as file:
        shutil.copyfileobj(data, file, 1 << 16)
    if target.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")


def _not_an_archive(source: Path, error: Exception) -> CheckpointError:
    if is_lfs_pointer(source):
        return CheckpointError(
            f"a Git LFS pointer instead of the archive: {source}",
            hint="run `git lfs install` and `git lfs pull` in its folder",
        )
    return CheckpointError(
        f"no archive, or a damaged one: {source}",
        found=str(error) or type(error).__name__,
        allowed="a tar file, plain or gzip",
        hint="download the file again",
    )


def find_config(folder: Path) -> Path:
    """The only model_config.yaml at or below `folder`.  Raises CheckpointError where there is none, or another."""
    found = sorted(path for path in folder.rglob(CONFIG_NAME) if path.is_file())
    if not found:
        hint = (
            "a training checkpoint keeps its configuration as pickled objects, which are not loaded: unpack it, "
            f"write the configuration into {CONFIG_NAME} beside the weights, and name the folder"
        )
        if (folder / "config.json").is_file():
            hint = "this looks like a Hugging Face model, which hf_gpt_convert.py converts"
        raise CheckpointError(f"no {CONFIG_NAME} in the archive", found=listing(folder), hint=hint)
    if len(found) > 1:
        raise CheckpointError(
            "several configurations in one archive",
            found=[str(path.relative_to(folder)) for path in found],
            allowed=f"one {CONFIG_NAME}",
            hint="name the folder of one model",
        )
    return found[0]


def has_prompts(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of a prompt-learning archive, not of a model."""
    return "task_templates" in config or config.get("peft") is not None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a yaml file.  Raises CheckpointError for damage, and for tags, which ask for objects."""
    import yaml

    size = path.stat().st_size
    if size > _MAX_YAML_BYTES:
        raise CheckpointError(f"too large for a configuration: {path.name}", found=human_bytes(size))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"refused or damaged: {path.name}",
            found=" ".join(str(error).split()) or type(error).__name__,
            allowed="yaml with plain values; tags are never followed",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"no list of keys and values: {path.name}", found=type(content).__name__)
    log.debug("%s: %s", path.name, content)
    return content


def weights_file(folder: Path) -> Path | None:
    """model_weights.ckpt of a folder, else its first `*last.ckpt`, else None."""
    named = folder / WEIGHTS_NAME
    if named.is_file():
        return named
    return next(iter(sorted(path for path in folder.glob("*last.ckpt") if path.is_file())), None)
