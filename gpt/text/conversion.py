"""What the converters of models share: their flags, and how a checkpoint folder comes to be whole."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.config_ini import CONFIG_NAME
from gpt.checkpoint.extend import check_unchanged, find_extendable
from gpt.checkpoint.inspection import Inspection
from gpt.checkpoint.layout import describe_architecture
from gpt.checkpoint.writer import Origin, Pair, Target, write_checkpoint
from gpt.cli import add_log_level, positive_int
from gpt.config import ModelConfig
from gpt.console import log
from gpt.dtypes import FLOAT_DTYPES, canonical_dtype
from gpt.errors import ConfigError, Problems
from gpt.files import staged_folder
from gpt.text.inspection import add_tokenizer
from gpt.text.quantize import QuantOptions, add_quant_flags, check_options, quantize


@dataclass(frozen=True)
class ConversionArgs(QuantOptions):
    """One field per flag that the converters have in common."""

    out_dir: str
    in_file: str
    tensor_parallelism: int = 1
    processes: int = 4
    storage_type: str = "float32"
    force: bool = False

    @property
    def folder(self) -> Path:
        """Where the checkpoint goes."""
        return Path(self.out_dir) / f"{self.tensor_parallelism}-gpu"

    @property
    def storage_dtype(self) -> str:
        """Raises ConfigError where there is no such type."""
        return canonical_dtype(self.storage_type)

    def command(self, tool: str) -> str:
        """The command line that makes the same checkpoint again."""
        words = ["python", tool, "-i", self.in_file, "-o", self.out_dir]
        words += ["-tp", str(self.tensor_parallelism), "-t", self.storage_dtype]
        return shlex.join([*words, *self.quant_flags()])

    def check(self) -> None:
        """Raises ConfigError listing what cannot be honoured; says which flags have no effect."""
        problems = Problems()
        check_options(self, problems)
        for name in ("tensor_parallelism", "processes"):
            if getattr(self, name) < 1:
                problems.add(f"{name}: found {getattr(self, name)}, allowed: 1 or more")
        problems.raise_if_any(ConfigError, "these arguments are not valid")


@dataclass(frozen=True)
class Converted:
    """What a converter found in its source.

    section: what config.ini says besides the model.  tokenizer_files: by their names in the checkpoint.
    """

    model: ModelConfig
    pairs: Sequence[Pair]
    section: Mapping[str, object]
    tokenizer_files: Mapping[str, Path]


def add_conversion_flags(parser: ArgumentParser, *, in_file: str, processes: str) -> None:
    """The flags of ConversionArgs; in_file, processes: what the converter says of these two."""
    add = parser.add_argument
    add("-o", "--out-dir", required=True, help="where <ranks>-gpu/ is made")
    add("-i", "--in-file", required=True, help=in_file)
    add("-tp", "--tensor-parallelism", type=positive_int, default=1, help="number of ranks to cut the weights for")
    add("-p", "--processes", type=positive_int, default=4, help=f"tensors in flight, {processes}")
    add("-t", "--storage-type", choices=FLOAT_DTYPES, default="float32", help="dtype of the files")
    add("--force", action="store_true", help="replace a checkpoint that is already there")
    add_log_level(parser)
    add_quant_flags(parser)


@contextmanager
def new_checkpoint(args: ConversionArgs, tool: str) -> Iterator[Path]:
    """Yields the folder to write; it becomes `args.folder` when the block ends well, and vanishes otherwise.

    Raises ConfigError where something is there that may not be replaced.
    """
    earlier = find_extendable(
        args.folder, args.files, tool=tool, source=Path(args.in_file), storage_dtype=args.storage_dtype
    )
    with staged_folder(args.folder, force=args.force or earlier is not None, marker=CONFIG_NAME) as staging:
        yield staging
        if not args.force:
            check_unchanged(earlier, staging)
    log.info("%s is complete", args.folder)


def write_converted(
    args: ConversionArgs, tool: str, staging: Path, found: Converted, tokenizer_dir: Path | None
) -> None:
    """Says what was found, calibrates where that is asked for and fills `staging`.  tokenizer_dir: of the model's own
    tokenizer.

    Raises what `quantize` and `write_checkpoint` raise.
    """
    dtypes = ", ".join(sorted({source.dtype for _, source in found.pairs}))
    model = found.model
    log.info("Model: %s, vocabulary %d, %s in the files", describe_architecture(model), model.vocab_size, dtypes)
    _tell_tokenizer(model, tokenizer_dir if found.tokenizer_files else None)
    target = Target(staging, found.model, args.storage_dtype, args.tensor_parallelism)
    pairs, calibration = quantize(args, target, found.pairs, tokenizer_dir)
    origin = Origin(tool, args.command(tool), Path(args.in_file))
    section = {**found.section, **calibration}
    write_checkpoint(target, pairs, section, found.tokenizer_files, origin, in_flight=args.processes)


def _tell_tokenizer(model: ModelConfig, folder: Path | None) -> None:
    """What the checkpoint's readers will get; weights are useful without, so what is wrong with it is a warning."""
    result = Inspection(Path(), "tokenizer", model=model, tokenizer_dir=folder)
    add_tokenizer(result)
    for problem in result.problems:
        log.warning("Tokenizer: %s; run.py will need --tokenizer or --vocab_file", problem)
    if "tokenizer" in result.facts:
        log.info("Tokenizer: %s", result.facts["tokenizer"])
