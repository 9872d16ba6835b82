"""Prompts to ids, batches, end tokens and limits, with a session that computes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import save_tokenizer

from gpt.comm import Communicator, NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.folder import EngineInfo
from gpt.errors import ConfigError
from gpt.runtime.request import Request
from gpt.text.dataset import Article
from gpt.text.evaluation import encode_articles, max_prompt_tokens, prompt_text
from gpt.text.pipeline import (
    choose_end_id,
    choose_tokenizer,
    describe_speed,
    encode_prompts,
    generate_batches,
    require_tokenizer,
    without_end,
)
from gpt.text.tokenizer import Tokenizer, load_tokenizer

END = 6
MODEL = ModelConfig(
    vocab_size=300, n_positions=64, n_embd=8, n_head=2, n_layer=1, n_kv_head=2, inter_size=8, eos_token_id=END
)
BUILD = BuildConfig(max_batch_size=3, max_input_len=20, max_output_len=30)


class SumSession:
    """The next token is the sum of all earlier ones modulo 7: a result that shows any mix-up of rows or tokens."""

    def __init__(self) -> None:
        self.model, self.build, self.device = MODEL, BUILD, torch.device("cpu")
        self.comm: Communicator = NullCommunicator()
        self.batch_sizes: list[int] = []
        self._sums = torch.zeros(0)

    def start(self, batch_size: int, max_seq_len: int) -> None:
        self.batch_sizes.append(batch_size)

    def limit_logits(self, num_best: int | None) -> None:
        pass

    def context(self, prompts: Sequence[Sequence[int]], virtual: object = None) -> torch.Tensor:
        self._sums = torch.tensor([sum(prompt) for prompt in prompts])
        return self._logits()

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        self._sums = self._sums + ids
        return self._logits()

    def reorder(self, sources: Sequence[int]) -> None:
        self._sums = self._sums[list(sources)]

    def prompt_logits(self, prompt: Sequence[int], places: Sequence[int], virtual: object = None) -> torch.Tensor:
        self._sums = torch.tensor([sum(prompt[: place + 1]) for place in places])
        return self._logits()

    def _logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(self._sums % 7, MODEL.vocab_size).float()


def _by_hand(prompt: Sequence[int], count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count and END not in tokens:
        tokens.append((sum(prompt) + sum(tokens)) % 7)
    return tokens


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def _engine(folder: Path, seed: int | None = None) -> EngineInfo:
    build = dataclasses.replace(BUILD, seed=seed)
    return EngineInfo(folder=folder, model=MODEL, build=build, library={}, build_id="", files=())


def test_any_number_of_prompts_in_batches_of_the_engine() -> None:
    session = SumSession()
    prompts = [[1], [2, 2], [3], [5, 1, 1], [4], [1, 1], [2]]
    shown: dict[int, list[int]] = {}
    ended: list[int] = []
    results = generate_batches(
        session,
        Request(prompts, max_new_tokens=5, end_id=END),
        on_token=lambda row, token: shown.setdefault(row, []).append(token),
        on_end=ended.append,
    )
    assert session.batch_sizes == [3, 3, 1]
    tokens = [row for result in results for row in result.tokens]
    assert tokens == [_by_hand(prompt, 5) for prompt in prompts]
    assert {len(row) for row in tokens} > {5}  # some ended early
    assert [shown[row] for row in range(len(prompts))] == tokens
    assert sorted(ended) == list(range(len(prompts)))
    assert ended != sorted(ended)  # each as soon as it ends
    assert "new tokens in" in describe_speed(results)
    assert f"{sum(map(len, tokens))} new tokens" in describe_speed(results)


def test_only_the_last_end_token_is_taken_off() -> None:
    assert without_end([1, END, 2, END], END) == [1, END, 2]
    assert without_end([1, 2], END) == [1, 2]
    assert without_end([END], END) == []
    assert without_end([], END) == []
    assert without_end([1, 2], None) == [1, 2]


def test_end_id_is_the_users_or_the_tokenizers_or_the_checkpoints(tokenizer: Tokenizer) -> None:
    assert choose_end_id(17, tokenizer, MODEL) == 17
    assert choose_end_id(None, tokenizer, MODEL) == tokenizer.end_id == 263
    assert choose_end_id(None, None, MODEL) == END
    tokenizer.end_id = None
    assert choose_end_id(None, tokenizer, MODEL) == END
    assert choose_end_id(None, None, dataclasses.replace(MODEL, eos_token_id=None)) is None
    for wrong in (-1, 300):
        with pytest.raises(ConfigError, match="--end_id is no token"):
            choose_end_id(wrong, tokenizer, MODEL)


def test_which_tokenizer(tmp_path: Path) -> None:
    engine, other = tmp_path / "engine", tmp_path / "other"
    (engine / "tokenizer").mkdir(parents=True)
    other.mkdir()
    save_tokenizer(engine / "tokenizer")
    save_tokenizer(other)

    def name(info: EngineInfo, location: str | None) -> str:
        return Path(require_tokenizer(choose_tokenizer(info, location, None), info, "read").name).name

    assert name(_engine(engine), None) == "tokenizer"
    assert name(_engine(engine), str(other)) == "other"
    assert name(_engine(other, seed=3), None) == "gpt2-tiny"  # random weights make no sense with any tokenizer
    with pytest.raises(ConfigError, match="no tokenizer to read"):
        name(_engine(other), None)
    with pytest.raises(ConfigError, match="no such sentencepiece model"):
        choose_tokenizer(_engine(engine), str(other), tmp_path / "absent.model")


def test_empty_prompts_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="empty prompt") as caught:
        encode_prompts(tokenizer, ["a", "", "b", ""], MODEL)
    assert caught.value.found == ["prompt 1: ''", "prompt 3: ''"]


def test_a_tokenizer_of_another_model_is_explained(tokenizer: Tokenizer) -> None:
    small = dataclasses.replace(MODEL, vocab_size=100)
    for encode in (
        lambda: encode_prompts(tokenizer, ["a the"], small),
        lambda: encode_articles(tokenizer, [Article(0, "a the", "")], 100, 50),
    ):
        with pytest.raises(ConfigError, match="does not belong to this model") as caught:
            encode()
        assert "the tokenizer has 264 tokens" in str(caught.value)
        assert "0 to 99" in str(caught.value)


def test_articles_are_asked_for_a_summary(tokenizer: Tokenizer) -> None:
    assert prompt_text("  I do n't know. ") == "I don't know.  TL;DR:"
    (long,) = encode_articles(tokenizer, [Article(0, "beginning " * 30 + "end.", "")], 300, 12)
    assert len(long) == 12
    assert tokenizer.decode(long).endswith("end. TL;DR:")


@pytest.mark.parametrize(
    ("output_len", "model", "build", "hf_positions", "expected"),
    [
        (100, None, None, 2048, 923),
        (100, None, None, 1024, 923),
        (101, None, None, 1023, 922),
        (10, MODEL, BUILD, 1024, 20),  # max_input_len
        (45, MODEL, BUILD, 1024, 5),  # the cache holds 50
        (50, MODEL, dataclasses.replace(BUILD, max_output_len=80), 1024, 14),  # 64 positions
        (50, dataclasses.replace(MODEL, rotary_pct=1.0), dataclasses.replace(BUILD, max_output_len=80), None, 20),
    ],
)
def test_what_is_kept_of_an_article(
    output_len: int, model: ModelConfig | None, build: BuildConfig | None, hf_positions: int | None, expected: int
) -> None:
    assert max_prompt_tokens(output_len, model, build, hf_positions) == expected


def test_no_room_for_an_article_is_explained() -> None:
    with pytest.raises(ConfigError, match="no room for an article") as caught:
        max_prompt_tokens(50, MODEL, BUILD, None)
    assert "--max_input_len + --max_output_len 50 less --output_len 50" in str(caught.value)
