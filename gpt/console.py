"""What a person sees while a script works: log lines and progress on stderr, results on stdout."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from threading import Timer
from typing import Any

from gpt.launch import read_launch

LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug")
_PYTHON_LEVELS = dict(zip(LOG_LEVELS, (50, 40, 30, 20, 15, 10), strict=True))
_LETTERS = {50: "F", 40: "E", 30: "W", 20: "I", 15: "V", 10: "D"}

log = logging.getLogger("gpt")
_state = {"level": "info"}
_LOG_INTERVAL_S = 30.0


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.letter = _LETTERS.get(record.levelno, "I")
        return super().format(record)


def setup_logging(level: str) -> None:
    """Sends the log of this package to stderr; `level` is one of LOG_LEVELS.

    Among several ranks, lines carry theirs.  Where stdout or stderr is closed, what they are given goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    launch = read_launch()
    rank = f" [rank {launch.rank}]" if launch.size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"[%(asctime)s] [gpt]{rank} [%(letter)s] %(message)s", "%m/%d/%Y-%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    threshold = _PYTHON_LEVELS[level]
    if launch.rank > 0 and threshold >= logging.INFO:
        threshold = max(threshold, logging.ERROR)  # rank 0 says the same; verbose and debug show all ranks
    log.setLevel(threshold)
    _state["level"] = level


def get_level() -> str:
    return _state["level"]


def verbose(message: str) -> None:
    log.log(_PYTHON_LEVELS["verbose"], message)


def print_notice(message: str) -> None:
    """On stderr at every log level, from the first rank: what was done to the user's input on request, and why a run
    was slow that will not be the next time."""
    if read_launch().rank == 0:
        print(message, file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def print_banner(title: str, arguments: Mapping[str, object]) -> None:
    """The argument list the original converters print: one `name: value` line each."""
    print(f"\n=============== {title} ===============")
    for name, value in arguments.items():
        print(f"{name}: {value}")
    print("=" * 40, flush=True)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    what: str,
    unit: str = "it",
    initial: int = 0,
    always: bool = False,
) -> Any:
    """A tqdm bar on stderr; where that is no terminal, a line of the log now and then.  Silent when the log level is
    above info, unless `always` and on a terminal.

    initial: what was done before, which the estimate leaves out.
    """
    from tqdm import tqdm  # the field's progress bar

    shows, told = sys.stderr.isatty(), log.isEnabledFor(logging.INFO)
    lines = {"file": _LogLines(), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"}
    scaled = unit == "B"
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=scaled,
        unit_divisor=1024,
        leave=False,
        disable=not (told or (shows and always)),
        **({"file": sys.stderr} if shows else lines),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _LogLines:
    """A file that takes a bar and makes lines of the log of it: one per interval however often the bar is drawn, and
    one where it is drawn once and the work then says nothing for long."""

    def __init__(self) -> None:
        self._line = ""
        self._timer: Timer | None = None

    def write(self, text: str) -> None:
        self._line = text.strip()
        if self._timer is None and self._line:
            self._timer = Timer(_LOG_INTERVAL_S, self._tell)
            self._timer.daemon = True
            self._timer.start()
        elif self._timer is not None and not self._line:  # so a bar ends
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        line, self._timer = self._line, None
        if line:
            log.info(line)

    def flush(self) -> None:
        pass


def human_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def human_time(seconds: float) -> str:
    """HH:MM:SS, as the original build prints its times, with the hours not wrapped at a day."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
