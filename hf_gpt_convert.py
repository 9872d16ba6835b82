#!/usr/bin/env python3
"""Converts a Hugging Face GPT-2, SantaCoder or StarCoder into FasterTransformer binaries: `<out-dir>/<ranks>-gpu/`,
described in docs/checkpoint-format.md."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint import hf, hf_families, hf_files
from gpt.cli import ArgumentParser, run_main
from gpt.console import log, print_banner, setup_logging
from gpt.mapping import check_divides
from gpt.text.conversion import ConversionArgs, Converted, add_conversion_flags, new_checkpoint, write_converted

_TOOL = Path(__file__).name


@dataclass(frozen=True)
class ProgArgs(ConversionArgs):
    """One field per flag."""

    model: str | None = None
    load_model_on_cpu: bool = False
    convert_model_on_cpu: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Converts `args.in_file` and returns the folder written, `<out_dir>/<tensor_parallelism>-gpu`.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for a model that cannot be converted;
    either way, and whatever else goes wrong, the output folder is as it was before.
    """
    args.check()
    if args.load_model_on_cpu or args.convert_model_on_cpu:
        log.info("--load-model-on-cpu and --convert-model-on-cpu have no effect: the files are converted as a stream")
    source = Path(args.in_file)
    hf_files.check_folder(source)
    family, config, model = hf.read_model(source, args.model)
    check_divides(model, args.tensor_parallelism)
    weights = hf_files.open_weights(source)
    model = hf.with_own_head(model, weights)
    pairs = hf.match_tensors(family, model, weights)
    tokenizer_files = {path.name: path for path in hf_files.find_tokenizer(source)}
    found = Converted(model, pairs, _ini_section(args, family.name, config), tokenizer_files)
    with new_checkpoint(args, _TOOL) as staging:
        write_converted(args, _TOOL, staging, found, source)
    return args.folder


def _ini_section(args: ProgArgs, family: str, config: dict[str, Any]) -> dict[str, object]:
    """Arguments, then config.json; what readers use is added by the writer and wins."""
    section = {**args.arguments(), "model": args.model or family, **config}
    return {key: value for key, value in section.items() if re.fullmatch(r"[A-Za-z_][\w.-]*", key)}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_conversion_flags(
        parser, in_file="the model's folder: config.json, weights, tokenizer", processes="about 20 MiB of memory each"
    )
    add = parser.add_argument
    add("--model", choices=hf_families.FAMILY_NAMES, help="what the model must be; left out, config.json tells")
    add("--load-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
    add("--convert-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
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
