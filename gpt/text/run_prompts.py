"""Prompts from a command line or a file, through an engine, to stdout or token files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gpt.comm import start
from gpt.console import log
from gpt.engine.folder import EngineInfo, open_engine
from gpt.runtime.limits import check_prompts
from gpt.runtime.ranks import join_ranks
from gpt.runtime.sampling_config import GREEDY, SamplingConfig
from gpt.text.pipeline import (
    choose_end_id,
    choose_tokenizer,
    describe_speed,
    encode_prompts,
    generate_batches,
    require_tokenizer,
    without_end,
)
from gpt.text.prompt_tuning import PromptTuning, load_prompt_tuning
from gpt.text.prompts import (
    TEXT_SUFFIXES,
    TOKEN_SUFFIXES,
    check_input_file,
    check_output_file,
    full_rows,
    read_texts,
    read_tokens,
    write_csv,
    write_npy,
)
from gpt.text.streaming import StreamDecoder, StreamPrinter, print_pair
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation
    from gpt.runtime.session import Session

DEFAULT_PROMPT = "Born in north-east France, Soyer trained as a"


@dataclass(frozen=True)
class RunConfig:
    """What to run.

    input_file: prompts as .txt, .csv or .npy, in place of `texts`.  output_csv, output_npy: token files written in
    place of the text on stdout.  tokenizer, vocab_file, end_id: None takes what the engine folder knows.  prompt_table,
    tasks: see `load_prompt_tuning`.  sampling: how tokens are chosen, by default greedily.
    """

    max_output_len: int
    engine_dir: Path = Path("gpt_outputs")
    texts: tuple[str, ...] = (DEFAULT_PROMPT,)
    input_file: Path | None = None
    output_csv: Path | None = None
    output_npy: Path | None = None
    tokenizer: str | None = None
    vocab_file: Path | None = None
    end_id: int | None = None
    prompt_table: Path | None = None
    tasks: tuple[int, ...] | None = None
    device: str = "auto"
    streaming: bool = False
    sampling: SamplingConfig = GREEDY

    @property
    def writes_files(self) -> bool:
        return self.output_csv is not None or self.output_npy is not None


def run_prompts(config: RunConfig, out: TextIO) -> list[str]:
    """Runs all prompts; returns the texts of the new tokens (none of them where only token files go in and out).

    Among several ranks the first one prints, writes and returns; the others return nothing.

    Everything that can be refused is refused before the engine is loaded.
    Raises ConfigError for input, options or output that cannot be used, CheckpointError for a damaged prompt table,
    EngineError for a bad engine.
    """
    if config.input_file is not None:
        check_input_file(config.input_file, (*TEXT_SUFFIXES, *TOKEN_SUFFIXES))
    start()  # first, so that what fails on one rank alone ends them all
    info = open_engine(config.engine_dir)
    ranks = join_ranks(info)
    tokenizer = choose_tokenizer(info, config.tokenizer, config.vocab_file)
    end_id = choose_end_id(config.end_id, tokenizer, info.model)
    prompts, tuning = _read_prompts(config, info, tokenizer, end_id)
    if not config.writes_files:
        require_tokenizer(tokenizer, info, "print the result")
    num_virtual = 0 if tuning is None else tuning.virtual.num_tokens
    check_prompts(info.model, info.build, prompts, config.max_output_len, num_virtual=num_virtual)
    config.sampling.check_fits(info.model.vocab_size, config.max_output_len)
    for path in (config.output_csv, config.output_npy):
        if path is not None and ranks.rank == 0:
            check_output_file(path)

    from gpt.runtime.load import load_session

    session = load_session(info, config.device)
    readable = [[token for token in prompt if token < info.model.vocab_size] for prompt in prompts]
    printer = None
    if config.streaming and tokenizer is not None and ranks.rank == 0:
        printer = _stream_printer(tokenizer, readable, end_id, out)
    results = _generate(session, prompts, config, end_id, tuning, printer)
    if ranks.rank > 0:
        return []
    log.info(describe_speed(results))
    outputs = [tokens for result in results for tokens in result.tokens]
    if config.writes_files:
        _write_files(config, prompts, outputs, end_id, info.model.pad_token_id)
    if tokenizer is None:
        return []
    decoded = [tokenizer.decode(without_end(tokens, end_id), skip_special=False) for tokens in outputs]
    if printer is None and not config.writes_files:
        for prompt, text in zip(readable, decoded, strict=True):
            print_pair(tokenizer.decode(prompt, skip_special=False), text, out)
    return decoded


def _read_prompts(
    config: RunConfig, info: EngineInfo, tokenizer: Tokenizer | None, end_id: int | None
) -> tuple[list[list[int]], PromptTuning | None]:
    """The prompts with their virtual tokens: text gets those of its task in front, token files have them already."""
    vocab_size = info.model.vocab_size
    if config.input_file is not None and config.input_file.suffix.lower() in TOKEN_SUFFIXES:
        prompts = read_tokens(config.input_file, end_id)
        tuning = load_prompt_tuning(config.prompt_table, config.tasks, info, len(prompts))
        if tuning is not None:
            tuning.check_ids(prompts, vocab_size)
        return prompts, tuning
    texts = config.texts if config.input_file is None else read_texts(config.input_file)
    prompts = encode_prompts(require_tokenizer(tokenizer, info, "read the prompts"), texts, info.model)
    tuning = load_prompt_tuning(config.prompt_table, config.tasks, info, len(prompts))
    return prompts if tuning is None else tuning.prepend(prompts, vocab_size), tuning


def _stream_printer(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], end_id: int | None, out: TextIO
) -> StreamPrinter:
    texts = [tokenizer.decode(prompt, skip_special=False) for prompt in prompts]
    return StreamPrinter(texts, lambda: StreamDecoder(tokenizer, skip_special=False), end_id, out)


def _generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    config: RunConfig,
    end_id: int | None,
    tuning: PromptTuning | None,
    printer: StreamPrinter | None,
) -> list[Generation]:
    run = partial(
        generate_batches,
        session,
        prompts,
        max_new_tokens=config.max_output_len,
        end_id=end_id,
        virtual=None if tuning is None else tuning.virtual,
        sampling=config.sampling,
    )
    if printer is None:
        return run()
    try:
        return run(on_token=printer.add, on_end=printer.end)
    except BaseException:  # an interrupt as well as an error: what follows on the terminal starts on a line of its own
        printer.interrupt()
        raise


def _write_files(
    config: RunConfig,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    end_id: int | None,
    pad_id: int | None,
) -> None:
    known = [token for token in (end_id, pad_id) if token is not None]
    rows = full_rows(prompts, outputs, config.max_output_len, fill_id=known[0] if known else 0)
    if config.output_csv is not None:
        write_csv(config.output_csv, rows)
    if config.output_npy is not None:
        write_npy(config.output_npy, rows)
