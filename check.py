#!/usr/bin/env python3
"""Checks checkpoints, engine folders, Hugging Face models, .nemo archives and prompt tables without running them."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import ArgumentParser, add_log_level, run_main
from gpt.console import setup_logging
from gpt.engine.inspection import inspect
from gpt.errors import CheckpointError
from gpt.text.inspection import add_tokenizer, as_json, as_text


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, epilog="Exit code: 0 if everything is fine, 3 if there are problems.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder or file to check")
    parser.add_argument("--no_checksums", action="store_true", help="do not compare the bytes with their checksums")
    parser.add_argument("--no_values", action="store_true", help="do not look for NaN and infinity among the values")
    parser.add_argument("--json", action="store_true", help="print a list of objects: path, kind, facts, problems")
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: _run(args))


def _run(args: Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
