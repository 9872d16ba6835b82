"""The decoding loop: stop rules, limits, what callers are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session, random_prompts

from gpt.errors import ConfigError, GptError
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session, pick_device
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession

SIZES = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50", "--n_positions", "40"]
LIMITS = ["--max_batch_size", "3", "--max_input_len", "10", "--max_output_len", "20"]


@pytest.fixture
def session(tmp_path: Path) -> TorchSession:
    return open_session(build_engine(None, tmp_path / "e", *SIZES, *LIMITS, "--dtype", "float32", "--random_seed", "1"))


def test_rows_stop_at_the_end_id_on_their_own(session: TorchSession) -> None:
    prompts = random_prompts((4, 7, 2), 50)
    free = generate(session, Request(prompts, max_new_tokens=12)).tokens
    end_id = free[1][3]
    stopped = generate(session, Request(prompts, max_new_tokens=12, end_id=end_id)).tokens
    for row, tokens in zip(free, stopped, strict=True):
        length = row.index(end_id) + 1 if end_id in row else len(row)
        assert tokens == row[:length]
    assert len(stopped[1]) < 12


def test_the_loop_ends_when_every_row_has_ended(session: TorchSession) -> None:
    prompt = random_prompts((4,), 50)
    first = generate(session, Request(prompt, max_new_tokens=1)).tokens[0][0]
    result = generate(session, Request(prompt, max_new_tokens=20, end_id=first))
    assert result.tokens == [[first]]
    assert result.step_ms == []


def test_callers_see_each_token_once(session: TorchSession) -> None:
    prompts = random_prompts((4, 7), 50)
    free = generate(session, Request(prompts, max_new_tokens=8)).tokens
    end_id = free[0][2]
    seen: list[list[int | None]] = []
    result = generate(
        session, Request(prompts, max_new_tokens=8, end_id=end_id), on_tokens=lambda new: seen.append(list(new))
    )
    for row, tokens in enumerate(result.tokens):
        assert [step[row] for step in seen if step[row] is not None] == tokens
    assert len(result.step_ms) == len(seen) - 1
    assert result.num_tokens == sum(map(len, result.tokens))


def test_a_second_batch_forgets_the_first(session: TorchSession) -> None:
    first, second = random_prompts((9, 3), 50)
    alone = generate(session, Request([second], max_new_tokens=10)).tokens
    generate(session, Request([first], max_new_tokens=4))
    assert generate(session, Request([second], max_new_tokens=10)).tokens == alone


@pytest.mark.parametrize(
    ("prompts", "num_tokens", "told"),
    [
        ([[1] * 11], 5, ["11 tokens", "--max_input_len 10"]),
        ([[1] * 10], 21, ["10 + 21", "--max_input_len 10 + --max_output_len 20"]),
        ([[1], []], 5, ["prompt 1: no tokens"]),
        ([[1, 50, 3], [-1]], 5, ["prompt 0: token ids 50", "prompt 1: token ids -1", "0 to 49"]),
        ([[1]] * 4, 5, ["4 sequences", "--max_batch_size is 3"]),
        ([[1]], 0, ["0 new tokens"]),
    ],
)
def test_requests_the_engine_cannot_take(
    prompts: list[list[int]], num_tokens: int, told: list[str], session: TorchSession
) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(session, Request(prompts, max_new_tokens=num_tokens))
    for text in told:
        assert text in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_short_prompt_may_run_past_max_output_len(session: TorchSession) -> None:
    """The limit is the cache: prompt and new tokens together, as in the original."""
    assert len(generate(session, Request([[1, 2]], max_new_tokens=28)).tokens[0]) == 28


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value: float, session: TorchSession) -> None:
    session.ops.weights["model.wte"][7] = value
    with pytest.raises(GptError, match="no numbers") as caught:
        generate(session, Request([[7, 7]], max_new_tokens=3))
    assert "bfloat16" in str(caught.value)


def test_devices(session: TorchSession, tmp_path: Path) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta", "cuda:77"):
        with pytest.raises(ConfigError):
            pick_device(name)


def test_an_engine_of_several_ranks_is_refused(session: TorchSession, tmp_path: Path) -> None:
    import dataclasses

    from gpt.engine.folder import open_engine

    info = open_engine(tmp_path / "e")
    two = dataclasses.replace(info, build=dataclasses.replace(info.build, world_size=2))
    with pytest.raises(ConfigError, match=r"has 2 ranks, 1 was started[\s\S]*mpirun'? -np 2"):
        load_session(two, "cpu")
