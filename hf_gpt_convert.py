#!/usr/bin/env python3
"""Converts a Hugging Face GPT-2, SantaCoder or StarCoder into FasterTransformer binaries: `<out-dir>/<ranks>-gpu/`,
described in docs/checkpoint-format.md."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint import hf, hf_families, hf_files
from gpt.checkpoint.config_ini import CONFIG_NAME
from gpt.checkpoint.extend import check_unchanged, find_extendable
from gpt.cli import ArgumentParser, add_log_level, positive_int, run_main
from gpt.console import log, print_banner, setup_logging
from gpt.dtypes import FLOAT_DTYPES, canonical_dtype
from gpt.errors import ConfigError, Problems
from gpt.files import staged_folder
from gpt.mapping import check_divides
from gpt.text.quantize import QuantOptions, add_flags, check_options, quantize


@dataclass(frozen=True)
class ProgArgs(QuantOptions):
    """One field per flag."""

    out_dir: str
    in_file: str
    tensor_parallelism: int = 1
    processes: int = 4
    model: str | None = None
    storage_type: str = "float32"
    load_model_on_cpu: bool = False
    convert_model_on_cpu: bool = False
    force: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Converts `args.in_file` and returns the folder written, `<out_dir>/<tensor_parallelism>-gpu`.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for a model that cannot be converted;
    either way, and whatever else goes wrong, the output folder is as it was before.
    """
    storage_dtype = _check(args)
    source = Path(args.in_file)
    hf_files.check_folder(source)
    family, config, model = hf.read_model(source, args.model)
    check_divides(model, args.tensor_parallelism)
    pairs = hf.match_tensors(family, model, hf_files.open_weights(source))
    tokenizer_files = {path.name: path for path in hf_files.find_tokenizer(source)}
    folder = Path(args.out_dir) / f"{args.tensor_parallelism}-gpu"
    tool = Path(__file__).name
    earlier = find_extendable(folder, args.files, tool=tool, source=source, storage_dtype=storage_dtype)
    with staged_folder(folder, force=args.force or earlier is not None, marker=CONFIG_NAME) as staging:
        # Here and not above: --help and wrong arguments need no torch.
        from gpt.checkpoint.writer import Origin, Target, convert_command, write_checkpoint

        target = Target(staging, model, storage_dtype, args.tensor_parallelism)
        command = convert_command(
            tool, args.in_file, args.out_dir, args.tensor_parallelism, storage_dtype, args.command()
        )
        written, calibration = quantize(args, target, pairs, source)
        section = _ini_section(dataclasses.replace(args, model=args.model or family.name), config)
        write_checkpoint(
            target,
            written,
            {**section, **calibration},
            tokenizer_files,
            Origin(tool, command, source),
            in_flight=args.processes,
        )
        if not args.force:
            check_unchanged(earlier, staging)
    log.info("%s is complete", folder)
    return folder


def _check(args: ProgArgs) -> str:
    """The storage dtype's full name.  Raises ConfigError for what cannot be honoured."""
    problems = Problems()
    check_options(args, problems)
    for name in ("tensor_parallelism", "processes"):
        value = getattr(args, name)
        if value < 1:
            problems.add(f"{name}: found {value}, allowed: 1 or more")
    problems.raise_if_any(ConfigError, "these arguments are not valid")
    if args.load_model_on_cpu or args.convert_model_on_cpu:
        log.info("--load-model-on-cpu and --convert-model-on-cpu have no effect: the files are converted as a stream")
    return canonical_dtype(args.storage_type)


def _ini_section(args: ProgArgs, config: dict[str, Any]) -> dict[str, object]:
    """Arguments, then config.json; what readers use is added by the writer and wins."""
    section = {**args.arguments(), **config}
    return {key: value for key, value in section.items() if re.fullmatch(r"[A-Za-z_][\w.-]*", key)}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-dir", required=True, help="where <ranks>-gpu/ is made")
    add("-i", "--in-file", required=True, help="the model's folder: config.json, weights, tokenizer")
    add("-tp", "--tensor-parallelism", type=positive_int, default=1, help="number of ranks to cut the weights for")
    add("-p", "--processes", type=positive_int, default=4, help="tensors in flight, about 20 MiB of memory each")
    add("--model", choices=hf_families.FAMILY_NAMES, help="what the model must be; left out, config.json tells")
    add("-t", "--storage-type", choices=FLOAT_DTYPES, default="float32", help="dtype of the files")
    add("--load-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
    add("--convert-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
    add("--force", action="store_true", help="replace a checkpoint that is already there")
    add_log_level(parser)
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    setup_logging(options.pop("log_level"))
    args = ProgArgs(**options)

    def convert() -> None:
        print_banner("Arguments", args.arguments())
        run_conversion(args)

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
