"""Steps over a paged cache against the same tokens in a contiguous one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session, random_prompts, relative_error
from pages import Pages

from gpt.checkpoint.random_weights import RandomWeights
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping
from gpt.runtime.torch_session import TorchSession

SIZES = ["--n_layer", "2", "--n_embd", "32", "--n_head", "4", "--vocab_size", "50", "--n_positions", "64"]
LIMITS = ["--max_batch_size", "8", "--max_input_len", "40", "--max_output_len", "24", "--dtype", "float32"]
FAMILIES = {
    "gpt2": [],
    "multi-query, fused attention": ["--multi_query_mode", "--use_gpt_attention_plugin"],
    "rotary, fused attention": ["--rotary_pct", "0.5", "--use_gpt_attention_plugin"],
}
PER_BLOCK = 4


@pytest.fixture(params=FAMILIES)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> TorchSession:
    flags = [*SIZES, *LIMITS, *FAMILIES[request.param], "--random_seed", "1"]
    session = open_session(build_engine(None, tmp_path / "e", *flags))
    session.start_paged(64, PER_BLOCK)
    return session


def logits_after(session: TorchSession, tokens: list[int]) -> torch.Tensor:
    session.start(1, len(tokens))
    return session.context([tokens])[0].clone()


def check(session: TorchSession, found: torch.Tensor, sequences: list[list[int]]) -> None:
    assert len(found) == len(sequences)
    for row, tokens in zip(found.clone(), sequences, strict=True):
        expected = logits_after(session, tokens)
        assert relative_error(row, expected) < 1e-5
        assert row.argmax() == expected.argmax()


def test_every_mixture_of_sequences_gives_the_logits_of_each_alone(session: TorchSession) -> None:
    tokens = random_prompts((3, 33, 12, 40, 8, 17, 1), 50)
    pages = Pages(64, PER_BLOCK)
    rounds = [
        {0: 2, 1: 20, 2: 12},  # whole prompts and parts of prompts
        {0: 1, 1: 5, 3: 32, 6: 1},  # one token, the next part, a new prompt
        {4: 7, 1: 1, 3: 1},  # single tokens of very different lengths beside a prompt
        {4: 1, 1: 3, 5: 13, 3: 3},  # drafts
        {5: 1, 1: 1, 3: 1},
        {3: 3, 1: 3, 5: 3},
    ]
    done = dict.fromkeys(range(len(tokens)), 0)
    for counts in rounds:
        parts = {row: tokens[row][done[row] : done[row] + count] for row, count in counts.items()}
        assert [len(part) for part in parts.values()] == list(counts.values())
        found = session.run_paged(pages.step(parts))
        for row, count in counts.items():
            done[row] += count
        check(session, found, [tokens[row][: done[row]] for row in counts])


def test_lengths_far_apart_attend_in_calls_of_their_own(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.engine.torch_paged_attention._CALL_COSTS_TOKENS", 8)
    tokens = random_prompts((5, 39, 6, 38, 21), 50)
    pages = Pages(64, PER_BLOCK)
    session.run_paged(pages.step({row: prompt[:-2] for row, prompt in enumerate(tokens)}))
    found = session.run_paged(pages.step({row: prompt[-2:] for row, prompt in enumerate(tokens)}))
    assert [group.size for group in session.ops.attend.paged._groups] == [2, 1, 2]
    check(session, found, tokens)


def test_any_tokens_logits_can_be_asked_for(session: TorchSession) -> None:
    first, second = random_prompts((6, 9), 50)
    pages = Pages(64, PER_BLOCK)
    session.run_paged(pages.step({0: first[:2]}))
    found = session.run_paged(pages.step({0: first[2:], 1: second}, wanted=[0, 2, 3, 12]))
    check(session, found, [first[:3], first[:5], first[:6], second])
    assert session.run_paged(pages.step({1: [1, 2]}, wanted=[])).shape == (0, 50)


def test_drafts_that_were_wrong_leave_no_trace(session: TorchSession) -> None:
    prompt, right, wrong = random_prompts((7, 5, 5), 50)
    pages = Pages(64, PER_BLOCK)
    session.run_paged(pages.step({0: prompt}))
    session.run_paged(pages.step({0: wrong}))
    pages.filled[0] -= len(wrong)
    found = session.run_paged(pages.step({0: right[:2]}))
    check(session, found, [prompt + right[:2]])


def test_sequences_can_share_blocks(session: TorchSession) -> None:
    prompt, left, right = random_prompts((8, 4, 4), 50)
    pages = Pages(64, PER_BLOCK)
    session.run_paged(pages.step({0: prompt}))
    pages.tables[1], pages.filled[1] = list(pages.tables[0]), len(prompt)
    found = session.run_paged(pages.step({0: left, 1: right}))
    check(session, found, [prompt + left, prompt + right])


def test_half_precision_is_as_near_as_in_a_contiguous_cache(tmp_path: Path) -> None:
    flags = [*SIZES, *LIMITS[:-1], "bfloat16", "--random_seed", "1", "--use_gpt_attention_plugin"]
    session = open_session(build_engine(None, tmp_path / "e", *flags))
    session.start_paged(64, PER_BLOCK)
    prompt = random_prompts((30,), 50)[0]
    pages = Pages(64, PER_BLOCK)
    for part in (prompt[:11], prompt[11:29]):
        session.run_paged(pages.step({0: part}))
    found = session.run_paged(pages.step({0: prompt[29:]}))[0].clone()
    assert relative_error(found, logits_after(session, prompt)) < 2e-2  # as bfloat16 against float32


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_a_quantised_cache_holds_the_same_in_blocks(kv_cache: str) -> None:
    model = ModelConfig(vocab_size=50, n_positions=64, n_embd=32, n_head=4, n_layer=2, n_kv_head=4, inter_size=48)
    build = BuildConfig(dtype="float32", max_input_len=40, max_output_len=24, max_batch_size=2, seed=1)
    build = replace(build, quant=replace(build.quant, kv_cache=kv_cache))
    weights = dict(engine_tensors(model, build, Mapping(), RandomWeights(model, 1, torch.device("cpu"))))
    session = TorchSession(model, build, Mapping(), weights)
    prompt, *singles = random_prompts((19, 1, 1, 1), 50)
    session.start(1, 40)
    expected = [session.context([prompt]).clone()]
    expected += [session.generation(torch.tensor(token)).clone() for token in singles]
    session.start_paged(64, PER_BLOCK)
    pages = Pages(64, PER_BLOCK)
    for tokens, logits in zip((prompt, *singles), expected, strict=True):
        assert relative_error(session.run_paged(pages.step({0: tokens})), logits) < 1e-5
    assert session.pool is not None
    assert session.pool.blocks.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_cache]


def test_a_step_needs_its_pool(tmp_path: Path) -> None:
    session = open_session(build_engine(None, tmp_path / "e", *SIZES, *LIMITS, "--random_seed", "1"))
    with pytest.raises(RuntimeError, match="start_paged comes before"):
        session.run_paged(Pages(1, PER_BLOCK).step({0: [1]}))
