"""Many prompts from a file to a file of results, in the order of the input, which a killed run leaves fit to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.comm import Communicator
from gpt.console import log, print_notice
from gpt.engine.folder import EngineInfo
from gpt.errors import GptError, InterruptError, first_lines
from gpt.files import file_checksum
from gpt.runtime.ranks import check_same_input
from gpt.runtime.request import Request
from gpt.text.ordered_writer import OrderedWriter, Output
from gpt.text.pipeline import (
    batches,
    check_vocabulary,
    describe_speed,
    generate_batches,
    require_tokenizer,
    search_batches,
    tell_recording,
)
from gpt.text.prompt_fit import last_tokens, listed, prompt_limit
from gpt.text.prompt_rows import PromptRow, holds_tokens, read_rows
from gpt.text.prompt_tuning import PromptTuning, load_prompt_tuning
from gpt.text.prompts import check_output_file, unicode_problem
from gpt.text.result_file import ResultFile, read_job
from gpt.text.run_results import final_text
from gpt.text.stop_words import StopWords
from gpt.text.token_records import describe_output
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation
    from gpt.runtime.session import Session
    from gpt.text.run_prompts import RunConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """rows: the input.  prompts: token ids of each row, virtual ones in front; None for rows that cannot be run.
    problems: what is wrong with those, by index.  truncated: lengths before they were cut, by index."""

    config: RunConfig
    info: EngineInfo
    tokenizer: Tokenizer | None
    end_id: int | None
    stops: StopWords | None
    rows: Sequence[PromptRow]
    prompts: Sequence[list[int] | None]
    problems: dict[int, str]
    truncated: dict[int, int]
    tuning: PromptTuning | None

    def describe(self) -> dict[str, Any]:
        """What the results depend on: a continuation must have the same."""
        config = self.config
        source: Any = list(config.texts) if config.input_file is None else file_checksum(config.input_file)
        return {
            "input": source,
            "column": config.column,
            "engine": self.info.build_id,
            "tokenizer": config.tokenizer,
            "vocab_file": None if config.vocab_file is None else file_checksum(config.vocab_file),
            "end_id": self.end_id,
            "max_output_len": config.max_output_len,
            "max_input_length": config.max_input_length,
            "on_long_prompt": config.on_long_prompt,
            "prompt_table": None if config.prompt_table is None else file_checksum(config.prompt_table),
            "tasks": config.tasks,
            "decoding": dataclasses.asdict(config.decoding),
        }

    def record(self, index: int, outputs: Sequence[Output]) -> dict[str, Any]:
        """The line of one prompt: its text or texts, token ids where there is no tokenizer, or what went wrong."""
        line: dict[str, Any] = {"index": index, "line": self.rows[index].line}
        if index in self.problems:
            return {**line, "error": self.problems[index]}
        if index in self.truncated:
            line["truncated_from"] = self.truncated[index]
        name, values = "tokens", [output.tokens for output in outputs]
        results: list[Any] = values
        if self.tokenizer is not None:
            name = "text"
            results = [final_text(tokens, self.tokenizer, self.end_id, self.stops) for tokens in values]
        rest: dict[str, list[Any]] = {"num_tokens": [len(tokens) for tokens in values]}
        if self.config.decoding.logprobs is not None:
            rest["logprobs"] = [
                describe_output(output.tokens, output.logprobs, output.score, self.tokenizer) for output in outputs
            ]
        if self.config.decoding.num_results == 1:
            return {**line, name: results[0], **{key: found[0] for key, found in rest.items()}}
        return {**line, "results": results, **rest}


def prepare_job(
    config: RunConfig, info: EngineInfo, tokenizer: Tokenizer | None, end_id: int | None, stops: StopWords | None
) -> Job:
    """Reads all rows and makes them prompts; what cannot be run is noted.  Raises ConfigError as `read_rows` does, and
    for texts without a tokenizer.
    """
    if config.input_file is None:
        texts = enumerate(config.texts, start=1)
        rows = [PromptRow(number, text=text, problem=unicode_problem(text)) for number, text in texts]
    else:
        rows = read_rows(config.input_file, config.column, end_id)
    tuning = load_prompt_tuning(config.prompt_table, config.tasks, info, len(rows))
    vocab_size = info.model.vocab_size
    num_virtual = 0 if tuning is None else tuning.virtual.num_tokens
    limit, reason = prompt_limit(info.model, info.build, config.max_output_len, config.max_input_length)
    has_tokens = config.input_file is not None and holds_tokens(config.input_file, config.column)
    if not has_tokens:
        require_tokenizer(tokenizer, info, "read the prompts")
    prompts: list[list[int] | None] = []
    problems: dict[int, str] = {}
    truncated: dict[int, int] = {}
    encoded = [_encode(row, tokenizer) for row in rows]
    if tokenizer is not None and not has_tokens and any(encoded):
        check_vocabulary(tokenizer, [tokens for tokens in encoded if tokens], vocab_size)
    if tuning is not None and not has_tokens:
        encoded = tuning.prepend(encoded, vocab_size)
    for index, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
        in_front = sum(vocab_size <= token < vocab_size + num_virtual for token in tokens)
        problem = row.problem or _problem_of(tokens, vocab_size + num_virtual, in_front)
        if problem is None and len(tokens) > limit:
            if config.on_long_prompt == "truncate" and in_front < limit:
                truncated[index] = len(tokens)
                tokens = last_tokens(tokens, limit, in_front)
            else:
                problem = f"{len(tokens)} tokens, at most {limit} fit ({reason})"
        if problem is not None:
            problems[index] = problem
        prompts.append(None if problem is not None else tokens)
    return Job(config, info, tokenizer, end_id, stops, rows, prompts, problems, truncated, tuning)


def _encode(row: PromptRow, tokenizer: Tokenizer | None) -> list[int]:
    if row.text is None or row.problem is not None or tokenizer is None:
        return list(row.tokens or ())
    return tokenizer.encode(row.text)


def _problem_of(tokens: Sequence[int], num_ids: int, in_front: int) -> str | None:
    if len(tokens) == in_front:
        return "no tokens"
    unknown = [token for token in tokens if not 0 <= token < num_ids]
    return f"token id {unknown[0]}, allowed: 0 to {num_ids - 1}" if unknown else None


def with_earlier_seed(config: RunConfig) -> RunConfig:
    """A continuation draws as the run before it did.  Raises ConfigError as `read_job` does."""
    sampling = config.decoding.sampling
    earlier = read_job(config.output_file) if config.resume and config.output_file is not None else None
    if earlier is not None and sampling.seed is None and not sampling.is_greedy:
        seed = earlier.get("decoding", {}).get("sampling", {}).get("seed")
        decoding = dataclasses.replace(config.decoding, sampling=dataclasses.replace(sampling, seed=seed))
        config = dataclasses.replace(config, decoding=decoding)
    return dataclasses.replace(config, decoding=config.decoding.with_seed())


def run_job(job: Job, ranks: Communicator) -> None:
    """Loads the engine, computes what is missing of the results and appends it.

    Raises ConfigError where the output file holds something else, EngineError for a bad engine, InterruptError after
    Ctrl-C, and GptError where the disk is full or, at the very end, where rows could not be run.
    """
    check_same_input(ranks, job.prompts)
    path = job.config.output_file or Path()
    file = None
    if ranks.rank == 0:
        check_output_file(path)
        file = ResultFile(path, job.describe(), resume=job.config.resume)
    num_done = ranks.broadcast_object(0 if file is None else file.num_done)
    writer = OrderedWriter(job, file, num_done)
    try:
        results, session = _compute(job, writer, num_done)
    except KeyboardInterrupt:
        raise InterruptError(
            "interrupted",
            found=f"{writer.num_done} of {len(job.rows)} results are in {path}",
            hint="the same command with --resume goes on from there",
        ) from None
    finally:
        writer.close()
    if session is not None:
        tell_recording(session)
    if file is not None:
        if results:
            log.info(describe_speed(results))
        _tell(job, path, num_done)


def _compute(job: Job, writer: OrderedWriter, num_done: int) -> tuple[list[Generation], Session | None]:
    """What is missing of the results, and the session that made it, if any was needed."""
    pending = [index for index in range(num_done, len(job.rows)) if job.prompts[index] is not None]
    decoding = job.config.decoding
    results: list[Generation] = []
    writer.begin(pending)
    if not pending:
        return results, None
    from gpt.runtime.load import load_session

    session = load_session(job.info, job.config.device, job.config.execution)
    request = Request(
        [job.prompts[index] or [] for index in pending],
        job.config.max_output_len,
        job.end_id,
        virtual=None if job.tuning is None else job.tuning.virtual.of_prompts(pending),
        sampling=decoding.choice(job.tokenizer),
        keys=[(index,) for index in pending],
        stops=job.stops,
        num_top_logprobs=decoding.num_top_logprobs,
    )
    if not decoding.uses_beams:
        generate_batches(
            session,
            request,
            num_samples=decoding.num_results,
            on_token=writer.add,
            on_end=writer.end,
            on_logprobs=writer.add_logprobs,
            results=results,
            batching=job.config.batching,
        )
        return results, session
    for first, rows in batches(range(len(pending)), session.build.max_batch_size):
        search_batches(session, request.of_rows(rows), decoding.search, results=results)
        found = results[-1]
        logprobs = found.logprobs or [[] for _ in found.tokens]
        outputs = map(Output, found.tokens, logprobs, found.scores)
        for row, output in enumerate(outputs, start=first * decoding.num_results):
            writer.outputs[row] = output
            writer.end(row)
        found.logprobs = []  # what is written is let go
    return results, session


def _tell(job: Job, path: Path, num_before: int) -> None:
    before = f", {num_before} of them by an earlier run" if num_before else ""
    print_notice(f"{len(job.rows)} result{'s' * (len(job.rows) != 1)} in {path}{before}")
    cut = [f"line {job.rows[index].line}: {length} tokens" for index, length in job.truncated.items()]
    if cut:
        print_notice(f"Prompts cut to what fits: {listed(cut)}")
    if job.problems:
        wrong = [f"line {job.rows[index].line}: {problem}" for index, problem in sorted(job.problems.items())]
        what = f"{len(wrong)} of {len(job.rows)} prompts could not be run"
        raise GptError(what, found=first_lines(wrong), hint=f"{path} says it in their places")
