"""Sequences that join and leave, against each of them alone over a contiguous cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, open_session, random_prompts

from gpt.engine.step import PagedStep
from gpt.errors import ConfigError, GptError
from gpt.runtime.batcher import generate_paged
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.sampling_config import GREEDY, SamplingConfig
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.virtual_tokens import VirtualTokens

SIZES = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50", "--n_positions", "80"]
LIMITS = ["--max_batch_size", "3", "--max_input_len", "50", "--max_output_len", "30", "--dtype", "float32"]
PAGED = ["--paged_kv_cache", "--tokens_per_block", "4", "--max_num_tokens", "24", "--random_seed", "1"]
LENGTHS = (4, 47, 2, 9, 30, 5, 21, 1, 50, 12)
SAMPLED = SamplingConfig(top_k=9, temperature=1.3, repetition_penalty=1.2, no_repeat_ngram_size=3, min_length=2, seed=7)
TIGHT = BatchingConfig(max_cache_tokens=84)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> TorchSession:
    out = tmp_path_factory.mktemp("engine") / "e"
    return widen(open_session(build_engine(None, out, *SIZES, *LIMITS, *PAGED, "--use_inflight_batching")))


def widen(session: TorchSession) -> TorchSession:
    """A model of small random weights says the same whatever it reads; wider ones make attention count."""
    for tensor in session.ops.weights.values():
        if tensor.dim() == 2:
            tensor.mul_(8)
    return session


def alone(session: TorchSession, request: Request) -> list[list[int]]:
    rows = [generate(session, request.of_rows([row])).tokens[0] for row in range(len(request.prompts))]
    assert len({tuple(row) for row in rows}) > len(rows) // 2  # the prompts matter
    return rows


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batching", [BatchingConfig(), TIGHT, BatchingConfig(max_draft_len=5)])
def test_every_prompt_gives_what_it_gives_alone(
    session: TorchSession, sampling: SamplingConfig, batching: BatchingConfig
) -> None:
    prompts = random_prompts(LENGTHS, 50)
    prompts.append(prompts[4])  # one twice
    request = Request(prompts, max_new_tokens=30, end_id=3, sampling=sampling)
    expected = alone(session, request)
    assert 3 in {row[-1] for row in expected}
    assert generate_paged(session, request, batching=batching).tokens == expected


def test_callers_hear_of_each_token_and_of_ends(session: TorchSession) -> None:
    prompts = random_prompts(LENGTHS, 50)
    heard: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    ended: list[int] = []
    result = generate_paged(
        session,
        Request(prompts, max_new_tokens=20, end_id=3),
        on_token=lambda row, token: heard[row].append(token),
        on_end=ended.append,
    )
    assert list(heard.values()) == result.tokens
    assert sorted(ended) == list(range(len(prompts)))
    assert result.total_ms > 0


def test_streams_belong_to_prompts_and_samples(session: TorchSession) -> None:
    prompts = random_prompts((6, 6, 9), 50)
    settings: dict[str, Any] = {"max_new_tokens": 12, "sampling": SAMPLED}
    keys = [(5, 0), (5, 1), (2, 0)]
    together = generate_paged(session, Request(prompts, keys=keys, **settings)).tokens
    assert generate_paged(session, Request(prompts[2:], keys=[(2,)], **settings)).tokens == together[2:]
    assert generate(session, Request(prompts[:1], keys=[(5,)], **settings)).tokens == together[:1]
    assert generate(session, Request(prompts[1:2], keys=[(5, 1)], **settings)).tokens == together[1:2]


class StopBehind:
    """Ends a sequence with a token, as stop words would."""

    def __init__(self, token: int):
        self.token = token

    def start(self) -> StopBehind:
        return self

    def copy(self) -> StopBehind:
        return self

    def add(self, token: int) -> bool:
        return token == self.token


def test_stop_words_and_logprobs_are_those_of_the_plain_loop(session: TorchSession) -> None:
    prompts = random_prompts(LENGTHS[:3], 50)
    free = generate(session, Request(prompts, max_new_tokens=10)).tokens
    request = Request(prompts, max_new_tokens=10, stops=StopBehind(free[1][4]), num_top_logprobs=2)
    expected = generate(session, request)
    assert len(expected.tokens[1]) <= 5
    for batching in (BatchingConfig(), BatchingConfig(max_draft_len=4)):
        found = generate_paged(session, request, batching=batching)
        assert found.tokens == expected.tokens
        for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-5)
            assert [entry.top[0][0] for entry in ours] == [entry.top[0][0] for entry in theirs]


def test_virtual_tokens_belong_to_their_task(tmp_path: Path) -> None:
    flags = [*SIZES, *LIMITS, *PAGED, "--max_prompt_embedding_table_size", "10"]
    session = widen(open_session(build_engine(None, tmp_path / "e", *flags)))
    table = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    prompt = [50, 51, 52, 53, 54, 7, 8, 9]
    prompts = [prompt, prompt, prompt, prompt, prompt]
    virtual = VirtualTokens(table, (0, 1, 1, 0, 1))
    found = generate_paged(session, Request(prompts, max_new_tokens=10, virtual=virtual)).tokens
    for row, task in enumerate(virtual.tasks):
        request = Request([prompt], max_new_tokens=10, virtual=VirtualTokens(table, (task,)))
        assert [found[row]] == generate(session, request).tokens
    assert found[0] != found[1]


def test_drafts_save_steps_where_text_repeats(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    # A greedy model this small soon goes in circles, which is what the lookup finds.
    request = Request(random_prompts((8,), 50), max_new_tokens=30)
    plain = generate_paged(session, request)
    fed: list[tuple[int, int]] = []
    run_paged = session.run_paged

    def listen(step: PagedStep) -> torch.Tensor:
        fed.append((len(step.ids), len(step.wanted)))
        return run_paged(step)

    monkeypatch.setattr(session, "run_paged", listen)
    drafted = generate_paged(session, request, batching=BatchingConfig(max_draft_len=8))
    assert drafted.tokens == plain.tokens
    assert len(drafted.step_ms) < len(plain.step_ms)
    # What a right draft left in the cache is not computed again.
    assert all(num_tokens == num_wanted for num_tokens, num_wanted in fed[1:])


def test_a_pool_that_is_there_is_kept(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has taken the memory that another one would need, and for shorter requests."""
    generate_paged(session, Request(random_prompts((50,), 50), max_new_tokens=10))
    pool = session.pool
    monkeypatch.setattr("gpt.runtime.pool_size.available_memory_bytes", lambda: 0)
    generate_paged(session, Request(random_prompts((50, 9), 50), max_new_tokens=10))
    generate_paged(session, Request(random_prompts((3,), 50), max_new_tokens=10))
    assert session.pool is pool


def test_requests_that_cannot_be_held(session: TorchSession) -> None:
    with pytest.raises(ConfigError, match="does not hold one sequence"):
        generate_paged(session, Request([[1] * 40], max_new_tokens=30), batching=BatchingConfig(max_cache_tokens=64))
    with pytest.raises(ConfigError, match="prompt 1: no tokens"):
        generate_paged(session, Request([[1], []], max_new_tokens=3))


def test_overflow_is_named(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "run_paged", lambda step: torch.full((len(step.wanted), 50), torch.nan))
    with pytest.raises(GptError, match="no numbers"):
        generate_paged(session, Request([[1, 2]], max_new_tokens=3))


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError) as caught:
        BatchingConfig(free_memory_fraction=0, max_cache_tokens=0, max_draft_len=65)
    for flag in ("--kv_cache_free_gpu_memory_fraction", "--max_tokens_in_paged_kv_cache", "--max_draft_len"):
        assert flag in str(caught.value)


def test_drafts_leave_the_distribution_as_it_is(monkeypatch: pytest.MonkeyPatch, session: TorchSession) -> None:
    """Second tokens drawn behind a draft of the first, whether it was right or not, against the exact probabilities."""
    from gpt.runtime.prompt_lookup import PromptLookup

    vocab_size, num_rows = 50, 4000
    first = torch.linspace(-2, 2, vocab_size)
    second = first.flip(0) * 0.7
    drafted = 40

    def logits_of(step: Any) -> torch.Tensor:
        # The prompt's token is followed by `first`, any other one by `second`, as far as the logits go.
        return torch.stack([first if step.positions[place] == 0 else second for place in step.wanted.tolist()])

    monkeypatch.setattr(session, "run_paged", logits_of)
    monkeypatch.setattr(PromptLookup, "propose", lambda self, tokens, room: (drafted,)[:room])
    sampling = SamplingConfig(top_k=0, seed=11)
    request = Request([[1]] * num_rows, max_new_tokens=2, sampling=sampling)
    result = generate_paged(session, request, batching=BatchingConfig(max_draft_len=1))
    steps_of_drafts = sum(row[0] == drafted for row in result.tokens)
    assert 0 < steps_of_drafts < num_rows  # right for some, wrong for others
    for place, logits in enumerate((first, second)):
        counts = torch.bincount(torch.tensor([row[place] for row in result.tokens]), minlength=vocab_size).double()
        expected = logits.double().softmax(0) * num_rows
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = torch.tensor(vocab_size - 1, dtype=torch.float64)
        assert torch.special.gammaincc(freedom / 2, chi_square / 2) > 1e-3
