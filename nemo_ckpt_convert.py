#!/usr/bin/env python3
"""Converts a NeMo GPT (.nemo archive or its unpacked folder) into FasterTransformer binaries: `<out-dir>/<ranks>-gpu/`;
see docs/nemo.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.config_ini import CONFIG_NAME
from gpt.checkpoint.extend import check_unchanged, find_extendable
from gpt.checkpoint.nemo import NemoConfig, read_config
from gpt.checkpoint.nemo_archive import find_config, read_yaml, unpacked
from gpt.checkpoint.nemo_tokenizer import find_tokenizer, tokenizer_folder
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
    storage_type: str = "float32"
    load_checkpoints_on_gpu: bool = False
    verbose: bool = False
    force: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Converts `args.in_file` and returns the folder written, `<out_dir>/<tensor_parallelism>-gpu`.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for a model that cannot be converted;
    either way, and whatever else goes wrong, the output folder is as it was before.
    """
    _check(args)
    folder = Path(args.out_dir) / f"{args.tensor_parallelism}-gpu"
    source, dtype = Path(args.in_file), canonical_dtype(args.storage_type)
    earlier = find_extendable(folder, args.files, tool=Path(__file__).name, source=source, storage_dtype=dtype)
    # The archive is unpacked where the output goes: that is where there is space, and what goes wrong vanishes with it.
    with staged_folder(folder, force=args.force or earlier is not None, marker=CONFIG_NAME) as staging:
        with unpacked(source, staging / "unpacked") as content:
            _convert(args, content, staging)
        if not args.force:
            check_unchanged(earlier, staging)
    log.info("%s is complete", folder)
    return folder


def _convert(args: ProgArgs, content: Path, staging: Path) -> None:
    # Here and not above: --help and wrong arguments need no torch.
    from gpt.checkpoint.nemo_ranks import model_config, open_weights
    from gpt.checkpoint.nemo_weights import match_tensors
    from gpt.checkpoint.writer import Origin, Target, convert_command, write_checkpoint

    path = find_config(content)
    config = read_config(read_yaml(path))
    tokenizer = find_tokenizer(path.parent, config.tokenizer)
    weights = open_weights(path.parent, config.training)
    model = model_config(config, weights, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    tokenizer.check_against(model.vocab_size)
    check_divides(model, args.tensor_parallelism)
    pairs = match_tensors(model, weights)
    storage_dtype = canonical_dtype(args.storage_type)
    tool = Path(__file__).name
    command = convert_command(tool, args.in_file, args.out_dir, args.tensor_parallelism, storage_dtype, args.command())
    target = Target(staging, model, storage_dtype, args.tensor_parallelism)
    with tokenizer_folder(tokenizer) as location:
        written, calibration = quantize(args, target, pairs, location)
    write_checkpoint(
        target,
        written,
        {**_ini_section(config), **calibration},
        tokenizer.files,
        Origin(tool, command, Path(args.in_file)),
        in_flight=args.processes,
    )


def _check(args: ProgArgs) -> None:
    """Raises ConfigError for what cannot be honoured."""
    problems = Problems()
    check_options(args, problems)
    for name in ("tensor_parallelism", "processes"):
        value = getattr(args, name)
        if value < 1:
            problems.add(f"{name}: found {value}, allowed: 1 or more")
    problems.raise_if_any(ConfigError, "these arguments are not valid")
    canonical_dtype(args.storage_type)
    if args.load_checkpoints_on_gpu:
        log.info("--load-checkpoints-on-gpu has no effect: the files are converted as a stream, on the CPU")


def _ini_section(config: NemoConfig) -> dict[str, object]:
    """The tokenizer's names, which tell where to find one that is not in the archive."""
    return {f"tokenizer_{key}": config.tokenizer[key] for key in ("library", "type") if config.tokenizer.get(key)}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-dir", required=True, help="where <ranks>-gpu/ is made; the archive is unpacked there")
    add("-i", "--in-file", required=True, help="the .nemo archive, or a folder with its content")
    add("-tp", "--tensor-parallelism", type=positive_int, default=1, help="number of ranks to cut the weights for")
    add("-p", "--processes", type=positive_int, default=4, help="tensors in flight, each in memory whole")
    add("-t", "--storage-type", choices=FLOAT_DTYPES, default="float32", help="dtype of the files")
    add("--load-checkpoints-on-gpu", action="store_true", help="accepted, no effect: no GPU is needed")
    add("--verbose", action="store_true", help="the same as --log_level debug")
    add("--force", action="store_true", help="replace a checkpoint that is already there")
    add_log_level(parser)
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    level = options.pop("log_level")
    setup_logging("debug" if options["verbose"] else level)
    args = ProgArgs(**options)

    def convert() -> None:
        print_banner("Argument", args.arguments())
        run_conversion(args)

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
