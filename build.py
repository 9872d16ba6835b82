#!/usr/bin/env python3
"""FT checkpoint or random weights -> engine folder."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.config import PROFILING_VERBOSITIES, BuildConfig, ModelConfig, check_against_positions
from gpt.console import log, setup_logging
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import ConfigError
from gpt.launch import read_launch
from gpt.mapping import check_divides

if TYPE_CHECKING:
    from gpt.checkpoint.store import Checkpoint

# A plugin flag given bare takes the dtype of the model.
_MODEL_DTYPE = "auto"
_RANDOM_DEFAULTS = {
    "vocab_size": 51200,
    "n_layer": 24,
    "n_positions": 1024,
    "n_embd": 1024,
    "n_head": 16,
    "hidden_act": "gelu",
    "rotary_pct": 0.0,
}
_LIMIT_DEFAULTS = {"max_input_len": 200, "max_output_len": 200}


def build_parser() -> ArgumentParser:
    usage = "%(prog)s [--model_dir DIR | sizes of random weights] [limits] [kernels] [--output_dir DIR]"
    parser = ArgumentParser(prog="build.py", usage=usage, description=__doc__)
    model = parser.add_argument_group("model", "sizes describe random weights; with --model_dir the checkpoint decides")
    model.add_argument("--model_dir", metavar="DIR", help="an FT checkpoint (<N>-gpu); without it weights are random")
    model.add_argument(
        "--dtype", choices=FLOAT_DTYPES, help="type of the engine (default: the checkpoint's, else float16)"
    )
    model.add_argument("--world_size", type=positive_int, default=1, help="ranks of tensor parallelism")
    model.add_argument(
        "--use_parallel_embedding", action="store_true", help="divide the embedding table among the ranks"
    )
    model.add_argument(
        "--embedding_sharding_dim", type=int, choices=(0, 1), default=0, help="0: by vocabulary, 1: by hidden size"
    )
    model.add_argument(
        "--use_embedding_sharing", action="store_true", help="one table for embedding and tied head; always so"
    )
    for name, default in _RANDOM_DEFAULTS.items():
        model.add_argument(f"--{name}", type=type(default), help=f"random weights (default: {default})")
    model.add_argument("--inter_size", type=int, help="random weights: MLP width (default: 4 * n_embd)")
    model.add_argument("--no_bias", action="store_true", help="random weights: linear layers without biases")
    model.add_argument("--multi_query_mode", "-mq", action="store_true", help="random weights: one key/value head")
    model.add_argument("--random_seed", type=int, help="random weights: seed (default: drawn and printed)")
    limits = parser.add_argument_group("limits of the engine")
    limits.add_argument("--max_batch_size", type=positive_int, default=256, help="sequences per batch")
    limits.add_argument("--max_input_len", type=positive_int, help="tokens of a prompt (default: 200)")
    limits.add_argument("--max_output_len", type=positive_int, help="new tokens (default: 200)")
    limits.add_argument("--max_beam_width", type=positive_int, default=1, help="only 1 in this version")
    limits.add_argument(
        "--max_prompt_embedding_table_size",
        type=int,
        default=0,
        help="rows of the prompt table at most, tasks x virtual tokens; 0: no prompt tuning",
    )
    plugins = parser.add_argument_group("kernels; a plugin flag takes the engine's dtype as an optional value")
    for name, text in (
        ("gpt_attention", "fused attention"),
        ("gemm", "library GEMM"),
        ("layernorm", "fused layernorm"),
        ("lookup", "embedding kernel"),
    ):
        plugins.add_argument(
            f"--use_{name}_plugin", nargs="?", const=_MODEL_DTYPE, choices=(_MODEL_DTYPE, *FLOAT_DTYPES), help=text
        )
    plugins.add_argument(
        "--enable_context_fmha", action="store_true", help="fused prompt attention, half-precision sums where possible"
    )
    plugins.add_argument(
        "--enable_context_fmha_fp32_acc", action="store_true", help="fused prompt attention, float32 sums"
    )
    plugins.add_argument("--remove_input_padding", action="store_true", help="pack prompts of different lengths")
    plugins.add_argument("--paged_kv_cache", action="store_true", help="not in this version")
    plugins.add_argument("--tokens_per_block", type=positive_int, help="of the paged cache; not in this version")
    plugins.add_argument("--use_inflight_batching", action="store_true", help="not in this version")
    build = parser.add_argument_group("building")
    build.add_argument(
        "--backend",
        choices=("auto", "torch", "tensorrt"),
        default="auto",
        help="auto: tensorrt if --target is given, else torch",
    )
    build.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="CARD",
        help="tensorrt: cards to build for, e.g. ampere ada blackwell",
    )
    build.add_argument("--builder_opt", type=int, help="tensorrt: optimisation level, 0 to 5")
    build.add_argument(
        "--timing_cache", metavar="FILE", help="tensorrt library: kernel timings, read if it exists and written back"
    )
    build.add_argument(
        "--batch_buckets",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="tensorrt: batch sizes to compile generation for, beside --max_batch_size",
    )
    build.add_argument(
        "--profiling_verbosity",
        choices=PROFILING_VERBOSITIES,
        default=PROFILING_VERBOSITIES[0],
        help="tensorrt: what a plan tells profilers about its layers",
    )
    build.add_argument("--weight_streaming", action="store_true", help="tensorrt: weights may stay on the host")
    build.add_argument("--refit", action="store_true", help="tensorrt: a plan whose weights can be replaced")
    build.add_argument("--strip_plan", action="store_true", help="a plan without weights; refused, run.py needs them")
    build.add_argument("--strongly_typed", action="store_true", help="tensorrt: types as written; always so")
    build.add_argument("--parallel_build", action="store_true", help="one process per rank, if there is room")
    build.add_argument("--gpus_per_node", type=positive_int, default=8, help="of the command that --dry_run prints")
    build.add_argument(
        "--dry_run", action="store_true", help="print what the engine would need and where it fits; build nothing"
    )
    build.add_argument("--output_dir", default="gpt_outputs", metavar="DIR", help="the engine folder")
    add_log_level(build)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: _run(args))


def run_build(args: Sequence[str] | None = None) -> None:
    """Builds from a list of command-line arguments; raises GptError instead of exiting."""
    _run(build_parser().parse_args(args))


def _run(args: Namespace) -> None:
    if read_launch().size > 1:
        raise ConfigError(
            "build.py builds all ranks in one process",
            found=f"{read_launch().size} processes started by mpirun or srun",
            hint="start it once; --parallel_build uses several processes",
        )
    reject_unsupported(_unsupported(args))
    from gpt.checkpoint.store import Checkpoint
    from gpt.engine.builder import build_engine

    checkpoint = Checkpoint.open(Path(args.model_dir)) if args.model_dir else None
    if checkpoint is not None:
        checkpoint.check_world_size(args.world_size)
    model = _model_of_checkpoint(args, checkpoint) if checkpoint else _model_of_flags(args)
    check_divides(model, args.world_size)
    build = _build_config(args, model, checkpoint)
    _check_embedding(model, build)
    _explain_idle_flags(args, build.backend)
    if args.dry_run:
        from gpt.engine.plan import Plan

        print(Plan.make(model, build).describe(Path(args.output_dir), args.gpus_per_node))
        return
    build_engine(model, build, checkpoint, Path(args.output_dir))


def _unsupported(args: Namespace) -> list[str]:
    """Every flag that this version cannot honour, with the reason."""
    checks = (
        (args.max_beam_width > 1, f"--max_beam_width {args.max_beam_width}: decoding is greedy in this version"),
        (args.paged_kv_cache, "--paged_kv_cache: the cache of this version is contiguous, sized to each batch"),
        (
            args.use_inflight_batching,
            "--use_inflight_batching: needs the paged cache, which this version does not have",
        ),
        (
            args.max_prompt_embedding_table_size > 0 and args.use_lookup_plugin is not None,
            "--max_prompt_embedding_table_size with --use_lookup_plugin: the plugin has no prompt table",
        ),
        (
            args.enable_context_fmha and args.enable_context_fmha_fp32_acc,
            "--enable_context_fmha and --enable_context_fmha_fp32_acc: give one of the two",
        ),
        (
            args.strip_plan,
            "--strip_plan: run.py cannot put the weights back; --weight_streaming is what saves memory on the GPU",
        ),
        (
            bool(args.target) and args.backend == "torch",
            "--target: a torch engine runs anywhere; it goes with --backend tensorrt",
        ),
    )
    return [reason for present, reason in checks if present]


def _model_of_checkpoint(args: Namespace, checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint decides; flags that say something else are named with both values."""
    model = checkpoint.model
    log.info("Setting model configuration from %s", checkpoint.folder)
    stored = {**dataclasses.asdict(model), "no_bias": not model.bias, "multi_query_mode": model.multi_query}
    names = [*_RANDOM_DEFAULTS, "inter_size", "no_bias", "multi_query_mode"]
    for name in names:
        given = getattr(args, name)
        if given is None or given is False or given == stored[name]:
            continue
        if name == "hidden_act" and _same_activation(given, model):
            continue
        log.warning("--%s %s is ignored: the checkpoint says %s", name, given, stored[name])
    if args.random_seed is not None:
        log.warning("--random_seed has no effect with --model_dir")
    return model


def _same_activation(given: str, model: ModelConfig) -> bool:
    """Users of the original type `gelu` for the tanh form that GPT-2 is trained with."""
    return given == "gelu" and model.activation.function in ("gelu_tanh", "gelu_erf") and not model.activation.gated


def _model_of_flags(args: Namespace) -> ModelConfig:
    values: dict[str, Any] = {}
    for name, default in _RANDOM_DEFAULTS.items():
        given = getattr(args, name)
        values[name] = default if given is None else given
    inter_size = 4 * values["n_embd"] if args.inter_size is None else args.inter_size
    n_kv_head = 1 if args.multi_query_mode else values["n_head"]
    return ModelConfig(**values, inter_size=inter_size, n_kv_head=n_kv_head, bias=not args.no_bias)


def _build_config(args: Namespace, model: ModelConfig, checkpoint: Checkpoint | None) -> BuildConfig:
    dtype = args.dtype or (checkpoint.storage_dtype if checkpoint else "float16")
    if checkpoint is not None and dtype != checkpoint.storage_dtype:
        log.info("Converting %s weights to %s", checkpoint.storage_dtype, dtype)
    limits = _limits(args, model)
    build = BuildConfig(
        dtype=dtype,
        backend=_backend(args),
        targets=tuple(args.target),
        world_size=args.world_size,
        max_batch_size=args.max_batch_size,
        max_input_len=limits["max_input_len"],
        max_output_len=limits["max_output_len"],
        max_beam_width=args.max_beam_width,
        max_prompt_embedding_table_size=args.max_prompt_embedding_table_size,
        use_parallel_embedding=args.use_parallel_embedding and args.world_size > 1,
        embedding_sharding_dim=args.embedding_sharding_dim,
        parallel_build=args.parallel_build and args.world_size > 1,
        gpt_attention_plugin=_plugin_dtype(args, "gpt_attention", dtype),
        gemm_plugin=_plugin_dtype(args, "gemm", dtype),
        layernorm_plugin=_plugin_dtype(args, "layernorm", dtype),
        lookup_plugin=_plugin_dtype(args, "lookup", dtype),
        context_fmha=1 if args.enable_context_fmha else 2 if args.enable_context_fmha_fp32_acc else 0,
        remove_input_padding=args.remove_input_padding,
        builder_opt=args.builder_opt,
        batch_buckets=tuple(args.batch_buckets),
        profiling_verbosity=args.profiling_verbosity,
        weight_streaming=args.weight_streaming,
        refit=args.refit,
        timing_cache=args.timing_cache,
        seed=_seed(args) if checkpoint is None else None,
    )
    check_against_positions(model, build)
    return build


def _check_embedding(model: ModelConfig, build: BuildConfig) -> None:
    if build.use_parallel_embedding and build.embedding_sharding_dim == 1 and model.tied_head:
        raise ConfigError(
            "the embedding table cannot be cut by hidden size: it is the head too, which is cut by vocabulary",
            found="--use_parallel_embedding --embedding_sharding_dim 1, tied head",
            allowed="--embedding_sharding_dim 0, or a model with a head of its own",
        )


def _backend(args: Namespace) -> str:
    if args.backend != "auto":
        return str(args.backend)
    backend = "tensorrt" if args.target else "torch"
    log.info(
        "Backend: %s (%s)",
        backend,
        "--target was given" if args.target else "runs on any CPU and GPU; --backend chooses",
    )
    return backend


def _plugin_dtype(args: Namespace, name: str, dtype: str) -> str | None:
    given = getattr(args, f"use_{name}_plugin")
    if given == _MODEL_DTYPE:
        log.info("%s plugin: dtype set to %s, the model's", name, dtype)
        return dtype
    if given is not None and given != dtype:
        raise ConfigError(
            f"--use_{name}_plugin and the engine have different types",
            found=f"{given} for the plugin, {dtype} for the engine",
            allowed="the same, or the flag without a value",
            hint=f"--dtype {given} converts the weights",
        )
    return given


def _limits(args: Namespace, model: ModelConfig) -> dict[str, int]:
    """Given limits are kept and checked; defaults are cut to what the model's positions can hold."""
    limits = {name: getattr(args, name) or default for name, default in _LIMIT_DEFAULTS.items()}
    excess = sum(limits.values()) - model.n_positions
    if model.learned_positions and excess > 0:
        for name in reversed(_LIMIT_DEFAULTS):
            if getattr(args, name) is None:
                cut = min(excess, limits[name] - 1)
                limits[name] -= cut
                excess -= cut
                log.info("--%s is %d: the model has %d positions", name, limits[name], model.n_positions)
    return limits


def _seed(args: Namespace) -> int:
    if args.random_seed is not None:
        return int(args.random_seed)
    import secrets

    seed = secrets.randbits(31)
    log.info("Random weights, --random_seed %d", seed)
    return seed


def _explain_idle_flags(args: Namespace, backend: str) -> None:
    torch_backend = backend == "torch"
    for given, text in (
        (args.tokens_per_block is not None, "--tokens_per_block belongs to the paged cache"),
        (torch_backend and args.timing_cache is not None, "--timing_cache belongs to TensorRT"),
        (torch_backend and bool(args.batch_buckets), "--batch_buckets: the torch backend compiles no batch sizes"),
        (
            torch_backend and args.profiling_verbosity != PROFILING_VERBOSITIES[0],
            "--profiling_verbosity belongs to TensorRT",
        ),
        (torch_backend and args.weight_streaming, "--weight_streaming belongs to TensorRT"),
        (torch_backend and args.refit, "--refit: a torch engine's file can be replaced as a whole"),
        (torch_backend and args.strongly_typed, "--strongly_typed: types are as written on the torch backend too"),
        (args.parallel_build and args.world_size == 1, "--parallel_build: one rank is built in this process"),
        (args.use_parallel_embedding and args.world_size == 1, "--use_parallel_embedding: there is one rank"),
        (
            args.embedding_sharding_dim == 1 and not args.use_parallel_embedding,
            "--embedding_sharding_dim goes with --use_parallel_embedding",
        ),
    ):
        if given:
            log.warning("%s; it has no effect", text)


if __name__ == "__main__":
    sys.exit(main())
