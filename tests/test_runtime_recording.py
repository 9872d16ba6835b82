"""gpt/runtime/prompt_graphs.py: which prompts get a graph; gpt/runtime/recording.py on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch

from gpt.runtime.prompt_graphs import graph_size
from gpt.runtime.recording import record


@pytest.mark.parametrize(
    ("lengths", "num_slots", "size"),
    [
        ([1], 128, (1, 64)),
        ([3, 65], 128, (2, 128)),
        ([3, 65], 100, None),  # the cache has no room for the padding
        ([1] * 16, 128, (16, 64)),  # 1024 tokens, whatever they are
        ([1] * 17, 128, None),
        ([1024] * 8, 1152, (8, 1024)),
        ([1024] * 7 + [700], 1152, (8, 1024)),
        ([1024] * 6 + [700] * 2, 1152, None),  # too much padding
        ([1024] * 17, 1152, None),  # too much memory
    ],
)
def test_sizes_worth_a_graph(lengths: list[int], num_slots: int, size: tuple[int, int] | None) -> None:
    assert graph_size(lengths, num_slots) == size


@pytest.mark.gpu
def test_a_graph_that_ends_meanwhile_does_not_spoil_a_recording() -> None:
    """Its owner refers to itself, so that only the collector finds it: any time, here while another is recorded."""
    device, memory = torch.device("cuda"), torch.cuda.graph_pool_handle()
    x = torch.ones(4, device=device)
    owner: list[object] = [record(lambda: x * 2, device, memory)]
    owner.append(owner)
    del owner

    def step() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1, 1, 1)
            _ = [[] for _ in range(1000)]
        return x * 3

    threshold = gc.get_threshold()
    gc.set_threshold(0)
    try:
        graph, result = record(step, device, memory)
    finally:
        gc.set_threshold(*threshold)
    graph.replay()
    assert result.tolist() == [3.0] * 4
