#!/usr/bin/env python3
"""Checks checkpoints, engine folders, Hugging Face models, .nemo archives and prompt tables without running them; shows
an engine's network; finds the first tensor in which two engines differ; and, started by mpirun or srun with --ranks,
tells whether the ranks of a job can work together."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.comm import active
from gpt.console import log, setup_logging
from gpt.engine.folder import open_engine
from gpt.engine.inspection import inspect
from gpt.errors import CheckpointError, ConfigError, GptError
from gpt.files import write_text
from gpt.runtime import rank_check
from gpt.runtime.rank_check import check_ranks
from gpt.text.inspection import add_tokenizer, as_json, as_text

_TIMEOUT_S = 60.0
_DIFFERENT = 1  # the exit code of --diff where something does


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        epilog="Exit code: 0 if everything is fine, 3 if there are problems, 1 with --ranks and if engines differ.",
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="folder or file to check")
    parser.add_argument("--no_checksums", action="store_true", help="do not compare the bytes with their checksums")
    parser.add_argument("--no_values", action="store_true", help="do not look for NaN and infinity among the values")
    parser.add_argument("--json", action="store_true", help="print a list of objects: path, kind, facts, problems")
    network = parser.add_argument_group("the network of an engine, as TensorRT gets it from its configuration")
    network.add_argument("--layers", action="store_true", help="print its layers: kind, operation, shape, type, bytes")
    network.add_argument("--graph", type=Path, metavar="FILE.svg", help="draw its operations")
    network.add_argument("--rank", type=int, help="whose network, of an engine of several ranks (default: 0)")
    difference = parser.add_argument_group("two engines of one model")
    difference.add_argument(
        "--diff", action="store_true", help="run both on a CPU (of a TensorRT engine its network) and compare tensors"
    )
    difference.add_argument(
        "--bound",
        type=float,
        help="--diff: relative L2 that is no difference, in the engines' own types (default: by these; "
        "4e-2, computed in float32, where values are rounded to integers, 1e-1 to FP8)",
    )
    group = parser.add_argument_group("ranks of a job (mpirun -np N python3 check.py --ranks)")
    group.add_argument("--ranks", action="store_true", help="check machines, devices, links, sums and their speed")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS", help="for each part of the check"
    )
    tuning = parser.add_argument_group("launch parameters of an engine's kernels, kept beside it for this kind of GPU")
    tuning.add_argument(
        "--tune", type=positive_int, nargs="+", metavar="BATCH", help="measure them for decoding so many sequences"
    )
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: _run(args))


def _run(args: Namespace) -> int:
    _check_flags(args)
    if args.ranks:
        return _run_ranks(args)
    if not args.paths:
        raise ConfigError("nothing to check", allowed="one PATH or more, or --ranks")
    if args.tune:
        return _tune(args)
    if args.diff:
        return _diff(args)
    if args.layers or args.graph is not None:
        return _show_network(args)
    if absent := [path for path in args.paths if not path.exists()]:
        raise ConfigError("nothing to check at these paths, and none was looked at", found=absent)
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


def _check_flags(args: Namespace) -> None:
    """One thing is done at a time; what belongs to another is said to have no effect."""
    shows = args.layers or args.graph is not None
    kinds = {"--ranks": args.ranks, "--tune": bool(args.tune), "--diff": args.diff, "--layers or --graph": shows}
    chosen = [flag for flag, given in kinds.items() if given]
    if len(chosen) > 1:
        raise ConfigError("each of these does something else", found=", ".join(chosen), allowed="one of them")
    kind = "".join(chosen)
    for given, text in (
        (args.json and kind not in ("", "--ranks"), f"--json with {kind}"),
        ((args.no_checksums or args.no_values) and kind != "", f"--no_checksums, --no_values with {kind}"),
        (args.rank is not None and not shows, "--rank without --layers and --graph"),
        (args.bound is not None and not args.diff, "--bound without --diff"),
        ((args.device, args.timeout) != ("auto", _TIMEOUT_S) and not args.ranks, "--device, --timeout without --ranks"),
    ):
        if given:
            log.warning("%s: no effect", text)


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


def _show_network(args: Namespace) -> int:
    if len(args.paths) != 1:
        raise ConfigError("--layers and --graph show one engine", found=f"{len(args.paths)} paths")
    info = open_engine(args.paths[0])
    rank = args.rank or 0
    if not 0 <= rank < info.build.world_size:
        raise ConfigError(f"no rank {rank}", allowed=f"0 to {info.build.world_size - 1}")
    if args.graph is not None and args.graph.suffix != ".svg":
        raise ConfigError("--graph draws SVG", found=str(args.graph), allowed="a name that ends in .svg")
    from gpt.engine import trt_graph

    network = trt_graph.config_network(info.model, info.build, rank)
    layers = trt_graph.network_layers(network.network)
    if args.layers:
        for line in trt_graph.table(layers, trt_graph.network_inputs(network.network)):
            print(line)
    if args.graph is not None:
        write_text(args.graph, trt_graph.picture(trt_graph.operations(layers)))
        log.info("Picture of %d layers: %s", len(layers), args.graph)
    return 0


def _tune(args: Namespace) -> int:
    if len(args.paths) != 1:
        raise ConfigError("--tune measures one engine", found=f"{len(args.paths)} paths")
    info = open_engine(args.paths[0])
    from gpt.runtime.tune import tune_engine

    log.info("Launch parameters: %s", tune_engine(info, args.tune))
    return 0


def _diff(args: Namespace) -> int:
    if len(args.paths) != 2:
        raise ConfigError("--diff compares two engines", found=f"{len(args.paths)} paths", allowed="two")
    from gpt.runtime.trace import compare_engines

    comparison = compare_engines(*(open_engine(path) for path in args.paths), bound=args.bound)
    for line in comparison.lines():
        print(line)
    return 0 if comparison.first is None else _DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
