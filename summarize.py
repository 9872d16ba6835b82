#!/usr/bin/env python3
"""Summarises articles, or completes code, with an engine and with Hugging Face; compares text (ROUGE) and speed."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.console import log, setup_logging
from gpt.dtypes import canonical_dtype
from gpt.errors import ConfigError
from gpt.runtime.batching_config import BatchingConfig
from gpt.text.comparison import SummarizeConfig, compare
from gpt.text.decoding_options import add_choice_flags, read_decoding
from gpt.text.evaluation import TASKS
from gpt.text.execution_options import add_execution_flags, read_execution

_HF_DTYPE, _THRESHOLD = "fp32", 15.0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    sides = parser.add_argument_group("what to test, at least one")
    sides.add_argument("--test_trt_llm", "--test_engine", action="store_true", dest="test_engine", help="our engine")
    sides.add_argument("--test_hf", action="store_true", help="Hugging Face's own generate, on the same token ids")
    sides.add_argument("--engine_dir", type=Path, default=Path("gpt_outputs"), help="folder that build.py wrote")
    sides.add_argument("--hf_model_location", metavar="PLACE", help="local folder, or name on the model hub")
    sides.add_argument("--data_type", default=_HF_DTYPE, help="of the Hugging Face model: fp32, fp16 or bf16")
    add_execution_flags(sides)
    words = parser.add_argument_group("tokenizer (default: the engine's, else that of --hf_model_location)")
    words.add_argument("--tokenizer", metavar="PLACE", help="local folder, or name on the model hub")
    words.add_argument("--vocab_file", type=Path, metavar="FILE", help="sentencepiece model; goes before --tokenizer")
    data = parser.add_argument_group("texts (default: cnn_dailymail or openai_humaneval from the hub)")
    data.add_argument("--dataset_path", metavar="PATH", help="json, jsonl, csv or parquet file, or a data set's folder")
    data.add_argument("--article_column", metavar="NAME", help="column of the texts (default: article; prompt of code)")
    data.add_argument(
        "--highlights_column",
        metavar="NAME",
        help="column of the references (default: highlights; canonical_solution of code)",
    )
    data.add_argument("--batch_size", type=positive_int, default=1, help="texts at a time")
    data.add_argument("--max_ite", type=positive_int, default=20, help="number of batches")
    data.add_argument("--output_len", type=positive_int, default=100, help="new tokens at most")
    data.add_argument(
        "--eval_type",
        choices=tuple(TASKS),
        default="summarize",
        help="code_completion compares the text with a reference solution and executes nothing",
    )
    add_choice_flags(parser)
    paged = parser.add_argument_group("paged cache (engines built with --paged_kv_cache)")
    paged.add_argument(
        "--max_draft_len", type=int, default=0, metavar="N", help="tokens the engine guesses from the text at a time"
    )
    check = parser.add_argument_group("results")
    check.add_argument("--check_accuracy", action="store_true", help="exit code 1 unless ROUGE-1 exceeds the threshold")
    threshold = ("--tensorrt_llm_rouge1_threshold", "--rouge1_threshold")
    check.add_argument(*threshold, type=float, default=_THRESHOLD, dest="threshold", help="for --check_accuracy")
    check.add_argument("--report", type=Path, metavar="FILE", help="write a self-contained HTML page")
    add_log_level(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    command = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    return run_main(lambda: _run(args, command))


def _run(args: Namespace, command: str) -> None:
    reject_unsupported(_unsupported(args))
    if not args.test_engine and not args.test_hf:
        raise ConfigError("nothing to test", allowed="--test_trt_llm (our engine), --test_hf, or both")
    if args.test_hf and args.hf_model_location is None:
        raise ConfigError("--test_hf needs a model", hint="--hf_model_location <folder or name on the hub>")
    if args.data_type != _HF_DTYPE and not args.test_hf:
        log.warning("--data_type %s has no effect without --test_hf", args.data_type)
    if args.threshold != _THRESHOLD and not args.check_accuracy:
        log.warning("--tensorrt_llm_rouge1_threshold %g has no effect without --check_accuracy", args.threshold)
    config = SummarizeConfig(
        engine_dir=args.engine_dir,
        test_engine=args.test_engine,
        hf_model=args.hf_model_location if args.test_hf else None,
        hf_dtype=canonical_dtype(args.data_type),
        tokenizer=args.tokenizer,
        vocab_file=args.vocab_file,
        dataset_path=Path(args.dataset_path) if args.dataset_path else None,
        article_column=args.article_column,
        highlights_column=args.highlights_column,
        batch_size=args.batch_size,
        max_batches=args.max_ite,
        output_len=args.output_len,
        device=args.device,
        threshold=args.threshold if args.check_accuracy else None,
        report=args.report,
        command=command,
        eval_type=args.eval_type,
        decoding=read_decoding(args),
        execution=read_execution(args),
        batching=BatchingConfig(max_draft_len=args.max_draft_len),
    )
    compare(config, sys.stdout)


def _unsupported(args: Namespace) -> list[str]:
    checks = (
        (
            args.num_beam_groups > 1 and args.test_hf,
            f"--num_beam_groups {args.num_beam_groups} with --test_hf: transformers has no groups of beams any more",
        ),
        *(
            (
                value != 0 and args.test_hf,
                f"--{name} {value:g}: transformers has no such penalty, so it goes without --test_hf",
            )
            for name in ("presence_penalty", "frequency_penalty")
            for value in [getattr(args, name)]
        ),
        (
            args.max_draft_len > 0 and not args.test_engine,
            f"--max_draft_len {args.max_draft_len}: the engine makes drafts, so it goes with --test_trt_llm",
        ),
        (
            args.check_accuracy and not args.test_engine,
            "--check_accuracy: it checks the engine's texts, so it goes with --test_trt_llm",
        ),
    )
    batching = BatchingConfig(max_draft_len=args.max_draft_len)
    drafts = batching.contradictions(args.num_beams, batch_invariant=args.batch_invariant)
    return [*(reason for present, reason in checks if present), *drafts]


if __name__ == "__main__":
    sys.exit(main())
