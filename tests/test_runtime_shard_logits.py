"""The best of each rank's logits do for greedy choice and top-k what all logits do, with ties and padding."""

from __future__ import annotations

import pytest
import torch

from gpt.comm import NullCommunicator
from gpt.config import ModelConfig
from gpt.mapping import Mapping
from gpt.runtime.sampling import Sampler
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.shard_logits import gather_logits

MODEL = ModelConfig(vocab_size=301, n_positions=16, n_embd=24, n_head=3, n_layer=1, n_kv_head=3, inter_size=96)


class Rank(NullCommunicator):
    """Runs one rank up to each exchange and goes on with the tensors of all."""

    def __init__(self, rank: int, exchanged: list[torch.Tensor]):
        super().__init__()
        self.rank, self._exchanged = rank, iter(exchanged)
        self.sent: list[torch.Tensor] = []

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self.sent.append(tensor)
        joined = next(self._exchanged, None)
        if joined is None:
            raise StopIteration
        return joined


def run_ranks(logits: torch.Tensor, num_ranks: int, num_best: int | None) -> tuple[torch.Tensor, int]:
    """Result of all ranks, which must agree, and the bytes that each sends, from whole logits [B, V padded]."""
    shards = logits.chunk(num_ranks, dim=-1)
    exchanged: list[torch.Tensor] = []
    while True:
        results, ranks = [], []
        for rank in range(num_ranks):
            ranks.append(Rank(rank, exchanged))
            try:
                found = gather_logits(shards[rank], MODEL, Mapping(num_ranks, rank), ranks[-1], num_best)
                results.append(found)
            except StopIteration:
                continue
        if results:
            assert len(results) == num_ranks
            assert all(torch.equal(bits(results[0]), bits(other)) for other in results)
            return results[0], sum(tensor.nbytes for tensor in ranks[0].sent)
        last = [rank.sent[-1] for rank in ranks]
        exchanged.append(torch.cat(last, 1))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)  # NaN equals itself


def padded(values: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """With padding that would win if anybody looked at it."""
    width = MODEL.padded_vocab_size(num_ranks) - values.shape[-1]
    return torch.cat([values, torch.full((len(values), width), 1e9)], dim=-1)


def values(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, MODEL.vocab_size, generator=generator) - 8
    return x if kind == "distinct" else (x * (4 if kind == "some ties" else 0.5)).round()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", ["distinct", "some ties", "many ties"])
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(top_k=2, seed=1),
        SamplingConfig(top_k=7, temperature=1.7, seed=1),
        SamplingConfig(top_k=10, top_p=0.6, min_p=0.01, seed=1),
        SamplingConfig(top_k=200, seed=1),
        SamplingConfig(top_k=0, seed=1),
        SamplingConfig(repetition_penalty=1.3),
    ],
    ids=lambda config: config.describe(),
)
def test_the_same_tokens_are_chosen(config: SamplingConfig, kind: str, num_ranks: int) -> None:
    logits = values(kind)
    found, _ = run_ranks(padded(logits, num_ranks), num_ranks, config.num_candidates)
    chosen = []
    for scores in (logits, found):
        sampler = Sampler(config, [[1, 2]] * 40, vocab_size=MODEL.vocab_size, end_id=None, device=torch.device("cpu"))
        chosen += [sampler.choose(scores) for _ in range(5)]
    assert all(torch.equal(ours, expected) for ours, expected in zip(chosen[5:], chosen[:5], strict=True))
    assert torch.equal(found.max(dim=-1).indices, logits.max(dim=-1).indices)


def test_only_what_is_needed_is_sent() -> None:
    for num_best, expected in ((None, 40 * 152 * 4), (1, 40 * 8), (7, 40 * 8 * 8), (100, 40 * 152 * 4)):
        _, num_bytes = run_ranks(padded(values("distinct"), 2), 2, num_best)
        assert num_bytes == expected


def test_numbers_that_are_none_are_passed_on() -> None:
    logits = values("distinct")
    logits[3, 200] = torch.nan
    for num_best in (1, 5):
        found, _ = run_ranks(padded(logits, 2), 2, num_best)
        assert found[3].max().isnan()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), 1),
        (SamplingConfig(top_k=5, temperature=2.0, top_p=0.5, min_p=0.1), 5),
        (SamplingConfig(top_k=0), None),
        (SamplingConfig(min_length=3), None),
        (SamplingConfig(top_k=5, no_repeat_ngram_size=2), None),
        (SamplingConfig(presence_penalty=0.5), None),
    ],
)
def test_which_settings_need_how_many(config: SamplingConfig, expected: int | None) -> None:
    assert config.num_candidates == expected
