"""build.py's quantisation flags: which there are, which go together, and the QuantConfig they mean."""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup

from gpt.checkpoint.layout import QuantFiles
from gpt.checkpoint.store import Checkpoint
from gpt.config import ModelConfig
from gpt.console import log
from gpt.errors import CheckpointError, ConfigError, Problems
from gpt.quant import GROUP_SIZES, QuantConfig

# The smallest rise of the perplexity for the bytes: docs/quantization.md.
_DEFAULT_GROUP_SIZE = 64


def add_quantization(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--use_smooth_quant", action="store_true", help="int8 weights and activations, from a checkpoint made with -sq"
    )
    group.add_argument(
        "--per_token", action="store_true", help="with --use_smooth_quant, --enable_fp8: rows find their own scale"
    )
    group.add_argument(
        "--per_channel", action="store_true", help="with --use_smooth_quant: weights have a scale per output"
    )
    group.add_argument(
        "--use_weight_only", action="store_true", help="int8 or int4 weights, quantised here; activations stay float"
    )
    group.add_argument(
        "--weight_only_precision", nargs="?", const="int8", choices=("int8", "int4"), help="(default: int8)"
    )
    group.add_argument(
        "--weight_only_group_size",
        type=int,
        choices=(0, *GROUP_SIZES),
        help=f"int4: inputs that share a scale; 0: all of them (default: {_DEFAULT_GROUP_SIZE} where it divides them)",
    )
    group.add_argument("--int8_kv_cache", action="store_true", help="from a checkpoint made with -kv or -sq")
    group.add_argument("--enable_fp8", action="store_true", help="fp8 weights and activations")
    group.add_argument("--fp8_kv_cache", action="store_true", help="from a checkpoint made with -kv or -sq")
    group.add_argument(
        "--check_quality",
        metavar="FILE",
        help="compare the engine with the float model on texts (.txt, .jsonl, .csv; rows with highlights: ROUGE too)",
    )


def unsupported_quantization(args: Namespace) -> list[str]:
    """Every combination that means nothing or cannot be built, with the reason."""
    weights = [f"--{name}" for name in ("use_smooth_quant", "use_weight_only", "enable_fp8") if getattr(args, name)]
    tensorrt = args.backend == "tensorrt" or bool(args.target)
    checks = (
        (len(weights) > 1, f"{' and '.join(weights)}: weights have one form, give one of them"),
        (args.int8_kv_cache and args.fp8_kv_cache, "--int8_kv_cache and --fp8_kv_cache: give one of the two"),
        (
            args.per_token and not (args.use_smooth_quant or args.enable_fp8),
            "--per_token: goes with --use_smooth_quant or --enable_fp8",
        ),
        (args.per_channel and not args.use_smooth_quant, "--per_channel: goes with --use_smooth_quant"),
        (
            args.weight_only_precision is not None and not args.use_weight_only,
            "--weight_only_precision: goes with --use_weight_only",
        ),
        (
            args.weight_only_group_size is not None
            and not (args.use_weight_only and args.weight_only_precision == "int4"),
            "--weight_only_group_size: goes with --use_weight_only --weight_only_precision int4",
        ),
        (
            args.fp8_kv_cache and tensorrt,
            "--fp8_kv_cache with --backend tensorrt: the quantised cache of its networks is int8 (--int8_kv_cache)",
        ),
        (
            args.check_quality is not None and tensorrt,
            "--check_quality with --backend tensorrt: a plan is not executed where it is built",
        ),
        (
            args.check_quality is not None and args.model_dir is None,
            "--check_quality without --model_dir: random weights have no quality",
        ),
        (
            args.check_quality is not None and args.world_size > 1,
            f"--check_quality with --world_size {args.world_size}: it runs in one process; measure with one rank",
        ),
        (args.check_quality is not None and args.dry_run, "--check_quality with --dry_run: nothing is built"),
    )
    return [reason for present, reason in checks if present]


def check_calibrated(args: Namespace, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError naming the flags whose scales the checkpoint lacks, with the command that adds them."""
    lacking = []
    if args.use_smooth_quant and not checkpoint.quant.smoothquant:
        lacking.append("--use_smooth_quant: no model.layers.*.weight.int8 and scale_x_orig_quant files")
    lacking += [
        f"--{name}: no scale_kv_quant_orig or query_key_value.scale_y_quant_orig files"
        for name in ("int8_kv_cache", "fp8_kv_cache")
        if getattr(args, name) and not checkpoint.quant.kv_scales
    ]
    if lacking:
        flags = ("-sq", "0.5") if args.use_smooth_quant else ("-kv",)
        raise CheckpointError(
            f"the checkpoint lacks the scales that the engine needs: {checkpoint.folder}",
            found=lacking,
            hint=checkpoint.quantize_command(*flags),
        )


def quantization_of(args: Namespace, model: ModelConfig, calibrated: QuantFiles) -> QuantConfig:
    """The flags as a record.  calibrated: what the checkpoint has.

    Raises ConfigError for groups that do not divide the inputs of a rank's products.
    """
    kv_cache = "int8" if args.int8_kv_cache else "fp8" if args.fp8_kv_cache else None
    activations = "per_token" if args.per_token else "per_tensor"
    if args.use_smooth_quant:
        smoothers = calibrated.smoothers
        return QuantConfig("int8", activations, args.per_channel, kv_cache=kv_cache, smoothers=smoothers)
    if args.enable_fp8:
        # Smoothers belong to the int8 weights: the calibrated ranges are not those of the float weights' inputs.
        if not calibrated.smoothquant or calibrated.smoothers:
            if not args.per_token:
                log.info("fp8: each row of activations finds its own scale, the checkpoint has none for its float form")
            activations = "per_token"
        return QuantConfig("fp8", activations, kv_cache=kv_cache)
    if not args.use_weight_only:
        return QuantConfig(kv_cache=kv_cache)
    if args.weight_only_precision != "int4":
        return QuantConfig("int8", kv_cache=kv_cache)
    group_size = _group_size(model, args.world_size, args.weight_only_group_size)
    return QuantConfig("int4", group_size=group_size, kv_cache=kv_cache)


def _group_size(model: ModelConfig, world_size: int, given: int | None) -> int:
    inputs = {
        "n_embd": model.n_embd,
        "n_embd per rank": model.n_head // world_size * model.head_size,
        "inter_size per rank": model.inter_size // world_size,
    }
    problems = Problems()
    for name, size in inputs.items():
        if size % (given or 2):
            problems.add(f"{name} {size} is not divisible by {given or 2}")
    fitting = [size for size in GROUP_SIZES if all(count % size == 0 for count in inputs.values())]
    if problems:
        raise ConfigError(
            "int4 weights cannot be packed" if not given else f"groups of {given} do not divide the inputs",
            found=problems.items,
            allowed=f"--weight_only_group_size {', '.join(map(str, (0, *fitting)))}" if given else "even sizes",
        )
    if given is not None:
        return given
    chosen = max((size for size in fitting if size <= _DEFAULT_GROUP_SIZE), default=0)
    if chosen != _DEFAULT_GROUP_SIZE:
        log.info("--weight_only_group_size is %d: %d does not divide every input", chosen, _DEFAULT_GROUP_SIZE)
    return chosen
