"""Prompts to token ids, through an engine, to text: the steps that run.py and summarize.py share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from gpt.config import ModelConfig
from gpt.console import log, print_notice
from gpt.engine.folder import EngineInfo
from gpt.errors import ConfigError, Problems
from gpt.runtime.session import RecordsSteps
from gpt.text.prompts import unicode_problem
from gpt.text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gpt.runtime.batching_config import BatchingConfig
    from gpt.runtime.beam_config import BeamConfig
    from gpt.runtime.generate import Generation
    from gpt.runtime.logprobs import TokenLogprob
    from gpt.runtime.request import Request
    from gpt.runtime.session import PagedSession, Session
    from gpt.text.decoding_options import DecodingOptions

T = TypeVar("T")
_NOTICEABLE_S = 1.0
_BUNDLED_TOKENIZER = Path(__file__).parents[2] / "assets" / "gpt2-tiny"


def choose_tokenizer(info: EngineInfo, location: str | None, vocab_file: Path | None) -> Tokenizer | None:
    """The sentencepiece model `vocab_file`, else the tokenizer at `location`, else the engine's own, else None.

    Random weights make no sensible text with any tokenizer, so an engine of them gets the bundled one rather than none.
    """
    if vocab_file is not None:
        return SentencePieceTokenizer(vocab_file)
    if location is not None:
        return load_tokenizer(location)
    if info.tokenizer_dir is not None:
        return load_tokenizer(info.tokenizer_dir)
    if info.build.seed is not None and (_BUNDLED_TOKENIZER / "tokenizer.json").is_file():
        log.info("The engine has random weights and no tokenizer: %s is used", _BUNDLED_TOKENIZER.name)
        return load_tokenizer(_BUNDLED_TOKENIZER)
    return None


def require_tokenizer(tokenizer: Tokenizer | None, info: EngineInfo, what_for: str) -> Tokenizer:
    """Raises ConfigError where there is no tokenizer."""
    if tokenizer is None:
        raise ConfigError(
            f"no tokenizer to {what_for}",
            found=f"none in the engine folder {info.folder}",
            hint="--tokenizer <folder or hub name> or --vocab_file <sentencepiece model>; "
            "token ids need none: --input_tokens with --output_csv or --output_npy",
        )
    return tokenizer


def choose_end_id(override: int | None, tokenizer: Tokenizer | None, model: ModelConfig) -> int | None:
    """The id that ends a text: the user's, else the tokenizer's, else the checkpoint's; None where nobody knows one.

    Raises ConfigError for an `override` outside the vocabulary.
    """
    if override is not None:
        if not 0 <= override < model.vocab_size:
            raise ConfigError(
                "--end_id is no token of the model", found=override, allowed=f"0 to {model.vocab_size - 1}"
            )
        return override
    end_id = model.eos_token_id if tokenizer is None or tokenizer.end_id is None else tokenizer.end_id
    if end_id is None:
        log.warning("No end token is known: every output has the full length (--end_id sets one)")
    elif not 0 <= end_id < model.vocab_size:
        log.warning("The end token %d lies outside the vocabulary of %d and never comes", end_id, model.vocab_size)
    return end_id


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], model: ModelConfig) -> list[list[int]]:
    """Token ids of each text, nothing added.

    Raises ConfigError for texts without tokens or that are no Unicode, and for a tokenizer whose ids the model's
    embedding does not have.
    """
    problems = Problems()
    for number, text in enumerate(texts):
        problem = unicode_problem(text)
        if problem is not None:
            problems.add(f"prompt {number}: {problem}")
    problems.raise_if_any(ConfigError, "prompts that are no text")
    prompts = [tokenizer.encode(text) for text in texts]
    for number, prompt in enumerate(prompts):
        if not prompt:
            problems.add(f"prompt {number}: {texts[number]!r}")
    problems.raise_if_any(ConfigError, "an empty prompt has nothing to continue", hint="give at least one character")
    check_vocabulary(tokenizer, prompts, model.vocab_size)
    return prompts


def check_vocabulary(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ConfigError where the tokenizer made ids that the model's embedding does not have."""
    largest = max(map(max, prompts))
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} does not belong to this model",
            found=f"token id {largest} in the prompts; the tokenizer has {tokenizer.vocab_size} tokens",
            allowed=f"0 to {vocab_size - 1}, the model's vocabulary",
            hint="--tokenizer or --vocab_file names the tokenizer the model was trained with",
        )


def batches(prompts: Sequence[T], batch_size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """(index of the first one, the prompts) of each batch."""
    for first in range(0, len(prompts), batch_size):
        yield first, prompts[first : first + batch_size]


def generate_batches(
    session: Session,
    request: Request,
    *,
    num_samples: int = 1,
    on_token: Callable[[int, int], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    on_logprobs: Callable[[int, list[TokenLogprob]], None] | None = None,
    results: list[Generation] | None = None,
    batching: BatchingConfig | None = None,
) -> list[Generation]:
    """Runs any number of prompts in batches that the engine holds, all of them as one where its cache is paged.

    A seed that the request lacks is made up once for all batches.
    num_samples: rows of the result per prompt; row p * num_samples + k is sample k of prompt p.
    on_token: called with (row, new token id) as tokens come; on_end: with each row at its end; on_logprobs: before that
    with (row, log-probabilities of its tokens) where the request asks for them, which the result then does not have.
    results: a list that gets each batch's result when it is complete; it is what is returned.
    batching: of a paged cache.
    Raises ConfigError for prompts that the engine cannot take.
    """
    from gpt.runtime.generate import generate

    results = [] if results is None else results
    request = request.with_samples(num_samples)
    if session.build.paged_kv_cache:
        from gpt.runtime.batcher import generate_paged

        paged = cast("PagedSession", session)
        results.append(
            generate_paged(paged, request, on_token=on_token, on_end=on_end, on_logprobs=on_logprobs, batching=batching)
        )
        return results
    for first, rows in batches(range(len(request.prompts)), session.build.max_batch_size):

        def show(tokens: Sequence[int | None], first: int = first) -> None:
            for row, token in enumerate(tokens, start=first):
                if token is not None and on_token is not None:
                    on_token(row, token)

        results.append(
            generate(
                session,
                request.of_rows(rows),
                on_tokens=show,
                on_end=_with_first(first, on_end),
                on_logprobs=_with_first(first, on_logprobs),
            )
        )
    return results


def _with_first(first: int, call: Callable[..., None] | None) -> Callable[..., None] | None:
    """For rows of a batch that begins with row `first`."""
    return None if call is None else lambda row, *rest: call(first + row, *rest)


def search_batches(
    session: Session, request: Request, beams: BeamConfig, *, results: list[Generation] | None = None
) -> list[Generation]:
    """The same by beam search, with `beams.num_returned` rows per prompt, the best first: see `generate_beams`."""
    from gpt.runtime.beams import generate_beams

    results = [] if results is None else results
    for _, rows in batches(range(len(request.prompts)), session.build.max_batch_size):
        results.append(generate_beams(session, request.of_rows(rows), beams))
    return results


def run_batches(
    session: Session,
    request: Request,
    decoding: DecodingOptions,
    *,
    on_token: Callable[[int, int], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    results: list[Generation] | None = None,
    batching: BatchingConfig | None = None,
) -> list[Generation]:
    """`search_batches` or `generate_batches`, as `decoding` says.

    on_token, on_end, batching: not for a search, which knows no text before its end.
    """
    if decoding.uses_beams:
        return search_batches(session, request, decoding.search, results=results)
    return generate_batches(
        session,
        request,
        num_samples=decoding.num_results,
        on_token=on_token,
        on_end=on_end,
        results=results,
        batching=batching,
    )


def without_end(tokens: Sequence[int], end_id: int | None) -> Sequence[int]:
    """New tokens as generated, less the end token behind them."""
    return tokens[:-1] if tokens and tokens[-1] == end_id else tokens


def describe_speed(results: Sequence[Generation]) -> str:
    """One line: tokens, seconds, tokens per second of all sequences, milliseconds per step."""
    num_tokens = sum(result.num_tokens for result in results)
    total_ms = sum(result.total_ms for result in results)
    steps = [ms for result in results for ms in result.step_ms]
    what = f"{num_tokens} new token{'s' * (num_tokens != 1)}"
    line = f"{what} in {total_ms / 1e3:.3f} s, {num_tokens / total_ms * 1e3:.1f} tokens/s"
    return f"{line}, {sum(steps) / len(steps):.2f} ms per token" if steps else line


def recording_seconds(session: Session) -> float:
    """What recording a GPU's steps has taken so far; 0 where none are recorded."""
    return session.recording_seconds if isinstance(session, RecordsSteps) else 0.0


def tell_recording(session: Session, before: float = 0.0) -> None:
    """A line on stderr where recording took noticeable time since it stood at `before`: why the first time was slow."""
    seconds = recording_seconds(session) - before
    if seconds >= _NOTICEABLE_S:
        print_notice(
            f"{seconds:.1f} s went into steps that came for the first time: they were recorded as CUDA graphs, their "
            "kernels compiled where no earlier run had done so"
        )
