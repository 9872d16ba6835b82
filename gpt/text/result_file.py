"""Results that survive: JSON lines in the order of the input, appended as they come, continued after a kill.

Beside FILE stands FILE.job.json, which says what the lines were made from and how.  A continuation must be the same
work.  Whole lines are what counts: one that was cut short by a kill or a full disk is taken away first.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.console import log
from gpt.errors import ConfigError, GptError
from gpt.files import whole_file

# A power cut loses at most what came since; a killed process loses nothing that was appended.
_SYNC_INTERVAL_S = 1.0
_FORMAT = 1


def job_path(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(path.name + ".job.json")


def read_job(path: Path) -> dict[str, Any] | None:
    """What FILE.job.json says; None where there is none.  Raises ConfigError for one that cannot be read."""
    try:
        job = json.loads(job_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{job_path(path)} cannot be read", found=error) from error
    if not isinstance(job, dict) or job.pop("format", None) != _FORMAT:
        raise ConfigError(f"{job_path(path)} is of another version", hint="choose another --output_file")
    return job


class ResultFile:
    """Open for appending; held alone, so that two processes cannot write the same results.

    A pipe or a device takes the lines and keeps nothing that could be gone on with."""

    def __init__(self, path: Path, job: dict[str, Any], *, resume: bool):
        """job: values that JSON has, what the work is.

        Raises ConfigError where there are results already and `resume` is false, where they are those of other work,
        and where another process writes them.
        """
        self.path = path
        self._keeps = path.is_file() or not path.exists()
        self.num_done = self._end = 0
        self._synced = time.monotonic()
        if not self._keeps:
            if resume:
                raise ConfigError(f"{path} is a pipe or a device, which --resume cannot go on with")
            self._file = os.open(path, os.O_WRONLY)
            return
        job = json.loads(json.dumps(job, default=str))
        _check_job(path, job, resume=resume)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(self._file)
            self.num_done, self._end = _count_whole(path)
            if self._end < path.stat().st_size:
                log.warning("%s: its last line was cut short and is made again", path)
                os.ftruncate(self._file, self._end)
            if read_job(path) is None:
                with whole_file(job_path(path)) as file:
                    file.write(json.dumps({"format": _FORMAT, **job}, indent=2, ensure_ascii=False).encode() + b"\n")
        except BlockingIOError:
            os.close(self._file)
            raise ConfigError(f"another process writes {path}", hint="wait for it, or end it") from None
        except BaseException:
            os.close(self._file)
            raise

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes one line per record.  Raises GptError where the disk is full; the file ends with a whole line then."""
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[os.write(self._file, data) :]
            if self._keeps and time.monotonic() - self._synced > _SYNC_INTERVAL_S:
                self._sync()
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise GptError(
                f"{self.path} cannot be written further: {error.strerror}",
                found=f"{self.num_done} results are in it",
                hint="make room, then the same command with --resume goes on from there",
            ) from error
        self.num_done += len(lines)
        self._end += sum(map(len, lines))

    def close(self) -> None:
        with suppress(OSError):  # a device or pipe that cannot be synced
            self._sync()
        os.close(self._file)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()


def _lock(file: int) -> None:
    """Raises BlockingIOError where another process has it.  The system lets go when the process ends, however."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_job(path: Path, job: dict[str, Any], *, resume: bool) -> None:
    is_used = path.exists() and path.stat().st_size > 0
    earlier = read_job(path)
    if is_used and not resume:
        raise ConfigError(
            f"there are results in {path}",
            hint="--resume goes on with them; else remove the file or choose another --output_file",
        )
    if is_used and earlier is None:
        raise ConfigError(f"{path} is not the beginning of this work", found=f"no {job_path(path).name} beside it")
    if not is_used and not resume:
        job_path(path).unlink(missing_ok=True)
        return
    if earlier is not None and earlier != job:
        earlier, job = _flat(earlier), _flat(job)
        different = [key for key in {**earlier, **job} if earlier.get(key) != job.get(key)]
        raise ConfigError(
            f"{path} holds the results of other work",
            found=[f"{key}: {earlier.get(key)} there, {job.get(key)} now" for key in different],
            hint="run it as it was, or choose another --output_file",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _count_whole(path: Path) -> tuple[int, int]:
    """How many lines are whole, and the bytes they take.  Raises ConfigError for lines that are not ours."""
    count = end = 0
    if path.stat().st_size == 0:
        return 0, 0
    with open(path, "rb") as file:
        for line in file:
            if not _is_record(line, count):
                if file.read(1):
                    raise ConfigError(f"{path} has been changed", found=f"line {count + 1} is not result {count}")
                break
            count += 1
            end += len(line)
    return count, end


def _is_record(line: bytes, index: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("index") == index
