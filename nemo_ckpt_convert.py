#!/usr/bin/env python3
"""Converts a NeMo GPT (.nemo archive or its unpacked folder) into FasterTransformer binaries: `<out-dir>/<ranks>-gpu/`;
see docs/nemo.md."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.nemo import NemoConfig, read_config
from gpt.checkpoint.nemo_archive import find_config, has_prompts, read_yaml, unpacked
from gpt.checkpoint.nemo_ranks import model_config, open_weights
from gpt.checkpoint.nemo_tokenizer import find_tokenizer, tokenizer_folder
from gpt.checkpoint.nemo_weights import match_tensors
from gpt.cli import ArgumentParser, run_main
from gpt.console import log, print_banner, setup_logging
from gpt.errors import ConfigError
from gpt.mapping import check_divides
from gpt.text.conversion import ConversionArgs, Converted, add_conversion_flags, new_checkpoint, write_converted

_TOOL = Path(__file__).name


@dataclass(frozen=True)
class ProgArgs(ConversionArgs):
    """One field per flag."""

    load_checkpoints_on_gpu: bool = False
    verbose: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Converts `args.in_file` and returns the folder written, `<out_dir>/<tensor_parallelism>-gpu`.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for a model that cannot be converted;
    either way, and whatever else goes wrong, the output folder is as it was before.
    """
    args.check()
    if args.load_checkpoints_on_gpu:
        log.info("--load-checkpoints-on-gpu has no effect: the files are converted as a stream, on the CPU")
    # The archive is unpacked where the output goes: that is where there is space, and what goes wrong vanishes with it.
    with new_checkpoint(args, _TOOL) as staging, unpacked(Path(args.in_file), staging / "unpacked") as content:
        _convert(args, content, staging)
    return args.folder


def _convert(args: ProgArgs, content: Path, staging: Path) -> None:
    path = find_config(content)
    values = read_yaml(path)
    if has_prompts(values) and "num_layers" not in values:
        hint = "nemo_prompt_convert.py makes the table for run.py --prompt_table"
        raise ConfigError("this archive holds prompts, no model", found=args.in_file, hint=hint)
    config = read_config(values)
    tokenizer = find_tokenizer(path.parent, config.tokenizer)
    weights = open_weights(path.parent, config.training)
    model = model_config(config, weights, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    tokenizer.check_against(model.vocab_size)
    check_divides(model, args.tensor_parallelism)
    found = Converted(model, match_tensors(model, weights), _ini_section(config), tokenizer.files)
    with tokenizer_folder(tokenizer) as location:
        write_converted(args, _TOOL, staging, found, location)


def _ini_section(config: NemoConfig) -> dict[str, object]:
    """The tokenizer's names, which tell where to find one that is not in the archive."""
    return {f"tokenizer_{key}": config.tokenizer[key] for key in ("library", "type") if config.tokenizer.get(key)}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_conversion_flags(
        parser,
        in_file="the .nemo archive, which is unpacked in <out-dir>, or a folder with its content",
        processes="each in memory whole",
    )
    add = parser.add_argument
    add("--load-checkpoints-on-gpu", action="store_true", help="accepted, no effect: no GPU is needed")
    add("--verbose", action="store_true", help="the same as --log_level debug")
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
