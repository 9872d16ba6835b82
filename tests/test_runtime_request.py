"""Parts of a request: rows, samples, and what other ranks are told."""

from __future__ import annotations

import torch

from gpt.comm import NullCommunicator
from gpt.runtime.request import Request
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.virtual_tokens import VirtualTokens

PROMPTS = [[1, 2], [3], [4, 5, 6]]


class Stop:
    """Ends nothing; it cannot be told to other ranks."""

    def start(self) -> Stop:
        return self

    def copy(self) -> Stop:
        return self

    def add(self, token: int) -> bool:
        return False


class OtherRank(NullCommunicator):
    """Gets `told` from rank 0."""

    def __init__(self, told: object):
        super().__init__()
        self.told = told

    def broadcast_object(self, value: object) -> object:
        return self.told


class FirstRank(NullCommunicator):
    told: object = None

    def broadcast_object(self, value: object) -> object:
        self.told = value
        return value


def test_rows_keep_their_names_and_tasks() -> None:
    virtual = VirtualTokens(torch.zeros(3, 1, 8), (2, 0, 1))
    request = Request(PROMPTS, 7, virtual=virtual, sampling=SamplingConfig(top_k=3, seed=1))
    part = request.of_rows([2, 1, 2])
    assert part.prompts == [[4, 5, 6], [3], [4, 5, 6]]
    assert part.keys == [(2,), (1,), (2,)]
    assert part.virtual is not None
    assert part.virtual.tasks == (1, 0, 1)
    assert (part.max_new_tokens, part.sampling) == (7, request.sampling)
    assert (request.longest, request.of_rows([1]).longest) == (10, 8)


def test_samples_follow_each_other_and_share_a_seed() -> None:
    request = Request(PROMPTS[:2], 7, keys=[(8,), (5,)], sampling=SamplingConfig(top_k=3)).with_samples(2)
    assert request.prompts == [[1, 2], [1, 2], [3], [3]]
    assert request.keys == [(8, 0), (8, 1), (5, 0), (5, 1)]
    assert request.sampling.seed is not None
    assert request.of_rows([3]).sampling == request.sampling


def test_other_ranks_are_told_all_but_the_stop_words() -> None:
    first, stops = FirstRank(), Stop()
    request, has_stops = Request(PROMPTS, 7, 3, sampling=SamplingConfig(top_k=3), stops=stops).of_first_rank(first)
    assert has_stops
    assert request.stops is stops
    theirs, has_stops = Request([[9]], 1).of_first_rank(OtherRank(first.told))
    assert has_stops
    assert theirs.stops is None
    assert (theirs.prompts, theirs.max_new_tokens, theirs.end_id) == (PROMPTS, 7, 3)
    assert theirs.sampling == request.sampling
    assert theirs.sampling.seed is not None
