#!/usr/bin/env python3
"""Runs an engine: prompts in, text or token files out."""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is loaded
    from gpt.interrupt import end_at_once

    end_at_once()

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.cli import ArgumentParser, add_log_level, positive_int, reject_unsupported, run_main
from gpt.console import setup_logging
from gpt.errors import ConfigError
from gpt.launch import read_launch
from gpt.runtime.batching_config import DEFAULT_BATCHING, BatchingConfig
from gpt.runtime.execution import Execution
from gpt.text.decoding_options import add_decoding_flags, decoding_of_call, read_decoding
from gpt.text.execution_options import add_execution_flags, read_execution
from gpt.text.interactive import interact
from gpt.text.prompt_fit import ON_LONG_PROMPT
from gpt.text.prompt_tuning import parse_tasks
from gpt.text.prompts import TOKEN_SUFFIXES, check_suffix
from gpt.text.run_prompts import DEFAULT_PROMPT, RunConfig, run_prompts
from gpt.text.score_prompts import contradictions, score_prompts


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--max_output_len", type=positive_int, help="number of new tokens at most; required to make text"
    )
    parser.add_argument("--engine_dir", type=Path, default=Path("gpt_outputs"), help="folder that build.py wrote")
    source = parser.add_argument_group("prompts, one of")
    source.add_argument(
        "--input_text",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help=f"one or more prompts (default: {DEFAULT_PROMPT!r}, or a session where you type them on a terminal)",
    )
    source.add_argument(
        "--input_tokens", type=Path, metavar="FILE", help="token ids: .csv, one prompt per line, or .npy"
    )
    source.add_argument(
        "--input_file",
        type=Path,
        metavar="FILE",
        help=".txt, one prompt per line; .jsonl, .parquet, or .csv with --column; .csv or .npy as above",
    )
    result = parser.add_argument_group("results (text on stdout where no file is named)")
    result.add_argument("--output_csv", type=Path, metavar="FILE", help="token ids of whole rows")
    result.add_argument("--output_npy", type=Path, metavar="FILE", help="token ids of whole rows, int32")
    result.add_argument("--output_file", type=Path, metavar="FILE", help="one line of JSON per prompt, as they end")
    result.add_argument("--resume", action="store_true", help="go on with an --output_file that a run left behind")
    result.add_argument("--streaming", action="store_true", help="print the text while it is generated")
    result.add_argument("--score_prompts", action="store_true", help="make no text, tell how likely each prompt is")
    words = parser.add_argument_group("tokenizer (default: the one in the engine folder)")
    words.add_argument("--tokenizer", metavar="PLACE", help="local folder, or name on the model hub")
    words.add_argument("--vocab_file", type=Path, metavar="FILE", help="sentencepiece model; goes before --tokenizer")
    words.add_argument(
        "--end_id", type=int, metavar="ID", help="ends a text (default: the tokenizer's or the checkpoint's)"
    )
    add_decoding_flags(parser)
    _add_batch_flags(parser)
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
    add_execution_flags(parser)
    add_log_level(parser, default="error")
    return parser


def _add_batch_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("many prompts")
    group.add_argument("--column", metavar="NAME", help="of the texts in a table (default: prompt; .csv: token ids)")
    group.add_argument("--max_input_length", type=positive_int, help="tokens of a prompt (default: what fits)")
    group.add_argument(
        "--on_long_prompt", choices=ON_LONG_PROMPT, default="refuse", help="truncate keeps the end of the prompt"
    )
    group = parser.add_argument_group("paged cache (engines built with --paged_kv_cache)")
    group.add_argument(
        "--max_draft_len", type=int, default=0, metavar="N", help="tokens guessed from the text at a time"
    )
    group.add_argument(
        "--kv_cache_free_gpu_memory_fraction",
        type=float,
        default=0.9,
        metavar="PART",
        help="of free memory, for the cache",
    )
    group.add_argument("--max_tokens_in_paged_kv_cache", type=int, metavar="N", help="tokens that the cache holds")


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
    output_file: str | Path | None = None,
    resume: bool = False,
    column: str | None = None,
    max_input_length: int | None = None,
    on_long_prompt: str = "refuse",
    max_draft_len: int = 0,
    kv_cache_free_gpu_memory_fraction: float = DEFAULT_BATCHING.free_memory_fraction,
    max_tokens_in_paged_kv_cache: int | None = None,
    no_cuda_graphs: bool = False,
    batch_invariant: bool = False,
    **decoding: Any,
) -> list[str]:
    """Runs the prompts, prints the new texts or writes the token files where one is named, and returns the texts.

    Without a tokenizer, token files can be read and written, and the result is empty.
    prompt_table, tasks: virtual tokens, and the task of each prompt or one for all, "0,1" or (0, 1).
    decoding: see `DecodingOptions`, by the names of the flags (temperature, stop_words, length_penalty, ...); the
    default is greedy.  With several results per prompt, the texts of one prompt follow each other, the best first.
    output_file: results go there as lines of JSON, and the return value is empty; `resume` goes on with such a file.
    logprobs: a file for log-probabilities, or True, which puts them into the lines of `output_file`.
    The other names are those of the flags, too.
    Raises ConfigError, CheckpointError (the table) or EngineError for what the command line would refuse.
    """
    setup_logging(log_level)
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
        decoding=decoding_of_call(num_beams=num_beams, **decoding),
        output_file=_path(output_file),
        resume=resume,
        column=column,
        max_input_length=max_input_length,
        on_long_prompt=on_long_prompt,
        batching=BatchingConfig(kv_cache_free_gpu_memory_fraction, max_tokens_in_paged_kv_cache, max_draft_len),
        execution=Execution(cuda_graphs=not no_cuda_graphs, batch_invariant=batch_invariant),
    )
    return run_prompts(config, sys.stdout)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _run(args: Namespace) -> None:
    given = [flag for flag in ("input_text", "input_tokens", "input_file") if getattr(args, flag) is not None]
    if len(given) > 1:
        raise ConfigError("the prompts come from one place", found=", ".join(f"--{flag}" for flag in given))
    if args.input_tokens is not None:
        check_suffix(args.input_tokens, TOKEN_SUFFIXES)
        if args.column is not None:
            raise ConfigError("--column names a column of texts, and --input_tokens holds ids", hint="--input_file")
    config = RunConfig(
        max_output_len=args.max_output_len or 0,
        engine_dir=args.engine_dir,
        texts=(DEFAULT_PROMPT,) if args.input_text is None else tuple(args.input_text),
        input_file=args.input_tokens or args.input_file,
        output_csv=args.output_csv,
        output_npy=args.output_npy,
        tokenizer=args.tokenizer,
        vocab_file=args.vocab_file,
        end_id=args.end_id,
        prompt_table=args.prompt_table,
        tasks=None if args.tasks is None else parse_tasks(args.tasks),
        device=args.device,
        streaming=args.streaming,
        decoding=read_decoding(args),
        output_file=args.output_file,
        resume=args.resume,
        column=args.column,
        max_input_length=args.max_input_length,
        on_long_prompt=args.on_long_prompt,
        batching=BatchingConfig(
            args.kv_cache_free_gpu_memory_fraction, args.max_tokens_in_paged_kv_cache, args.max_draft_len
        ),
        execution=read_execution(args),
    )
    if args.score_prompts:
        reject_unsupported(contradictions(config))
        score_prompts(config, sys.stdout)
    elif not given and _is_terminal(config):
        interact(config, args, sys.stdout)
    else:
        run_prompts(config, sys.stdout)


def _is_terminal(config: RunConfig) -> bool:
    """Whether somebody may type prompts: several ranks have no terminal."""
    if config.writes_files or config.output_file is not None:
        return False
    return read_launch().size == 1 and sys.stdin.isatty() and sys.stdout.isatty()


def _spawn(args: Namespace, argv: Sequence[str]) -> int | None:
    from gpt.runtime.ranks import spawn_ranks

    code = spawn_ranks(args.engine_dir, __file__, argv)
    if code is None:
        _run(args)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.max_output_len is None and not args.score_prompts:
        parser.error("the following arguments are required: --max_output_len")
    setup_logging(args.log_level)
    return run_main(lambda: _spawn(args, sys.argv[1:] if argv is None else argv) if args.spawn else _run(args))


if __name__ == "__main__":
    sys.exit(main())
