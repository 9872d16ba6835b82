"""What every benchmark shares: the machine in words, medians with their spread, one CSV format."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity in one unit."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"


def describe_device() -> str:
    """Processor and core count, or the GPU's name where one is used."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def describe_versions(*packages: str) -> str:
    return " ".join([f"python {platform.python_version()}", *(f"{package} {version(package)}" for package in packages)])


def append_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Appends rows with the date and the command that made them; writes the header of a new file."""
    command = shlex.join(["python3", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])])
    stamped = [{"date": datetime.now(timezone.utc).date().isoformat(), **row, "command": command} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(stamped[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(stamped)
    print(f"appended {len(stamped)} rows to {path}")
