"""What both converters do with -sq and -kv: the flags, their checks, and the way from texts to tensors to write."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.checkpoint.expected import expected_files
from gpt.checkpoint.layout import QuantFiles
from gpt.cli import positive_int
from gpt.console import log
from gpt.errors import ConfigError, GptError, Problems

if TYPE_CHECKING:
    from gpt.checkpoint.writer import Pair, Target
    from gpt.config import ModelConfig
    from gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """One field per flag; see `add_quant_flags`."""

    calibrate_kv_cache: bool = False
    smoothquant: float | None = None
    smooth_dense_proj: bool = False
    calib_data: str | None = None
    calib_column: str = "text"
    calib_size: int = 512
    calib_length: int = 512
    calib_batch_size: int = 8
    calib_device: str = "auto"
    calib_tokenizer: str | None = None
    dataset_cache_dir: str | None = None

    @property
    def files(self) -> QuantFiles:
        """What is written beside the float weights; -sq includes what -kv writes."""
        smooth = self.smoothquant is not None
        any_scales = smooth or self.calibrate_kv_cache
        return QuantFiles(
            smoothquant=smooth,
            kv_shared=any_scales,
            kv_separate=any_scales,
            smoothers=smooth and self.smooth_dense_proj,
        )

    def arguments(self) -> dict[str, object]:
        """Every field, a script's own before those of this class."""
        ours = {field.name for field in dataclasses.fields(QuantOptions)}
        values = dataclasses.asdict(self)
        return dict(sorted(values.items(), key=lambda item: item[0] in ours))

    def changed_flags(self) -> dict[str, object]:
        """Name and value of each flag that is not at its default."""
        fields = dataclasses.fields(QuantOptions)
        values = {f"--{field.name.replace('_', '-')}": getattr(self, field.name) for field in fields}
        return {flag: values[flag] for flag, field in zip(values, fields, strict=True) if values[flag] != field.default}

    def quant_flags(self) -> list[str]:
        """The flags of this class that were given, as words of a command line."""
        words: list[str] = []
        for flag, value in self.changed_flags().items():
            words += [flag] if value is True else [flag, str(value)]
        return words


def add_quant_flags(parser: ArgumentParser) -> None:
    """The flags of QuantOptions."""
    add = parser.add_argument_group("INT8: SmoothQuant and the cache, see docs/quantization.md").add_argument
    add("-kv", "--calibrate-kv-cache", action="store_true", help="write the scales of an INT8 cache")
    add(
        "-sq",
        "--smoothquant",
        type=float,
        metavar="ALPHA",
        help="write INT8 weights and scales, smoothed by ALPHA, 0 to 1: how much of the activations' range the weights "
        "take over; includes -kv",
    )
    add("--smooth-dense-proj", action="store_true", help="with -sq: smooth the inputs of dense and proj too")
    add(
        "--calib-data",
        metavar="FILE_OR_NAME",
        help="calibration texts: .txt (paragraphs), .jsonl, .json, .csv, .parquet, or a data set on the hub "
        "(default: lambada from the hub; where it cannot be had, assets/calibration.txt)",
    )
    add("--calib-column", default="text", help="the column of the texts")
    add("--calib-size", type=positive_int, default=512, help="texts at most")
    add("--calib-length", type=positive_int, default=512, help="tokens of a text at most")
    add("--calib-batch-size", type=positive_int, default=8, help="texts at a time; changes memory and speed alone")
    add("--calib-device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--calib-tokenizer", metavar="DIR_OR_FILE", help="where the model has none of its own")
    add("--dataset-cache-dir", help="where data sets from the hub are kept")


def check_options(options: QuantOptions, problems: Problems) -> None:
    """Adds what cannot be honoured; says which flags have no effect."""
    alpha = options.smoothquant
    if alpha is not None and not 0.0 <= alpha <= 1.0:  # NaN is neither
        problems.add(f"--smoothquant: found {alpha}, allowed: 0 to 1")
    if options.smooth_dense_proj and alpha is None:
        problems.add("--smooth-dense-proj: there is nothing to smooth without --smoothquant ALPHA")
    for name in ("calib_size", "calib_length", "calib_batch_size"):
        if getattr(options, name) < 1:
            problems.add(f"--{name.replace('_', '-')}: found {getattr(options, name)}, allowed: 1 or more")
    if not options.files and not problems:
        for flag in options.changed_flags():
            log.info("%s has no effect without --smoothquant or --calibrate-kv-cache", flag)


def quantize(
    options: QuantOptions, target: Target, pairs: Sequence[Pair], tokenizer: Path | None
) -> tuple[Sequence[Pair], Mapping[str, object]]:
    """The tensors to write in place of `pairs`, and what config.ini should say; both as they are without -sq and -kv.

    tokenizer: where the model's own is, if it has one.  Prints a table of errors and saves it in the target's folder.
    Raises ConfigError for texts, tokenizer or device that are not there, GptError where there is too little space.
    """
    if not options.files:
        return pairs, {}
    # Here and not above: --help and wrong arguments need no torch.
    import torch

    from gpt.checkpoint.smoothquant import quantized_pairs
    from gpt.checkpoint.writer import check_space
    from gpt.engine.calibration import calibrate
    from gpt.runtime.load import pick_device
    from gpt.text.calibration_data import encode_texts, load_texts
    from gpt.text.quant_report import describe_errors, save_errors

    model = target.model
    files = expected_files(model, target.world_size, target.storage_dtype, options.files)
    check_space(target.folder, sum(file.bytes for _, file in files))  # before the work, not behind it
    device = pick_device(options.calib_device)
    location = options.calib_tokenizer or tokenizer
    if location is None:
        raise ConfigError("the model has no tokenizer", hint="--calib-tokenizer names the one to calibrate with")
    source, texts = load_texts(options.calib_data, options.calib_column, options.calib_size, options.dataset_cache_dir)
    samples = encode_texts(texts, _tokenizer(location), _length(options, model), model.vocab_size)
    log.info("Calibration texts: %s", source)
    try:
        result = calibrate(
            model,
            pairs,
            samples,
            alpha=options.smoothquant,
            smooth_inner=options.smooth_dense_proj,
            batch_size=options.calib_batch_size,
            device=device,
        )
    except torch.OutOfMemoryError as error:
        raise GptError(
            f"not enough memory to calibrate on {device}",
            found=str(error).partition(". ")[0],
            hint="--calib-device cpu, or a smaller --calib-batch-size, --calib-size or --calib-length",
        ) from error
    print(describe_errors(result.errors), flush=True)
    save_errors(result.errors, target.folder)
    tokens = sum(map(len, samples))
    section = {"calibrated_on": f"{source}, {len(samples)} texts, {tokens} tokens"}
    return quantized_pairs(model, pairs, result.layers, options.files), section


def _tokenizer(location: str | Path) -> Tokenizer:
    from gpt.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(location)
    except ConfigError as error:
        hint = error.hint or "--calib-tokenizer names the one to calibrate with"
        raise ConfigError(error.what, found=error.found, allowed=error.allowed, hint=hint) from error


def _length(options: QuantOptions, model: ModelConfig) -> int:
    if options.calib_length > model.n_positions:
        log.info("--calib-length is %d: the model has %d positions", model.n_positions, model.n_positions)
    return min(options.calib_length, model.n_positions)
