#!/usr/bin/env python3
"""Checks checkpoints, engine folders, Hugging Face models, .nemo archives and prompt tables without running them, and,
started by mpirun or srun with --ranks, whether the ranks of a job can work together."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import ArgumentParser, add_log_level, reject_unsupported, run_main
from gpt.comm import active
from gpt.console import setup_logging
from gpt.engine.inspection import inspect
from gpt.errors import CheckpointError, ConfigError, GptError
from gpt.runtime import rank_check
from gpt.runtime.rank_check import check_ranks
from gpt.text.inspection import add_tokenizer, as_json, as_text


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, epilog="Exit code: 0 if everything is fine, 3 if there are problems, 1 with --ranks."
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="folder or file to check")
    parser.add_argument("--no_checksums", action="store_true", help="do not compare the bytes with their checksums")
    parser.add_argument("--no_values", action="store_true", help="do not look for NaN and infinity among the values")
    parser.add_argument("--json", action="store_true", help="print a list of objects: path, kind, facts, problems")
    group = parser.add_argument_group("ranks of a job (mpirun -np N python3 check.py --ranks)")
    group.add_argument("--ranks", action="store_true", help="check machines, devices, links, sums and their speed")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for each part of the check")
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: _run(args))


def _run(args: Namespace) -> int:
    if args.ranks:
        return _run_ranks(args)
    if not args.paths:
        raise ConfigError("nothing to check", allowed="one PATH or more, or --ranks")
    results = []
    for path in args.paths:
        result = inspect(path, checksums=not args.no_checksums, values=not args.no_values)
        add_tokenizer(result)
        results.append(result)
        if not args.json:
            print(as_text(result), end="\n\n" if path is not args.paths[-1] else "\n", flush=True)
    if args.json:
        print(json.dumps([as_json(result) for result in results], indent=2))
    return CheckpointError.exit_code if any(result.problems for result in results) else 0


def _run_ranks(args: Namespace) -> int:
    problems = []
    if args.paths:
        problems.append("--ranks looks at machines; folders and files are checked by one process, without it")
    if not 0.1 <= args.timeout <= 1e6:
        problems.append(f"--timeout {args.timeout:g}: allowed are 0.1 to 1e6 seconds")
    reject_unsupported(problems)
    result = check_ranks(args.device, args.timeout)
    if active().rank == 0:
        print(json.dumps(result.as_json(), indent=2) if args.json else rank_check.as_text(result), flush=True)
    return GptError.exit_code if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
