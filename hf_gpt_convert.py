#!/usr/bin/env python3
"""Converts a Hugging Face GPT-2, SantaCoder or StarCoder into FasterTransformer binaries: `<out-dir>/<ranks>-gpu/`,
described in docs/checkpoint-format.md."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt
from gpt.checkpoint import hf, hf_families, hf_files
from gpt.checkpoint.store import CONFIG_NAME
from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.config import ModelConfig
from gpt.console import human_bytes, log, print_banner, setup_logging
from gpt.dtypes import FLOAT_DTYPES, canonical_dtype
from gpt.errors import ConfigError, Problems
from gpt.files import staged_folder
from gpt.mapping import check_divides


@dataclass(frozen=True)
class ProgArgs:
    """One field per flag."""

    out_dir: str
    in_file: str
    tensor_parallelism: int = 1
    processes: int = 4
    calibrate_kv_cache: bool = False
    smoothquant: float | None = None
    model: str | None = None
    storage_type: str = "float32"
    dataset_cache_dir: str | None = None
    load_model_on_cpu: bool = False
    convert_model_on_cpu: bool = False
    force: bool = False


def run_conversion(args: ProgArgs) -> Path:
    """Converts `args.in_file` and returns the folder written, `<out_dir>/<tensor_parallelism>-gpu`.

    Raises ConfigError for arguments that cannot be honoured, CheckpointError for a model that cannot be converted;
    either way, and whatever else goes wrong, the output folder is as it was before.
    """
    started = time.perf_counter()
    storage_dtype = _check(args)
    source = Path(args.in_file)
    hf_files.check_folder(source)
    family, config, model = hf.read_model(source, args.model)
    check_divides(model, args.tensor_parallelism)
    pairs = hf.match_tensors(family, model, hf_files.open_weights(source))
    tokenizer_files = hf_files.find_tokenizer(source)
    target = Path(args.out_dir) / f"{args.tensor_parallelism}-gpu"
    with staged_folder(target, force=args.force, marker=CONFIG_NAME) as staging:
        # Here and not above: --help and wrong arguments need no torch.
        from gpt.checkpoint.manifest import Manifest
        from gpt.checkpoint.writer import Target, write_config, write_tensors

        write_target = Target(staging, model, storage_dtype, args.tensor_parallelism)
        files = write_tensors(write_target, pairs, in_flight=args.processes)
        write_config(staging, _ini_section(dataclasses.replace(args, model=args.model or family.name), config, model))
        for path in tokenizer_files:
            shutil.copyfile(path, staging / path.name)
        Manifest(
            tool=Path(__file__).name,
            tool_version=gpt.__version__,
            command=_command(args),
            source=str(source.resolve()),
            model=model,
            storage_dtype=storage_dtype,
            tensor_parallelism=args.tensor_parallelism,
            files=files,
            tokenizer_files=tuple(path.name for path in tokenizer_files),
        ).save(staging)
    num_bytes = sum(record.bytes for record in files.values())
    seconds = time.perf_counter() - started
    log.info("%d files, %s, in %.1f s: %s", len(files), human_bytes(num_bytes), seconds, target)
    return target


def _check(args: ProgArgs) -> str:
    """The storage dtype's full name.  Raises ConfigError for what cannot be honoured."""
    problems = Problems()
    if args.calibrate_kv_cache:
        problems.add("--calibrate-kv-cache: scales of an INT8 cache are not available in this version")
    if args.smoothquant is not None:
        problems.add("--smoothquant: INT8 weights and their scales are not available in this version")
    reject_unsupported(problems.items)
    for name in ("tensor_parallelism", "processes"):
        value = getattr(args, name)
        if value < 1:
            problems.add(f"{name}: found {value}, allowed: 1 or more")
    problems.raise_if_any(ConfigError, "these arguments are not valid")
    if args.dataset_cache_dir is not None:
        log.info("--dataset-cache-dir has no effect without calibration")
    if args.load_model_on_cpu or args.convert_model_on_cpu:
        log.info("--load-model-on-cpu and --convert-model-on-cpu have no effect: the files are converted as a stream")
    return canonical_dtype(args.storage_type)


def _ini_section(args: ProgArgs, config: dict[str, Any], model: ModelConfig) -> dict[str, object]:
    """Arguments, then config.json, then what readers use; later ones win where a name is there twice."""
    own = {"storage_dtype": canonical_dtype(args.storage_type), "tensor_parallelism": args.tensor_parallelism}
    section = {**dataclasses.asdict(args), **config, **model.to_ini(), **own}
    return {key: value for key, value in section.items() if re.fullmatch(r"[A-Za-z_][\w.-]*", key)}


def _command(args: ProgArgs) -> str:
    """The command line that does the same again."""
    words = ["python", Path(__file__).name, "-i", args.in_file, "-o", args.out_dir]
    words += ["-tp", str(args.tensor_parallelism), "-t", canonical_dtype(args.storage_type)]
    return shlex.join(words)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-o", "--out-dir", required=True, help="where <ranks>-gpu/ is made")
    add("-i", "--in-file", required=True, help="the model's folder: config.json, weights, tokenizer")
    add("-tp", "--tensor-parallelism", type=positive_int, default=1, help="number of ranks to cut the weights for")
    add("-p", "--processes", type=positive_int, default=4, help="tensors in flight, about 20 MiB of memory each")
    add("-kv", "--calibrate-kv-cache", action="store_true", help="not available in this version")
    add("-sq", "--smoothquant", type=float, help="not available in this version")
    add("--model", choices=hf_families.FAMILY_NAMES, help="what the model must be; left out, config.json tells")
    add("-t", "--storage-type", choices=FLOAT_DTYPES, default="float32", help="dtype of the files")
    add("--dataset-cache-dir", help="accepted, no effect without calibration")
    add("--load-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
    add("--convert-model-on-cpu", action="store_true", help="accepted, no effect: no model is loaded")
    add("--force", action="store_true", help="replace a checkpoint that is already there")
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    setup_logging(options.pop("log_level"))
    args = ProgArgs(**options)

    def convert() -> None:
        print_banner("Arguments", dataclasses.asdict(args))
        run_conversion(args)

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
