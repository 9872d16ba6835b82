"""The choice of tokens: processors against those of transformers, draws against the exact distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, open_session, random_prompts
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt.errors import ConfigError, GptError
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.sampling import Sampler, draw
from gpt.runtime.sampling_config import SamplingConfig
from gpt.text.pipeline import generate_batches

VOCAB, END, PROMPT_LENGTH = 50, 7, 12
CPU = torch.device("cpu")


def make_sampler(
    prompts: Sequence[Sequence[int]], first_row: int = 0, end_id: int | None = END, **settings: Any
) -> Sampler:
    config = SamplingConfig(**{"seed": 1, **settings})
    keys = [(first_row + row,) for row in range(len(prompts))]
    return Sampler(config, prompts, vocab_size=VOCAB, end_id=end_id, device=CPU, keys=keys)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


class PresenceFrequency(LogitsProcessor):
    """The definition of the OpenAI interface, one token at a time; transformers has none."""

    def __init__(self, presence: float, frequency: float):
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids[:, PROMPT_LENGTH:].tolist()):
            for token in set(tokens):
                scores[row, token] -= self.presence + self.frequency * tokens.count(token)
        return scores


# The end token alone is left out; one word begins in the prompts; two end alike.
BAD_WORDS = ((3,), (END,), (1, 2), (4, 2), (5, 6, 8), (0, 1, 0, 1))
CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "repetition": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition below 1": ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    "presence": ({"presence_penalty": 1.5}, [PresenceFrequency(1.5, 0)]),
    "frequency": ({"frequency_penalty": -0.7}, [PresenceFrequency(0, -0.7)]),
    "2-grams": ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
    "3-grams": ({"no_repeat_ngram_size": 3}, [NoRepeatNGramLogitsProcessor(3)]),
    "bad words": ({"bad_words": BAD_WORDS}, [NoBadWordsLogitsProcessor([list(word) for word in BAD_WORDS], END)]),
    "length": ({"min_length": 4}, [MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, 4, END)]),
    "temperature": ({"top_k": 0, "temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top-p": ({"top_k": 0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "tiny top-p": ({"top_k": 0, "top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
    "min-p": ({"top_k": 0, "min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "min-p 1": ({"top_k": 0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    "original's top-p 0": ({"top_k": 5, "top_p": 0.0}, [TopKLogitsWarper(5)]),
}
EVERYTHING = (
    "repetition",
    "presence",
    "frequency",
    "2-grams",
    "bad words",
    "length",
    "temperature",
    "top-k",
    "top-p",
    "min-p",
)
# The two penalties on generated tokens commute, so that their processors can stand one behind the other.
CASES["everything"] = (
    {**{name: value for case in EVERYTHING for name, value in CASES[case][0].items()}, "top_k": 5},
    [processor for case in EVERYTHING for processor in CASES[case][1]],
)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_transformers(name: str) -> None:
    """Step after step on the same logits; prompts over few tokens, so that there is something to penalise and block."""
    settings, processors = CASES[name]
    prompts = random_prompts([PROMPT_LENGTH] * 6, 10)
    sampler = make_sampler(prompts, **settings)
    reference = LogitsProcessorList(processors)
    ids = torch.tensor(prompts)
    changed = False
    for step in range(12):
        logits = random_logits(6, seed=step)
        logits[:, :10] += 4
        before = logits.clone()
        expected = reference(ids, logits.clone())
        torch.testing.assert_close(sampler.process(logits), expected, rtol=0, atol=1e-5)
        changed |= not torch.equal(expected, logits)
        chosen = sampler.choose(logits)
        assert torch.equal(logits, before)
        assert expected.gather(1, chosen[:, None]).isfinite().all()
        if sampler.config.is_greedy:
            assert torch.equal(chosen, expected.argmax(dim=-1))
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    assert changed


def test_ties_at_the_limits_are_treated_as_by_transformers() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0] * 10])
    torch.testing.assert_close(
        make_sampler([[1]], top_k=2).process(logits), TopKLogitsWarper(2)(torch.tensor([[1]]), logits)
    )
    assert make_sampler([[1]], top_k=2).process(logits).isfinite().sum() == 30


def test_rows_of_different_lengths_have_their_own_history() -> None:
    prompts = random_prompts((3, 9, 5), 10)
    logits = random_logits(3)
    settings: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    together = make_sampler(prompts, **settings).process(logits)
    alone = [make_sampler([prompt], **settings).process(logits[row : row + 1]) for row, prompt in enumerate(prompts)]
    assert torch.equal(together, torch.cat(alone))


def test_sequences_come_and_go() -> None:
    """Rows that are reused, dropped, and asked for in another order choose as if each were alone."""
    settings: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "no_repeat_ngram_size": 2,
        "min_length": 2,
        "bad_words": BAD_WORDS,
        "top_k": 0,
    }
    prompts = random_prompts((3, 9, 5, 4, 2), 10)
    steps = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (3, 0), (4, 0), (3, 1), (4, 1), (2, 1)]
    logits = {place: random_logits(1, 10 * place[0] + place[1]) / 3 for place in steps}
    alone: dict[tuple[int, int], int] = {}
    for number, prompt in enumerate(prompts):
        sampler = make_sampler([prompt], number, **settings)
        alone |= {(number, step): int(sampler.choose(logits[number, step])) for step in range(2)}
    sampler = make_sampler([], **settings)
    rows = {number: sampler.open(prompts[number], (number,)) for number in (0, 1)}
    found: dict[tuple[int, int], int] = {}

    def choose(*places: tuple[int, int]) -> None:
        lines = [rows[number] for number, _ in places]
        chosen = sampler.choose(torch.cat([logits[place] for place in places]), lines)
        found.update(zip(places, chosen.tolist(), strict=True))

    choose((1, 0), (0, 0))
    choose((0, 1))
    sampler.close(rows[0])
    rows[2] = sampler.open(prompts[2], (2,))
    assert rows[2] == rows[0]
    choose((1, 1), (2, 0))
    rows |= {number: sampler.open(prompts[number], (number, 0)) for number in (3, 4)}
    choose((3, 0), (2, 1), (4, 0))
    choose((4, 1), (3, 1))
    assert found == alone


def test_samples_of_a_prompt_have_their_own_streams() -> None:
    logits = [random_logits(1, step).expand(4, VOCAB) / 3 for step in range(20)]
    keys = [(5, 0), (5, 1), (5, 2), (6, 0)]
    sampler = Sampler(SamplingConfig(top_k=0, seed=1), [[1]] * 4, vocab_size=VOCAB, end_id=END, device=CPU, keys=keys)
    rows = torch.stack([sampler.choose(step) for step in logits], dim=1).tolist()
    assert len(set(map(tuple, rows))) == 4
    only = make_sampler([[1]], 5, top_k=0)
    assert rows[0] == [only.choose(step[:1]).item() for step in logits]


def test_virtual_tokens_are_not_penalised() -> None:
    settings: dict[str, Any] = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1}
    logits = random_logits(1)
    with_virtual = make_sampler([[VOCAB, VOCAB + 3, 4]], **settings).process(logits)
    assert torch.equal(with_virtual, make_sampler([[4]], **settings).process(logits))
    assert torch.equal(make_sampler([[VOCAB]], **settings).process(logits), logits)


FILTERS = ["bad words", "temperature", "top-k", "top-p", "min-p", "everything"]


@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_exact_distribution(name: str) -> None:
    """Chi-square over 100,000 draws: 1000 sequences with a stream each, 100 numbers of each stream."""
    settings, _ = CASES[name]
    names = ("bad_words", "temperature", "top_k", "top_p", "min_p")
    settings = {"top_k": 0} | {key: value for key, value in settings.items() if key in names}
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    logits = random_logits(1) / 3
    scores = logits.clone()
    if "bad_words" in settings:  # words of one token, so that all draws have one distribution
        settings["bad_words"] = tuple(word for word in BAD_WORDS if len(word) == 1)
        scores[:, 3] = -torch.inf
    for key, warper in warpers.items():
        if settings.get(key, 0) != 0:
            scores = warper(settings[key])(None, scores)
    exact = scores[0].double().softmax(dim=-1)
    sampler = make_sampler([[1]] * 1000, **settings)
    drawn = torch.stack([sampler.choose(logits.expand(1000, VOCAB)) for _ in range(100)])
    counts = drawn.flatten().bincount(minlength=VOCAB).double()
    possible = exact > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() > 1
    expected = 1e5 * exact[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = (possible.sum() - 1).double()
    assert torch.special.gammaincc(freedom / 2, chi_square / 2) > 1e-3


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    scores = torch.tensor([[-torch.inf, 0.3, -torch.inf, 0.1, -torch.inf]] * 2)
    assert draw(scores, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [3, 1]


def draws(prompts: Sequence[Sequence[int]], first_row: int = 0, **settings: Any) -> torch.Tensor:
    """[B, 20]: what is drawn for logits that depend on the prompt's index and the step alone."""
    sampler = make_sampler(prompts, first_row, **{"top_k": 0, **settings})
    rows = range(first_row, first_row + len(prompts))
    steps = [torch.cat([random_logits(1, 100 * row + step) for row in rows]) / 3 for step in range(20)]
    return torch.stack([sampler.choose(logits) for logits in steps], dim=1)


def test_a_seed_repeats_and_another_one_differs() -> None:
    prompts = [[1], [2]]
    assert torch.equal(draws(prompts, seed=5), draws(prompts, seed=5))
    assert not torch.equal(draws(prompts, seed=5), draws(prompts, seed=6))
    # 32 bits higher: a generator that kept only the lower ones would repeat itself.
    assert not torch.equal(draws(prompts, seed=5), draws(prompts, seed=5 + 2**32))
    assert not torch.equal(draws(prompts, seed=None), draws(prompts, seed=None))


def test_equal_prompts_of_a_batch_get_different_tokens() -> None:
    sampler = make_sampler([[1], [1]], top_k=0)
    logits = torch.zeros(2, VOCAB)
    first, second = torch.stack([sampler.choose(logits) for _ in range(20)], dim=1).tolist()
    assert first != second


def test_draws_do_not_depend_on_the_batch() -> None:
    prompts = random_prompts((3, 9, 5, 1, 2), 10)
    settings: dict[str, Any] = {"repetition_penalty": 1.3, "top_p": 0.9, "presence_penalty": 0.2}
    together = draws(prompts, **settings)
    for size in (1, 2, 3):
        parts = [draws(prompts[first : first + size], first, **settings) for first in range(0, len(prompts), size)]
        assert torch.equal(torch.cat(parts), together)


def test_generation_in_batches_of_any_size_is_the_same(tmp_path: Path) -> None:
    sizes = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50", "--n_positions", "40"]
    limits = ["--max_input_len", "10", "--max_output_len", "20", "--dtype", "float32", "--random_seed", "1"]
    prompts = random_prompts((4, 7, 2, 4, 1), VOCAB)
    sampling = SamplingConfig(top_k=0, seed=3)
    outputs = []
    for size in (1, 2, 5):
        folder = tmp_path / str(size)
        session = open_session(build_engine(None, folder, *sizes, *limits, "--max_batch_size", str(size)))
        results = generate_batches(session, Request(prompts, max_new_tokens=15, end_id=END, sampling=sampling))
        outputs.append([tokens for result in results for tokens in result.tokens])
    assert outputs[0] == outputs[1] == outputs[2]
    greedy = generate(session, Request(prompts, max_new_tokens=15, end_id=END)).tokens
    assert outputs[0] != greedy
    once = generate(session, Request(prompts, max_new_tokens=15, sampling=SamplingConfig(no_repeat_ngram_size=1)))
    assert all(len({*prompt, *new}) == len({*prompt}) + 15 for prompt, new in zip(prompts, once.tokens, strict=True))
    with pytest.raises(ConfigError, match="do not fit") as refused:
        generate(session, Request(prompts, max_new_tokens=15, sampling=SamplingConfig(top_k=51, min_length=16)))
    assert "--top_k 51: the vocabulary has 50 tokens" in str(refused.value)
    assert "--min_length 16: at most 15 new tokens" in str(refused.value)


def test_a_sequence_without_a_possible_token_is_explained() -> None:
    sampler = make_sampler([list(range(VOCAB - 1))], no_repeat_ngram_size=1, end_id=None)
    assert sampler.choose(torch.zeros(1, VOCAB)).tolist() == [VOCAB - 1]
    with pytest.raises(GptError, match="no token is left") as error:
        sampler.choose(torch.zeros(1, VOCAB))
    assert "--no_repeat_ngram_size" in str(error.value)


def test_a_sequence_that_has_ended_needs_no_possible_token() -> None:
    prompt = [token for token in range(VOCAB) if token != END]
    sampler = make_sampler([prompt], no_repeat_ngram_size=1)
    assert sampler.choose(torch.zeros(1, VOCAB)).tolist() == [END]
    sampler.close(0)
    sampler.choose(torch.zeros(1, VOCAB))


def test_an_end_token_outside_the_vocabulary_cannot_be_masked() -> None:
    logits = random_logits(1)
    assert torch.equal(make_sampler([[1]], end_id=VOCAB, min_length=3).process(logits), logits)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"temperature": 0, "top_k": -2, "top_p": 1.1, "min_p": -0.1, "repetition_penalty": 0, "presence_penalty": 3},
        ["--temperature 0:", "--top_k -2:", "--top_p 1.1:", "--min_p -0.1:", "--repetition_penalty 0:", "-2 to 2"],
    ),
    (
        {"frequency_penalty": float("nan"), "min_length": -1, "no_repeat_ngram_size": -1, "seed": -1},
        ["--frequency_penalty nan", "--min_length -1", "--no_repeat_ngram_size -1", "--seed -1"],
    ),
    ({"temperature": float("inf"), "top_k": 0}, ["--temperature inf: allowed are 0.001 to 1000"]),
    ({"temperature": 0}, ["greedy decoding is --top_k 1"]),
    (
        {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1},
        ["--temperature 0.5 with --top_k 1", "--top_p 0.9 with --top_k 1", "--min_p 0.1 with --top_k 1"],
    ),
    ({"top_k": 0, "top_p": 0}, ["--top_k 0 with --top_p 0"]),
    ({"bad_words": ((1,), ())}, ["one of them has no tokens"]),
]


@pytest.mark.parametrize(("settings", "expected"), BAD)
def test_bad_settings_are_listed_at_once(settings: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**settings)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "greedy"),
        ({"repetition_penalty": 1.2, "seed": 4}, "greedy: repetition_penalty 1.2"),
        ({"top_k": 0, "seed": 4}, "sampled: top_k 0, seed 4"),
        ({"top_k": 40, "temperature": 0.8}, "sampled: temperature 0.8, top_k 40"),
    ],
)
def test_settings_are_described(settings: dict[str, Any], expected: str) -> None:
    assert SamplingConfig(**settings).describe() == expected
