"""gpt/runtime/prompt_graphs.py: which prompts get a graph, and for how long; gpt/runtime/recording.py on a GPU; what is
told of the time that recording takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import build_engine, random_prompts
from test_runtime_cuda_session import MAX_SEQ_LEN, MODEL, make_build, make_weights

import run
from gpt.engine.kv_cache import KvCache
from gpt.engine.step import Step
from gpt.kernels.draw import Filters
from gpt.mapping import Mapping
from gpt.runtime.cuda_session import CudaSession
from gpt.runtime.prompt_graphs import PromptGraphs, graph_size
from gpt.runtime.recording import Recorder
from gpt.runtime.torch_session import TorchSession
from gpt.text.pipeline import tell_recording


class StandIn:
    """In a recorder's place where there is no GPU: replaying does nothing, and every recording takes `each` seconds."""

    def __init__(self, each: float):
        self.seconds = 0.0
        self.num_steps = 0
        self._each = each

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        self.seconds += self._each
        self.num_steps += 1
        return SimpleNamespace(replay=lambda: None), run()


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


def test_recording_prompts_ends_after_64_times() -> None:
    """Sizes that come in turn, one more than graphs are kept: each is recorded again and again, but not for ever."""

    def forward(step: Step, cache: KvCache) -> torch.Tensor:
        return torch.zeros(1, 5)

    recorder = StandIn(0.1)
    graphs = PromptGraphs(forward, recorder)  # type: ignore[arg-type]
    cache = KvCache(torch.zeros(1, 2, 1, 1, 2048, 4))
    sizes = [64 * n for n in range(1, 18)]
    for _ in range(10):
        through_graphs = [graphs.run([[1] * size], cache, 2048) is not None for size in sizes]
    assert recorder.num_steps == 64
    assert sum(through_graphs) == 16  # those that were recorded last


def test_eight_ways_of_choosing_tokens_are_kept_per_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    build = make_build("float32")
    session = CudaSession(MODEL, build, Mapping(), make_weights(MODEL, build), "cpu")
    recorder = StandIn(0.1)
    session.start(1, MAX_SEQ_LEN)
    session.context(random_prompts([6], MODEL.vocab_size))
    monkeypatch.setattr(session, "_recorder", recorder)
    decoder = session._batch_decoder()
    monkeypatch.setattr(decoder, "_launch", lambda filters: torch.zeros(1, MODEL.vocab_size))
    ways = [Filters(temperature, 0, 1.0, 0.0) for temperature in range(1, 13)]
    for way in ways:
        decoder.step(way)
    assert list(decoder._recorded) == ways[-8:]
    decoder.step(ways[-1])
    assert recorder.num_steps == len(ways)
    assert session.recording_seconds == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("now", "before", "told"), [(2.54, 0.0, "2.5 s"), (0.9, 0.0, ""), (9.0, 8.5, ""), (9.5, 8, "1.5 s")]
)
def test_noticeable_recording_is_told(now: float, before: float, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = SimpleNamespace(recording_seconds=now)
    tell_recording(session, before)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" went into")[0] for line in lines] == ([told] if told else [])


@pytest.mark.parametrize("to_file", [False, True])
def test_run_tells_it_at_its_usual_log_level(
    to_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--vocab_size", "4096", "--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--n_positions", "32"]
    build_engine(None, tmp_path / "engine", *sizes, "--max_input_len", "16", "--max_output_len", "8")
    monkeypatch.setattr(TorchSession, "recording_seconds", 3.0, raising=False)
    where = ["--output_file", str(tmp_path / "results.jsonl")] if to_file else []
    flags = [
        "--engine_dir",
        str(tmp_path / "engine"),
        "--max_output_len",
        "2",
        "--device",
        "cpu",
        "--input_text",
        "a",
        *where,
    ]
    capsys.readouterr()
    assert run.main(flags) == 0
    assert capsys.readouterr().err.startswith("3.0 s went into steps that came for the first time")


@pytest.mark.gpu
def test_a_graph_that_ends_meanwhile_does_not_spoil_a_recording() -> None:
    """Its owner refers to itself, so that only the collector finds it: any time, here while another is recorded."""
    device = torch.device("cuda")
    recorder = Recorder(device)
    x = torch.ones(4, device=device)
    owner: list[object] = [recorder.record(lambda: x * 2)]
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
        graph, result = recorder.record(step)
    finally:
        gc.set_threshold(*threshold)
    graph.replay()
    assert result.tolist() == [3.0] * 4
    assert recorder.seconds > 0
