#!/usr/bin/env python3
"""FT checkpoint or random weights -> engine folder."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gpt.checkpoint.layout import QuantFiles, describe_architecture
from gpt.checkpoint.store import Checkpoint
from gpt.cli import reject_unsupported, run_main
from gpt.config import BuildConfig, ModelConfig, check_against_positions
from gpt.console import log, setup_logging
from gpt.errors import ConfigError
from gpt.launch import read_launch
from gpt.mapping import check_divides
from gpt.quant import QuantConfig
from gpt.text.build_options import (
    MAX_NUM_TOKENS,
    RANDOM_DEFAULTS,
    TOKENS_PER_BLOCK,
    backend_of,
    build_parser,
    check_embedding,
    explain_idle_flags,
    limits_of,
    model_of_flags,
    plugin_dtype,
    seed_of,
    unsupported,
)
from gpt.text.quant_options import check_calibrated, quantization_of


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
    reject_unsupported(unsupported(args))
    from gpt.engine.builder import build_engine, prepare_backend

    checkpoint = Checkpoint.open(Path(args.model_dir), args.world_size) if args.model_dir else None
    if checkpoint is not None:
        checkpoint.check_world_size(args.world_size)
    model = _model_of_checkpoint(args, checkpoint) if checkpoint else model_of_flags(args)
    check_divides(model, args.world_size)
    log.info("Model: %s, vocabulary %d", describe_architecture(model), model.vocab_size)
    build = _build_config(args, model, checkpoint)
    check_embedding(model, build)
    explain_idle_flags(args, build.backend)
    if args.dry_run:
        from gpt.engine.plan import Plan

        build, notes, library = prepare_backend(model, build)
        for note in notes:
            log.info(note)
        print(Plan.make(model, build, library).describe(Path(args.output_dir), args.gpus_per_node))
        return
    if args.check_quality is None or checkpoint is None:
        build_engine(model, build, checkpoint, Path(args.output_dir))
        return
    from gpt.text.quality import check_quality, read_rows

    if not checkpoint.tokenizer_files:
        where = f"none in {checkpoint.folder}"
        raise ConfigError("no tokenizer to check the quality with", found=where, hint="put the model's own there")
    rows = read_rows(Path(args.check_quality))  # what is wrong with them is known before the work
    build_engine(model, build, checkpoint, Path(args.output_dir))
    print(check_quality(Path(args.output_dir), checkpoint, rows))


def _model_of_checkpoint(args: Namespace, checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint decides; flags that say something else are named with both values."""
    model = checkpoint.model
    log.info("Setting model configuration from %s", checkpoint.folder)
    stored = {**dataclasses.asdict(model), "no_bias": not model.bias, "multi_query_mode": model.multi_query}
    names = [*RANDOM_DEFAULTS, "inter_size", "no_bias", "multi_query_mode"]
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


def _build_config(args: Namespace, model: ModelConfig, checkpoint: Checkpoint | None) -> BuildConfig:
    dtype = args.dtype or (checkpoint.storage_dtype if checkpoint else "float16")
    if checkpoint is not None and dtype != checkpoint.storage_dtype:
        log.info("Converting %s weights to %s", checkpoint.storage_dtype, dtype)
    limits = limits_of(args, model)
    build = BuildConfig(
        dtype=dtype,
        backend=backend_of(args),
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
        gpt_attention_plugin=plugin_dtype(args, "gpt_attention", dtype),
        gemm_plugin=plugin_dtype(args, "gemm", dtype),
        layernorm_plugin=plugin_dtype(args, "layernorm", dtype),
        lookup_plugin=plugin_dtype(args, "lookup", dtype),
        context_fmha=1 if args.enable_context_fmha else 2 if args.enable_context_fmha_fp32_acc else 0,
        remove_input_padding=args.remove_input_padding,
        paged_kv_cache=args.paged_kv_cache,
        tokens_per_block=args.tokens_per_block or TOKENS_PER_BLOCK,
        use_inflight_batching=args.use_inflight_batching,
        max_num_tokens=args.max_num_tokens or max(MAX_NUM_TOKENS, args.max_batch_size),
        builder_opt=args.builder_opt,
        batch_buckets=tuple(args.batch_buckets),
        profiling_verbosity=args.profiling_verbosity,
        weight_streaming=args.weight_streaming,
        refit=args.refit,
        timing_cache=args.timing_cache,
        seed=seed_of(args) if checkpoint is None else None,
        quant=_quantization(args, model, checkpoint),
    )
    check_against_positions(model, build)
    return build


def _quantization(args: Namespace, model: ModelConfig, checkpoint: Checkpoint | None) -> QuantConfig:
    """What the flags ask for.  Raises CheckpointError, with the command that adds them, for scales that are missing or
    no positive numbers."""
    if checkpoint is None:
        return quantization_of(args, model, QuantFiles(smoothquant=True, kv_separate=True))  # ranges by rule
    check_calibrated(args, checkpoint)
    quant = quantization_of(args, model, checkpoint.quant)
    if quant.activations or quant.kv_cache:
        checkpoint.check_scales()
    return quant


if __name__ == "__main__":
    sys.exit(main())
