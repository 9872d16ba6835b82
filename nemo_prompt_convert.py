#!/usr/bin/env python3
"""Converts prompt-learning archives and PEFT prompt-tuning adapters into one table of virtual tokens (.npy) for
run.py --prompt_table; see docs/nemo.md."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.prompt_table import TaskEntry, description_path, read_tasks, write_table
from gpt.cli import ArgumentParser, add_log_level, run_main
from gpt.console import log, print_banner, setup_logging
from gpt.errors import ConfigError


@dataclass(frozen=True)
class ProgArgs:
    """One field per flag."""

    out_file: str
    in_file: tuple[str, ...]
    storage_type: str = "fp32"
    verbose: bool = False
    force: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Reads `args.in_file` one after the other, writes one table, prints its tasks and returns its path.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for files that cannot be used; either way
    an older table is as it was before.
    """
    started = time.perf_counter()
    path = Path(args.out_file)
    if path.suffix != ".npy":
        path = path.with_name(path.name + ".npy")
    if not args.in_file:
        raise ConfigError("no input", hint="--in-file names the archives")
    for existing in (path, description_path(path)):
        if existing.exists() and not args.force:
            raise ConfigError("the output is there already", found=existing, hint="replace it with --force")
    if args.storage_type != "fp32":
        log.info("--storage-type %s has no effect: the table is float32, run.py casts it", args.storage_type)
    tasks = [task for name in args.in_file for task in read_tasks(Path(name))]
    write_table(path, tasks)
    entries = [TaskEntry.of(index, task) for index, task in enumerate(tasks)]
    for entry in entries:
        print(f"Task {entry.id}: {entry.name} ({entry.virtual_tokens} virtual tokens)")
    longest = max(entry.virtual_tokens for entry in entries)
    print(f"for build.py: --max_prompt_embedding_table_size {len(entries) * longest}")
    log.info("%d tasks of up to %d tokens, %.1f s: %s", len(tasks), longest, time.perf_counter() - started, path)
    return path


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-file", required=True, help="the table; .npy is appended if the name lacks it")
    add(
        *("-i", "--in-file"),
        required=True,
        action="extend",
        nargs="+",
        help="prompt-learning archive, its unpacked folder, folder of a PEFT adapter, or a table made here; several "
        "are merged in this order",
    )
    add("-t", "--storage-type", choices=("fp32", "fp16"), default="fp32", help="accepted, no effect: always float32")
    add("--verbose", action="store_true", help="the same as --log_level debug")
    add("--force", action="store_true", help="replace a table that is already there")
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    level = options.pop("log_level")
    setup_logging("debug" if options["verbose"] else level)
    args = ProgArgs(**{**options, "in_file": tuple(options["in_file"])})

    def convert() -> None:
        print_banner("Argument", dataclasses.asdict(args))
        run_conversion(args)

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
