"""Prompts from a command line or a file, through an engine, to stdout or token files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gpt.cli import reject_unsupported
from gpt.comm import start
from gpt.engine.folder import EngineInfo, open_engine
from gpt.runtime.batching_config import DEFAULT_BATCHING, BatchingConfig
from gpt.runtime.execution import DEFAULT_EXECUTION, Execution
from gpt.runtime.ranks import check_same_input, join_ranks
from gpt.runtime.request import Request
from gpt.text.decoding_options import GREEDY_DECODING, DecodingOptions
from gpt.text.pipeline import (
    choose_end_id,
    choose_tokenizer,
    encode_prompts,
    require_tokenizer,
    run_batches,
    tell_recording,
)
from gpt.text.prompt_fit import fit_prompts, prompt_limit
from gpt.text.prompt_rows import ROW_SUFFIXES, holds_tokens, read_row_texts
from gpt.text.prompt_tuning import PromptTuning, load_prompt_tuning
from gpt.text.prompts import TOKEN_SUFFIXES, check_input_file, check_output_file, read_tokens
from gpt.text.run_job import prepare_job, run_job, with_earlier_seed
from gpt.text.run_results import Results, Wanted
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation

DEFAULT_PROMPT = "Born in north-east France, Soyer trained as a"


@dataclass(frozen=True)
class RunConfig:
    """What to run.

    input_file: prompts as .txt, .csv or .npy, in place of `texts`.  output_csv, output_npy: token files written in
    place of the text on stdout.  tokenizer, vocab_file, end_id: None takes what the engine folder knows.  prompt_table,
    tasks: see `load_prompt_tuning`.  decoding: how texts are made, by default greedily.
    output_file: results as .jsonl, which `resume` goes on with.  column: of the texts in a table.  max_input_length,
    on_long_prompt: see `prompt_limit` and ON_LONG_PROMPT.  batching: of a paged cache.
    Raises ConfigError for what goes against each other.
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
    decoding: DecodingOptions = GREEDY_DECODING
    output_file: Path | None = None
    resume: bool = False
    column: str | None = None
    max_input_length: int | None = None
    on_long_prompt: str = "refuse"
    batching: BatchingConfig = DEFAULT_BATCHING
    execution: Execution = DEFAULT_EXECUTION

    def __post_init__(self) -> None:
        reject_unsupported(self._contradictions())

    @property
    def writes_files(self) -> bool:
        return self.output_csv is not None or self.output_npy is not None

    def wanted(self, end_id: int | None, pad_id: int | None, rank: int) -> Wanted:
        """Where the results go; only the first rank streams."""
        known = [token for token in (end_id, pad_id) if token is not None]
        return Wanted(
            self.output_csv,
            self.output_npy,
            self.decoding.logprobs_file,
            self.streaming and rank == 0,
            self.max_output_len,
            known[0] if known else 0,
            self.decoding.num_results,
        )

    def _contradictions(self) -> list[str]:
        problems = []
        if self.column is not None and self.input_file is None:
            problems.append(f"--column {self.column} without --input_file: it names a column of that table")
        if self.resume and self.output_file is None:
            problems.append("--resume without --output_file: only that file says what is done already")
        if self.output_file is not None and (self.writes_files or self.streaming):
            problems.append("--output_file with --output_csv, --output_npy or --streaming: results go to one place")
        logprobs = self.decoding.logprobs_file
        if self.output_file is not None and logprobs is not None:
            problems.append(
                f"--output_file with --logprobs {logprobs}: results go to one place; --logprobs without a file name"
                " puts them into the lines of --output_file"
            )
        if self.output_file is None and self.decoding.logprobs is True:
            problems.append(
                "--logprobs without a file name and without --output_file, into whose lines they would go: name a file "
                "for them, --logprobs FILE, or --output_file"
            )
        if self.output_file is not None and self.output_file.suffix.lower() in (".parquet", *TOKEN_SUFFIXES):
            problems.append(
                f"--output_file {self.output_file.name}: it gets lines of JSON (.jsonl); --output_csv and --output_npy "
                "take token ids"
            )
        problems += self.batching.contradictions(
            self.decoding.beams.num_beams, batch_invariant=self.execution.batch_invariant
        )
        if self.streaming and self.writes_files:
            problems.append("--streaming prints text, --output_csv and --output_npy write token ids instead of it")
        if self.streaming and self.decoding.uses_beams:
            beams = self.decoding.beams.num_beams
            problems.append(f"--streaming with --num_beams {beams}: which hypothesis wins is known at the end only")
        return problems


def run_prompts(config: RunConfig, out: TextIO) -> list[str]:
    """Runs all prompts; returns the texts of the new tokens (none of them where only token files go in and out).

    Among several ranks the first one prints, writes and returns; the others return nothing.

    Everything that can be refused is refused before the engine is loaded.
    Raises ConfigError for input, options or output that cannot be used, CheckpointError for a damaged prompt table,
    EngineError for a bad engine.
    """
    start()  # first, so that what fails on one rank alone ends them all
    if config.input_file is not None:
        check_input_file(config.input_file, ROW_SUFFIXES)
    info = open_engine(config.engine_dir)
    ranks = join_ranks(info)
    tokenizer = choose_tokenizer(info, config.tokenizer, config.vocab_file)
    end_id = choose_end_id(config.end_id, tokenizer, info.model)
    config.batching.check_fits(info.build)
    decoding = config.decoding
    decoding.check_fits(info.build, info.model.vocab_size, config.max_output_len)
    decoding.choice(tokenizer).check_fits(info.model.vocab_size, config.max_output_len)
    stops = decoding.stops(tokenizer)
    if config.output_file is not None:
        job = prepare_job(config, info, tokenizer, end_id, stops)
        run_job(replace(job, config=with_earlier_seed(config)), ranks)
        return []
    prompts, tuning = read_prompts(config, info, tokenizer, end_id)
    if not config.writes_files:
        require_tokenizer(tokenizer, info, "print the result")
    request = Request(
        prompts,
        config.max_output_len,
        end_id,
        virtual=None if tuning is None else tuning.virtual,
        sampling=decoding.with_seed().choice(tokenizer),
        stops=stops,
        num_top_logprobs=decoding.num_top_logprobs,
    )
    request.check(info.model, info.build)
    check_same_input(ranks, prompts)
    for path in config.wanted(end_id, None, ranks.rank).files:
        if ranks.rank == 0:
            check_output_file(path)

    from gpt.runtime.load import load_session

    session = load_session(info, config.device, config.execution)
    wanted = config.wanted(end_id, info.model.pad_token_id, ranks.rank)
    results = Results(wanted, prompts, tokenizer, end_id, stops, info.model.vocab_size, out)
    batches: list[Generation] = []
    try:
        run_batches(
            session,
            request,
            decoding,
            on_token=results.add,
            on_end=results.end,
            results=batches,
            batching=config.batching,
        )
    except KeyboardInterrupt:
        if ranks.rank > 0:
            raise
        raise results.interrupted(batches) from None
    except BaseException:  # what follows on the terminal starts on a line of its own
        results.break_off()
        raise
    if ranks.rank > 0:
        return []
    texts = results.finish(batches)
    tell_recording(session)
    return texts


def read_prompts(
    config: RunConfig, info: EngineInfo, tokenizer: Tokenizer | None, end_id: int | None
) -> tuple[list[list[int]], PromptTuning | None]:
    """The prompts with their virtual tokens: text gets those of its task in front, token files have them already."""
    vocab_size = info.model.vocab_size
    if config.input_file is not None and holds_tokens(config.input_file, config.column):
        prompts = _fit(read_tokens(config.input_file, end_id), config, info, 0)
        tuning = load_prompt_tuning(config.prompt_table, config.tasks, info, len(prompts))
        if tuning is not None:
            tuning.check_ids(prompts, vocab_size)
        return prompts, tuning
    texts = config.texts if config.input_file is None else read_row_texts(config.input_file, config.column)
    prompts = encode_prompts(require_tokenizer(tokenizer, info, "read the prompts"), texts, info.model)
    tuning = load_prompt_tuning(config.prompt_table, config.tasks, info, len(prompts))
    if tuning is None:
        return _fit(prompts, config, info, 0), None
    return tuning.prepend(_fit(prompts, config, info, tuning.virtual.num_tokens), vocab_size), tuning


def _fit(prompts: list[list[int]], config: RunConfig, info: EngineInfo, num_virtual: int) -> list[list[int]]:
    """As --max_input_length and --on_long_prompt say; what else is too long is refused later, with everything else."""
    if config.max_input_length is None and config.on_long_prompt == "refuse":
        return prompts
    limit, reason = prompt_limit(info.model, info.build, config.max_output_len, config.max_input_length, num_virtual)
    return fit_prompts(prompts, limit, reason, truncate=config.on_long_prompt == "truncate")
