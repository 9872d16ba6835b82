#!/usr/bin/env python3
"""Runs an engine: prompts in, text or token files out."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.console import setup_logging
from gpt.errors import ConfigError
from gpt.runtime.sampling_config import SamplingConfig
from gpt.text.prompt_tuning import parse_tasks
from gpt.text.prompts import TOKEN_SUFFIXES, check_input_file
from gpt.text.run_prompts import DEFAULT_PROMPT, RunConfig, run_prompts


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--max_output_len", type=positive_int, required=True, help="number of new tokens at most")
    parser.add_argument("--engine_dir", type=Path, default=Path("gpt_outputs"), help="folder that build.py wrote")
    source = parser.add_argument_group("prompts, one of")
    source.add_argument(
        "--input_text", nargs="+", metavar="TEXT", help=f"one or more prompts (default: {DEFAULT_PROMPT!r})"
    )
    source.add_argument(
        "--input_tokens", type=Path, metavar="FILE", help="token ids: .csv, one prompt per line, or .npy"
    )
    source.add_argument(
        "--input_file", type=Path, metavar="FILE", help=".txt, one prompt per line, or .csv or .npy as above"
    )
    result = parser.add_argument_group("results (text on stdout where no file is named)")
    result.add_argument("--output_csv", type=Path, metavar="FILE", help="token ids of whole rows")
    result.add_argument("--output_npy", type=Path, metavar="FILE", help="token ids of whole rows, int32")
    result.add_argument("--streaming", action="store_true", help="print the text while it is generated")
    words = parser.add_argument_group("tokenizer (default: the one in the engine folder)")
    words.add_argument("--tokenizer", metavar="PLACE", help="local folder, or name on the model hub")
    words.add_argument("--vocab_file", type=Path, metavar="FILE", help="sentencepiece model; goes before --tokenizer")
    words.add_argument(
        "--end_id", type=int, metavar="ID", help="ends a text (default: the tokenizer's or the checkpoint's)"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="1 is what this version has")
    _add_sampling_flags(parser)
    tuning = parser.add_argument_group("prompt tuning")
    tuning.add_argument(
        "--prompt_table", type=Path, metavar="FILE", help="virtual tokens, .npy [tasks, tokens, hidden size]"
    )
    tuning.add_argument(
        "--tasks", metavar="IDS", help="task of each prompt, comma-separated, or one for all (default: 0)"
    )
    parser.add_argument(
        "--spawn", action="store_true", help="start all ranks of the engine here, as mpirun -np N run.py ... would"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_log_level(parser, default="error")
    return parser


def _add_sampling_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("choice of tokens (default: greedy)")
    group.add_argument("--top_k", type=int, default=1, help="draw from so many likeliest tokens; 1 greedy, 0 all")
    group.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
    group.add_argument("--min_p", type=float, default=0.0, help="probability, as part of the likeliest token's")
    group.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="on tokens of prompt and output, 1 is off")
    group.add_argument("--presence_penalty", type=float, default=0.0, help="once per generated token that came before")
    group.add_argument("--frequency_penalty", type=float, default=0.0, help="each time that a generated token came")
    group.add_argument("--min_length", type=int, default=0, help="new tokens before the end token may come")
    group.add_argument("--no_repeat_ngram_size", type=int, default=0, help="no so many tokens in a row come twice")
    group.add_argument("--seed", type=int, help="repeats what was drawn (default: another one each time)")


def generate(
    max_output_len: int,
    log_level: str = "error",
    engine_dir: str | Path = "gpt_outputs",
    input_text: str | Sequence[str] = DEFAULT_PROMPT,
    input_file: str | Path | None = None,
    output_csv: str | Path | None = None,
    output_npy: str | Path | None = None,
    tokenizer_path: str | None = None,
    vocab_file: str | Path | None = None,
    num_beams: int = 1,
    prompt_table: str | Path | None = None,
    tasks: str | Sequence[int] | None = None,
    *,
    device: str = "auto",
    end_id: int | None = None,
    streaming: bool = False,
    temperature: float = 1.0,
    top_k: int = 1,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    seed: int | None = None,
) -> list[str]:
    """Runs the prompts, prints the new texts or writes the token files where one is named, and returns the texts.

    Without a tokenizer, token files can be read and written, and the result is empty.
    prompt_table, tasks: virtual tokens, and the task of each prompt or one for all, "0,1" or (0, 1).
    temperature to seed: see `SamplingConfig`; the default is greedy.
    Raises ConfigError, CheckpointError (the table) or EngineError for what the command line would refuse.
    """
    setup_logging(log_level)
    reject_unsupported(_unsupported(num_beams, streaming, output_csv or output_npy))
    config = RunConfig(
        max_output_len=max_output_len,
        engine_dir=Path(engine_dir),
        texts=(input_text,) if isinstance(input_text, str) else tuple(input_text),
        input_file=_path(input_file),
        output_csv=_path(output_csv),
        output_npy=_path(output_npy),
        tokenizer=tokenizer_path,
        vocab_file=_path(vocab_file),
        end_id=end_id,
        prompt_table=_path(prompt_table),
        tasks=parse_tasks(tasks) if isinstance(tasks, str) else None if tasks is None else tuple(tasks),
        device=device,
        streaming=streaming,
        sampling=SamplingConfig(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            min_length,
            no_repeat_ngram_size,
            seed,
        ),
    )
    return run_prompts(config, sys.stdout)


def _unsupported(num_beams: int, streaming: bool, output_file: object) -> list[str]:
    problems = []
    if num_beams != 1:
        problems.append(f"--num_beams {num_beams}: this version has no beam search, 1 is allowed")
    if streaming and output_file is not None:
        problems.append("--streaming prints text, --output_csv and --output_npy write token ids instead of it")
    return problems


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _run(args: Namespace) -> None:
    given = [flag for flag in ("input_text", "input_tokens", "input_file") if getattr(args, flag) is not None]
    if len(given) > 1:
        raise ConfigError("the prompts come from one place", found=", ".join(f"--{flag}" for flag in given))
    if args.input_tokens is not None:
        check_input_file(args.input_tokens, TOKEN_SUFFIXES)
    generate(
        args.max_output_len,
        args.log_level,
        args.engine_dir,
        DEFAULT_PROMPT if args.input_text is None else args.input_text,
        args.input_tokens or args.input_file,
        args.output_csv,
        args.output_npy,
        args.tokenizer,
        args.vocab_file,
        args.num_beams,
        args.prompt_table,
        args.tasks,
        device=args.device,
        end_id=args.end_id,
        streaming=args.streaming,
        **{field.name: getattr(args, field.name) for field in fields(SamplingConfig)},
    )


def _spawn(args: Namespace, argv: Sequence[str]) -> int | None:
    from gpt.runtime.ranks import spawn_ranks

    code = spawn_ranks(args.engine_dir, __file__, argv)
    if code is None:
        _run(args)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(args.log_level)
    return run_main(lambda: _spawn(args, sys.argv[1:] if argv is None else argv) if args.spawn else _run(args))


if __name__ == "__main__":
    sys.exit(main())
