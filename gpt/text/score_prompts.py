"""Scores of given texts: how likely the model finds each of them, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gpt.comm import start
from gpt.engine.folder import open_engine
from gpt.errors import InterruptError
from gpt.files import write_text
from gpt.runtime.limits import check_prompts
from gpt.runtime.ranks import check_same_input, join_ranks
from gpt.text.decoding_options import GREEDY_DECODING
from gpt.text.pipeline import choose_end_id, choose_tokenizer
from gpt.text.prompts import check_output_file
from gpt.text.run_prompts import RunConfig, read_prompts
from gpt.text.token_records import describe_token
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.scoring import Score


def contradictions(config: RunConfig) -> list[str]:
    """What goes with making texts only."""
    problems = []
    decoding = config.decoding
    if (decoding.sampling, decoding.beams) != (GREEDY_DECODING.sampling, GREEDY_DECODING.beams):
        problems.append(f"--score_prompts makes no text, so that there is nothing to choose: {decoding.describe()}")
    given = {
        "streaming": config.streaming,
        "output_csv": config.output_csv,
        "output_npy": config.output_npy,
        "output_file": config.output_file,
        "bad_words": decoding.bad_words or decoding.bad_ids,
        "stop_words": decoding.stop_words or decoding.stop_ids,
        "num_return_sequences": decoding.num_return_sequences,
        "max_draft_len": config.batching.max_draft_len,
    }
    problems += [
        f"--{name} with --score_prompts: no text is made; scores go to stdout, and to --logprobs FILE"
        for name, value in given.items()
        if value
    ]
    return problems


def score_prompts(config: RunConfig, out: TextIO) -> list[float]:
    """Prints how likely each prompt is as soon as that is known, and returns the perplexities; log-probabilities go to
    the file of the decoding options where one is named.

    Among several ranks the first one prints, writes and returns; the others return nothing.
    Raises ConfigError for input that cannot be used, EngineError for a bad engine.
    """
    start()
    info = open_engine(config.engine_dir)
    ranks = join_ranks(info)
    tokenizer = choose_tokenizer(info, config.tokenizer, config.vocab_file)
    prompts, tuning = read_prompts(config, info, tokenizer, choose_end_id(config.end_id, tokenizer, info.model))
    virtual = None if tuning is None else tuning.virtual
    check_prompts(info.model, info.build, prompts, 0, num_virtual=0 if virtual is None else virtual.num_tokens)
    check_same_input(ranks, prompts)
    path = config.decoding.logprobs_file
    if path is not None and ranks.rank == 0:
        check_output_file(path)

    from gpt.runtime.load import load_session
    from gpt.runtime.scoring import score

    session = load_session(info, config.device, config.execution)
    words = [[token for token in prompt if token < info.model.vocab_size] for prompt in prompts]
    num_done = 0

    def show(row: int, one: Score) -> None:
        nonlocal num_done
        num_done = row + 1
        if ranks.rank == 0:
            text = "" if tokenizer is None else f'Input: "{tokenizer.decode(words[row], skip_special=False)}"\n'
            out.write(f"{text}Score: {_describe(one)}\n")
            out.flush()

    settings: dict[str, Any] = {"virtual": virtual, "num_top_logprobs": config.decoding.top_logprobs}
    try:
        scores = score(session, prompts, on_score=show, **settings)
    except KeyboardInterrupt:
        raise InterruptError("interrupted", found=f"{num_done} of {len(prompts)} prompts are scored") from None
    if ranks.rank > 0:
        return []
    if path is not None:
        lines = [_line(row, words[row], one, tokenizer) for row, one in enumerate(scores)]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [one.perplexity for one in scores]


def _describe(one: Score) -> str:
    count = len(one.logprobs)
    if count == 0:
        return "0 tokens, no perplexity (the only one stands behind nothing)"
    return f"{count} token{'s' * (count != 1)}, log-probability {one.total:.4f}, perplexity {one.perplexity:.4f}"


def _line(row: int, tokens: Sequence[int], one: Score, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One object per prompt; tokens without a log-probability are those that nothing stands before."""
    unscored = len(tokens) - len(one.logprobs)
    logprobs = [*[None] * unscored, *one.logprobs]
    described = [describe_token(*pair, tokenizer) for pair in zip(tokens, logprobs, strict=True)]
    perplexity = one.perplexity if one.logprobs else None
    return {"prompt": row, "total": one.total, "perplexity": perplexity, "tokens": described}
