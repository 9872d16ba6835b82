"""Files that are either whole or absent, and a few things every reader of big files needs."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gpt.errors import ConfigError

_LFS_MAGIC = b"version https://git-lfs"
_READ_BYTES = 1 << 22
_MAX_LISTED = 8


@contextmanager
def staged_folder(target: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """Yields a hidden folder beside `target` that becomes `target` when the block ends well and vanishes otherwise.

    A killed process leaves only the hidden folder; the next call for the same target removes it.  An older target is
    replaced with `force` alone, after the new one is complete, and only if it holds the file `marker` or nothing.

    Raises ConfigError where `target` may not be replaced.
    """
    _clean_up(target)
    _check_replaceable(target, force=force, marker=marker)
    staging = _sibling(target, "partial")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        yield staging
        _check_replaceable(target, force=force, marker=marker)  # it may have appeared meanwhile
        _move_into_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            for parent in new_parents:
                parent.rmdir()
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write that becomes `path` when the block ends well: readers see the old file or the new one.

    A link is followed; a device or a pipe is written to, since a file may not take its place.
    """
    path = path.resolve()
    in_place = path.exists() and not path.is_file()
    partial = path if in_place else path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
        if not in_place:
            partial.replace(path)
    except OSError as error:  # of a failed write Python does not say which file it was
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        if not in_place:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `path` so that a reader sees the old text or the new one, never a part."""
    with whole_file(path) as file:
        file.write(text.encode())


def file_checksum(path: Path) -> str:
    """xxh3_128 of the file's bytes as 32 hexadecimal digits."""
    import xxhash

    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def listing(folder: Path) -> str:
    """The first names in a folder, for messages: `a, b, ...`."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = ["..."] if len(names) > _MAX_LISTED else []
    return ", ".join([*names[:_MAX_LISTED], *more]) or "an empty folder"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` holds the few lines that git leaves where a large file was not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(_LFS_MAGIC)) == _LFS_MAGIC


def check_folder_place(folder: Path) -> None:
    """Raises ConfigError where `folder` is a file or would be made below one."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError("the output path is a file", found=nearest, allowed="a folder that can be made")


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{socket.gethostname()}-{os.getpid()}")


def _check_replaceable(target: Path, *, force: bool, marker: str) -> None:
    check_folder_place(target)
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / marker).exists():
        raise ConfigError(
            f"the output folder holds something else and is left alone: {target}",
            found=listing(target),
            allowed=f"an absent or empty folder, or one with {marker}",
            hint="choose another output folder",
        )
    if not force:
        raise ConfigError(
            f"the output folder is in use: {target}",
            found=listing(target),
            allowed="an absent or empty folder",
            hint="choose another output folder, or replace this one with --force",
        )


def _move_into_place(staging: Path, target: Path) -> None:
    old = _sibling(target, "old")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Removes what dead processes of this machine left beside `target`.

    One that died between the two renames of `_move_into_place` had set a good folder aside: that one goes back.
    """
    for role in ("old", "partial"):
        prefix = f".{target.name}.{role}-{socket.gethostname()}-"
        for entry in sorted(target.parent.glob(prefix.replace("[", "[[]") + "*")):
            pid = entry.name[len(prefix) :]
            if not pid.isdigit() or _is_another_live_process(int(pid)):
                continue
            if role == "old" and not target.exists():
                entry.rename(target)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _is_another_live_process(pid: int) -> bool:
    if pid == os.getpid():  # containers reuse small numbers
        return False
    if os.name == "nt":  # signal 0 is no question there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
