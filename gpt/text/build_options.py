"""build.py's command line: its flags, what of them can be combined, what they mean."""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup
from typing import Any

from gpt.cli import ArgumentParser, add_log_level, positive_int
from gpt.config import PROFILING_VERBOSITIES, BuildConfig, ModelConfig
from gpt.console import log
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import ConfigError
from gpt.text.quant_options import add_quantization, unsupported_quantization

# A plugin flag given bare takes the dtype of the model.
_MODEL_DTYPE = "auto"
RANDOM_DEFAULTS = {
    "vocab_size": 51200,
    "n_layer": 24,
    "n_positions": 1024,
    "n_embd": 1024,
    "n_head": 16,
    "hidden_act": "gelu",
    "rotary_pct": 0.0,
}
TOKENS_PER_BLOCK, MAX_NUM_TOKENS = 64, 2048
_MAX_LAYERS = 10_000  # more take minutes to list, and are a slip
_LIMIT_DEFAULTS = {"max_input_len": 200, "max_output_len": 200}


def build_parser() -> ArgumentParser:
    usage = "%(prog)s [--model_dir DIR | sizes of random weights] [limits] [kernels] [quantisation] [--output_dir DIR]"
    parser = ArgumentParser(
        prog="build.py", usage=usage, description="FT checkpoint or random weights -> engine folder."
    )
    _add_model(
        parser.add_argument_group("model", "sizes describe random weights; with --model_dir the checkpoint decides")
    )
    _add_limits(parser.add_argument_group("limits of the engine"))
    _add_kernels(
        parser.add_argument_group("kernels; a plugin flag takes the engine's dtype as an optional value"),
    )
    add_quantization(parser.add_argument_group("quantisation"))
    _add_building(parser.add_argument_group("building"))
    return parser


def _add_model(group: _ArgumentGroup) -> None:
    group.add_argument("--model_dir", metavar="DIR", help="an FT checkpoint (<N>-gpu); without it weights are random")
    group.add_argument(
        "--dtype", choices=FLOAT_DTYPES, help="type of the engine (default: the checkpoint's, else float16)"
    )
    group.add_argument("--world_size", type=positive_int, default=1, help="ranks of tensor parallelism")
    group.add_argument(
        "--use_parallel_embedding", action="store_true", help="divide the embedding table among the ranks"
    )
    group.add_argument(
        "--embedding_sharding_dim", type=int, choices=(0, 1), default=0, help="0: by vocabulary, 1: by hidden size"
    )
    group.add_argument(
        "--use_embedding_sharing", action="store_true", help="one table for embedding and tied head; always so"
    )
    for name, default in RANDOM_DEFAULTS.items():
        group.add_argument(f"--{name}", type=type(default), help=f"random weights (default: {default})")
    group.add_argument("--inter_size", type=int, help="random weights: MLP width (default: 4 * n_embd)")
    group.add_argument("--no_bias", action="store_true", help="random weights: linear layers without biases")
    group.add_argument("--multi_query_mode", "-mq", action="store_true", help="random weights: one key/value head")
    group.add_argument("--random_seed", type=int, help="random weights: seed (default: drawn and printed)")


def _add_limits(group: _ArgumentGroup) -> None:
    group.add_argument("--max_batch_size", type=positive_int, default=256, help="sequences per batch")
    group.add_argument("--max_input_len", type=positive_int, help="tokens of a prompt (default: 200)")
    group.add_argument("--max_output_len", type=positive_int, help="new tokens (default: 200)")
    group.add_argument("--max_beam_width", type=positive_int, default=1, help="beams per sequence at most")
    group.add_argument(
        "--max_prompt_embedding_table_size",
        type=int,
        default=0,
        help="rows of the prompt table at most, tasks x virtual tokens; 0: no prompt tuning",
    )


def _add_kernels(group: _ArgumentGroup) -> None:
    for name, text in (
        ("gpt_attention", "fused attention"),
        ("gemm", "library GEMM"),
        ("layernorm", "fused layernorm"),
        ("lookup", "embedding kernel"),
    ):
        group.add_argument(
            f"--use_{name}_plugin", nargs="?", const=_MODEL_DTYPE, choices=(_MODEL_DTYPE, *FLOAT_DTYPES), help=text
        )
    group.add_argument(
        "--enable_context_fmha", action="store_true", help="fused prompt attention, half-precision sums where possible"
    )
    group.add_argument(
        "--enable_context_fmha_fp32_acc", action="store_true", help="fused prompt attention, float32 sums"
    )
    group.add_argument("--remove_input_padding", action="store_true", help="pack prompts of different lengths")
    group.add_argument("--paged_kv_cache", action="store_true", help="cache in blocks that sequences share")
    group.add_argument("--tokens_per_block", type=positive_int, help="of the paged cache (default: 64)")
    group.add_argument(
        "--use_inflight_batching",
        action="store_true",
        help="sequences join and leave a running batch; with --paged_kv_cache",
    )
    group.add_argument(
        "--max_num_tokens", type=positive_int, help="tokens of a step over the paged cache (default: 2048)"
    )


def _add_building(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=("auto", "torch", "tensorrt"),
        default="auto",
        help="auto: tensorrt if --target is given, else torch",
    )
    group.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="CARD",
        help="tensorrt: cards to build for, e.g. ampere ada blackwell",
    )
    group.add_argument("--builder_opt", type=int, help="tensorrt: optimisation level, 0 to 5")
    group.add_argument(
        "--timing_cache", metavar="FILE", help="tensorrt library: kernel timings, read if it exists and written back"
    )
    group.add_argument(
        "--batch_buckets",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="tensorrt: numbers of sequences (beams counted) to compile generation for, beside the largest",
    )
    group.add_argument(
        "--profiling_verbosity",
        choices=PROFILING_VERBOSITIES,
        default=PROFILING_VERBOSITIES[0],
        help="tensorrt: what a plan tells profilers about its layers",
    )
    group.add_argument("--weight_streaming", action="store_true", help="tensorrt: weights may stay on the host")
    group.add_argument("--refit", action="store_true", help="tensorrt: a plan whose weights can be replaced")
    group.add_argument("--strip_plan", action="store_true", help="a plan without weights; refused, run.py needs them")
    group.add_argument("--strongly_typed", action="store_true", help="tensorrt: types as written; always so")
    group.add_argument("--parallel_build", action="store_true", help="one process per rank, if there is room")
    group.add_argument("--gpus_per_node", type=positive_int, default=8, help="of the command that --dry_run prints")
    group.add_argument(
        "--dry_run", action="store_true", help="print what the engine would need and where it fits; build nothing"
    )
    group.add_argument("--output_dir", default="gpt_outputs", metavar="DIR", help="the engine folder")
    add_log_level(group)


def unsupported(args: Namespace) -> list[str]:
    """Every flag that this version cannot honour, with the reason."""
    checks = (
        (
            args.paged_kv_cache and (args.backend == "tensorrt" or bool(args.target)),
            "--paged_kv_cache with --backend tensorrt: its network attends to one contiguous cache per sequence",
        ),
        (args.use_inflight_batching and not args.paged_kv_cache, "--use_inflight_batching: needs --paged_kv_cache"),
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
    return [reason for present, reason in checks if present] + unsupported_quantization(args)


def model_of_flags(args: Namespace) -> ModelConfig:
    values: dict[str, Any] = {}
    for name, default in RANDOM_DEFAULTS.items():
        given = getattr(args, name)
        values[name] = default if given is None else given
    if values["n_layer"] > _MAX_LAYERS:
        raise ConfigError("too many layers", found=f"--n_layer {values['n_layer']}", allowed=f"1 to {_MAX_LAYERS}")
    inter_size = 4 * values["n_embd"] if args.inter_size is None else args.inter_size
    n_kv_head = 1 if args.multi_query_mode else values["n_head"]
    return ModelConfig(**values, inter_size=inter_size, n_kv_head=n_kv_head, bias=not args.no_bias)


def check_embedding(model: ModelConfig, build: BuildConfig) -> None:
    if build.use_parallel_embedding and build.embedding_sharding_dim == 1 and model.tied_head:
        raise ConfigError(
            "the embedding table cannot be cut by hidden size: it is the head too, which is cut by vocabulary",
            found="--use_parallel_embedding --embedding_sharding_dim 1, tied head",
            allowed="--embedding_sharding_dim 0, or a model with a head of its own",
        )


def backend_of(args: Namespace) -> str:
    if args.backend != "auto":
        return str(args.backend)
    backend = "tensorrt" if args.target else "torch"
    log.info(
        "Backend: %s (%s)",
        backend,
        "--target was given" if args.target else "runs on any CPU and GPU; --backend chooses",
    )
    return backend


def plugin_dtype(args: Namespace, name: str, dtype: str) -> str | None:
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


def limits_of(args: Namespace, model: ModelConfig) -> dict[str, int]:
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


def seed_of(args: Namespace) -> int:
    if args.random_seed is not None:
        return int(args.random_seed)
    import secrets

    seed = secrets.randbits(31)
    log.info("Random weights, --random_seed %d", seed)
    return seed


def explain_idle_flags(args: Namespace, backend: str) -> None:
    torch_backend = backend == "torch"
    for given, text in (
        (
            (args.tokens_per_block or args.max_num_tokens) is not None and not args.paged_kv_cache,
            "--tokens_per_block and --max_num_tokens belong to --paged_kv_cache",
        ),
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
