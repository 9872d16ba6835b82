"""Batch-invariant execution: what a sequence gets is the same, bit by bit, alone and among others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, random_prompts

from gpt.checkpoint.random_weights import RandomWeights
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.step import AheadStep
from gpt.engine.weights import engine_tensors
from gpt.errors import ConfigError
from gpt.kernels.launch import INTERPRETED
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.batcher import generate_paged
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.cuda_session import CudaSession
from gpt.runtime.execution import Execution
from gpt.runtime.load import load_session
from gpt.runtime.logprobs import TokenLogprob
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession

MODEL = ModelConfig(vocab_size=83, n_positions=64, n_embd=32, n_head=2, n_layer=1, n_kv_head=2, inter_size=64)
# In float32 a CPU's library adds differently for every number of rows.
BUILD = BuildConfig(
    dtype="float32" if INTERPRETED else "float16", max_input_len=32, max_output_len=16, max_batch_size=64, seed=1
)
# Among others: no row, two, and on a GPU so many that other kernels would be chosen.
OTHERS = ([], [9, 20]) if INTERPRETED else ([], [9, 30], [17] * 6, [3, 31, 8] * 21)
QUANT = {"float": QuantConfig(), "int4": QuantConfig(weights="int4", group_size=32)}

MakeSession = Callable[[ModelConfig, BuildConfig], TorchSession]


@pytest.fixture(params=["PyTorch", "kernels"])
def make_session(request: pytest.FixtureRequest, kernel_device: torch.device) -> MakeSession:
    def make(model: ModelConfig, build: BuildConfig) -> TorchSession:
        weights = dict(engine_tensors(model, build, Mapping(), RandomWeights(model, 1, kernel_device)))
        kind = TorchSession if request.param == "PyTorch" else CudaSession
        return kind(model, build, Mapping(), weights, kernel_device, batch_invariant=True)

    return make


def last_row(session: TorchSession, prompts: Sequence[list[int]], num_steps: int) -> torch.Tensor:
    """The logits of the last prompt, [1 + num_steps, V]."""
    session.start(len(prompts), max(map(len, prompts)) + num_steps)
    logits = [session.context(prompts)[-1].clone()]
    for _ in range(num_steps):
        ids = torch.full((len(prompts),), 5, device=session.device)
        ids[-1] = logits[-1].argmax()
        logits.append(session.generation(ids)[-1].clone())
    return torch.stack(logits).cpu()


@pytest.mark.parametrize("quant", QUANT)
@pytest.mark.parametrize("heads", [2, 1])
def test_logits(quant: str, heads: int, make_session: MakeSession) -> None:
    session = make_session(replace(MODEL, n_kv_head=heads), replace(BUILD, quant=QUANT[quant]))
    (prompt,) = random_prompts([12], MODEL.vocab_size)
    num_steps = 1 if INTERPRETED else 8
    found = [last_row(session, [*random_prompts(others, 80), prompt], num_steps) for others in OTHERS]
    for logits in found[1:]:
        assert torch.equal(logits, found[0])


def test_libraries_do_not_multiply(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("how a library adds depends on the number of rows")

    monkeypatch.setattr("gpt.engine.cuda_ops.LIBRARY_ROWS", 2)
    for name in ("wide_linear", "library_linear"):
        monkeypatch.setattr(f"gpt.engine.cuda_ops.{name}", refuse)
    alone, among = (last_row(make_session(MODEL, BUILD), [*random_prompts(n, 80), [7, 8]], 1) for n in ([], [5, 9]))
    assert torch.equal(alone, among)


@pytest.mark.parametrize("padding", [False, True])
def test_logits_of_padded_and_packed_prompts(padding: bool, make_session: MakeSession) -> None:
    session = make_session(MODEL, replace(BUILD, remove_input_padding=not padding))
    (prompt,) = random_prompts([12], MODEL.vocab_size)
    alone, among = (last_row(session, [*random_prompts(others, 80), prompt], 0) for others in OTHERS[:2])
    assert torch.equal(alone, among)


def test_a_paged_cache(make_session: MakeSession) -> None:
    """Where steps are short and blocks are few, sequences wait for each other, and none is computed differently."""
    build = replace(BUILD, paged_kv_cache=True, use_inflight_batching=True, tokens_per_block=16, max_num_tokens=24)
    session = make_session(MODEL, build)
    (prompt,) = random_prompts([30], MODEL.vocab_size)
    num_tokens = 2 if INTERPRETED else 16

    def run(others: Sequence[int], position: int) -> list[TokenLogprob]:
        prompts = random_prompts(others, 80)
        prompts.insert(position, prompt)
        result = generate_paged(
            session,
            Request(prompts, max_new_tokens=num_tokens, num_top_logprobs=1),
            batching=BatchingConfig(max_cache_tokens=96),
        )
        assert all(len(tokens) == num_tokens for tokens in result.tokens)
        return result.logprobs[position]

    alone = run([], 0)
    assert run([17, 30, 3], 2) == alone
    assert run([30, 5], 1) == alone


def test_steps_that_run_ahead(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks, where the device chooses: the first sequence's tokens and their logits."""
    build = replace(BUILD, paged_kv_cache=True, use_inflight_batching=True, tokens_per_block=16)
    weights = dict(engine_tensors(MODEL, build, Mapping(), RandomWeights(MODEL, 1, kernel_device)))
    session = CudaSession(MODEL, build, Mapping(), weights, kernel_device, batch_invariant=True)
    run_ahead, first = session.run_paged_ahead, list[tuple[int, float]]()

    def listen(step: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
        for tokens, largest in run_ahead(step):
            first.append((tokens[0], largest[0]))
            yield tokens, largest

    monkeypatch.setattr(session, "run_paged_ahead", listen)
    found = []
    for others in OTHERS[:2]:
        first.clear()
        prompts = [*random_prompts([7], 80), *random_prompts(others, 80)]
        generate_paged(session, Request(prompts, max_new_tokens=3 if INTERPRETED else 16))
        found.append(list(first))
    assert len(found[0]) > 1
    assert found[1] == found[0]


def test_drafts_are_refused(make_session: MakeSession) -> None:
    session = make_session(MODEL, replace(BUILD, paged_kv_cache=True))
    with pytest.raises(ConfigError, match="--batch_invariant with --max_draft_len 2"):
        generate_paged(session, Request([[1]], max_new_tokens=1), batching=BatchingConfig(max_draft_len=2))


def test_tensorrt_engines_are_refused(tmp_path: Path) -> None:
    info = build_engine(None, tmp_path / "e", "--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50")
    with pytest.raises(ConfigError, match="--batch_invariant"):
        load_session(
            replace(info, build=replace(info.build, backend="tensorrt")), "cpu", Execution(batch_invariant=True)
        )
