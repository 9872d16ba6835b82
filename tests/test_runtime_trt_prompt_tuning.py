"""Virtual tokens in TensorRT engines, beside the torch session: built for each target, evaluated in both phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import random_prompts
from trt_matrix import record
from trt_models import MODELS, RANK, build_config, define, logit_errors, random_weights

import build as build_script
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_io, trt_library
from gpt.engine.estimate import estimate
from gpt.engine.folder import open_engine
from gpt.engine.trt_builder import build_plan
from gpt.engine.trt_check import check_build
from gpt.engine.trt_stand_in import stand_in_engine
from gpt.errors import ConfigError, EngineError
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trt_session import TrtSession
from gpt.runtime.virtual_tokens import VirtualTokens

pytestmark = pytest.mark.tensorrt

NUM_TASKS, NUM_VIRTUAL = 3, 4
NUM_ROWS = NUM_TASKS * NUM_VIRTUAL
BOUNDS = {"float32": 1e-5, "float16": 5e-3}  # of the logits, relative L2, against the torch session of the same dtype
LEARNED, ROTARY = "gpt2", "rotary_swiglu_grouped"
TASKS = (2, 0, 1, 2)

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
positions = pytest.mark.parametrize("name", [LEARNED, ROTARY], ids=["learned", "rotary"])


def prompt_build(dtype: str = "float32", **options: Any) -> BuildConfig:
    return build_config(dtype, max_prompt_embedding_table_size=NUM_ROWS, **options)


def virtual_tokens(model: ModelConfig, tasks: tuple[int, ...] = TASKS) -> VirtualTokens:
    generator = torch.Generator().manual_seed(2)
    return VirtualTokens(torch.randn(NUM_TASKS, NUM_VIRTUAL, model.n_embd, generator=generator), tasks)


def virtual_prompts(model: ModelConfig) -> list[list[int]]:
    """Virtual tokens in front, in the middle, not at all, and backwards; one of them is the last of its prompt."""
    words = random_prompts((4, 9, 6, 2), model.vocab_size)
    ids = list(range(model.vocab_size, model.vocab_size + NUM_VIRTUAL))
    return [ids + words[0], words[1][:3] + ids[:2] + words[1][3:], words[2], words[3] + ids[::-1]]


def both_sessions(model: ModelConfig, build: BuildConfig) -> tuple[TrtSession, TorchSession]:
    weights = random_weights(model, build.dtype)
    engine = stand_in_engine(model, build, RANK, weights)
    trt_session = TrtSession(engine, model, build, RANK, "cpu", engine.trt)
    return trt_session, TorchSession(model, build, RANK, weights)


@pytest.mark.parametrize("dtype", BOUNDS)
@layouts
@positions
def test_logits_of_both_phases(name: str, packed: bool, dtype: str) -> None:
    """Several tasks in one batch, two prompts of the same."""
    model, build = MODELS[name], prompt_build(dtype, fused=True, packed=packed)
    errors = logit_errors(*both_sessions(model, build), virtual_prompts(model), 4, virtual_tokens(model))
    assert all(error < BOUNDS[dtype] for error in errors), errors
    record(name, build, error=max(errors))


@layouts
@positions
def test_greedy_ids(name: str, packed: bool) -> None:
    """With virtual tokens, then without in the same session, then with others: nothing is left of an earlier table."""
    model = MODELS[name]
    sessions = both_sessions(model, prompt_build(fused=True, packed=packed))
    prompts = virtual_prompts(model)
    words = random_prompts((5, 1, 11), model.vocab_size)
    results = []
    for session in sessions:
        calls = (
            (prompts, virtual_tokens(model)),
            (words, None),
            (prompts[:2], virtual_tokens(model, (1, 1))),
            (prompts[:1], virtual_tokens(model, (2,))),
        )
        results.append([generate(session, Request(p, max_new_tokens=12, virtual=v)).tokens for p, v in calls])
    assert results[0] == results[1]
    # The task is what makes the difference: the first prompt came with task 2, 1, and 2 again.
    (first, *_), _, (other, _), (again,) = results[0]
    assert first == again != other


@layouts
def test_words_alone_need_no_table(packed: bool) -> None:
    """The same logits as an engine without prompt tuning, to the last bit."""
    model = MODELS[LEARNED]
    prompts = random_prompts((5, 1, 11, 3), model.vocab_size)
    logits = []
    for build in (prompt_build(packed=packed), build_config(packed=packed)):
        session, _ = both_sessions(model, build)
        session.start(len(prompts), 20)
        logits.append(torch.stack([session.context(prompts).clone(), session.generation(torch.tensor([1, 2, 3, 4]))]))
    assert torch.equal(*logits)


def test_a_view_of_another_table() -> None:
    """The columns of a wider table: its values, and not what lies between them in memory, are what the engine gets."""
    model = MODELS[LEARNED]
    virtual, prompts = virtual_tokens(model), virtual_prompts(model)
    wide = torch.zeros(NUM_TASKS, NUM_VIRTUAL, model.n_embd + 5)
    wide[..., 5:] = virtual.table
    session, _ = both_sessions(model, prompt_build())
    session.start(len(prompts), 12)
    expected = session.context(prompts, virtual).clone()
    actual = session.context(prompts, replace(virtual, table=wide[..., 5:]))
    assert torch.equal(actual, expected)


@layouts
def test_no_row_outside_the_table_is_read(packed: bool) -> None:
    """Ids that `generate` would refuse: the last row of the task stands for those behind it, no task reads another's
    rows, and the evaluator refuses an index outside a table."""
    model = MODELS[LEARNED]
    session, _ = both_sessions(model, prompt_build(packed=packed))
    last, beyond = model.vocab_size + NUM_VIRTUAL - 1, model.vocab_size + NUM_VIRTUAL + 50
    session.start(NUM_TASKS, 12)
    virtual = virtual_tokens(model, tuple(range(NUM_TASKS)))
    expected = session.context([[last, 1]] * NUM_TASKS, virtual).clone()
    assert torch.equal(session.context([[beyond, 1]] * NUM_TASKS, virtual), expected)


@layouts
@positions
def test_plan_for_every_target(name: str, packed: bool, tmp_path: Path) -> None:
    model = MODELS[name]
    build = prompt_build("float16", fused=True, packed=packed, targets=("ampere", "ada", "blackwell"))
    check_build(model, build)
    weights = random_weights(model, "float16")
    build_plan(model, build, RANK, weights.items(), tmp_path / "a.engine")
    record(name, build, built=" ".join(build.targets))
    size, estimated = (tmp_path / "a.engine").stat().st_size, estimate(model, build, RANK)
    assert estimated.weights == sum(tensor.nbytes for tensor in weights.values()) < size
    assert size <= estimated.engine_file <= size + 4 * 2**20


@layouts
def test_inputs_and_their_profiles(packed: bool) -> None:
    model, build = MODELS[LEARNED], prompt_build("float16", packed=packed)
    network = define(trt_library.load(), model, build)
    inputs = [network.network.get_input(index) for index in range(network.network.num_inputs)]
    found = {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in inputs}
    assert found["prompt_embedding_table"] == ("HALF", (-1, model.n_embd))
    assert found["tasks"] == ("INT32", (-1,) if packed else (-1, 1))
    assert found["prompt_vocab_size"] == ("INT32", (1,))
    for profile in range(trt_io.num_profiles(build)):
        shapes = trt_io.profile_shapes(model, build, RANK, profile)
        width = model.n_embd
        assert shapes["prompt_embedding_table"] == [(1, width), ((NUM_ROWS + 1) // 2, width), (NUM_ROWS, width)]
        assert shapes["prompt_vocab_size"] == [(1,)] * 3
        assert shapes["tasks"][2] == (shapes["input_ids"][2] if packed else (build.max_batch_size, 1))


class TestRefused:
    model = MODELS[LEARNED]

    def test_engine_without_prompt_tuning(self) -> None:
        session, _ = both_sessions(self.model, build_config())
        virtual = virtual_tokens(self.model, (0,))
        session.start(1, 8)
        for call in (
            lambda: session.context([[1, 2]], virtual),
            lambda: generate(session, Request([[1, 2]], max_new_tokens=2, virtual=virtual)),
        ):
            with pytest.raises(ConfigError, match="does not fit") as caught:
                call()
            assert "built without prompt tuning (--max_prompt_embedding_table_size)" in str(caught.value)

    @pytest.mark.parametrize(
        ("tasks", "told"), [((3,), "task 3: the table has tasks 0 to 2"), ((0, 1), "2 tasks for 1 prompts")]
    )
    def test_tasks(self, tasks: tuple[int, ...], told: str) -> None:
        session, _ = both_sessions(self.model, prompt_build())
        session.start(1, 8)
        with pytest.raises(ConfigError) as caught:
            session.context([[1, 2]], virtual_tokens(self.model, tasks))
        assert told in str(caught.value)

    def test_table_larger_than_the_engine_holds(self) -> None:
        """The configuration promises more rows than the engine has: its own profile is told."""
        weights = random_weights(self.model)
        built = replace(prompt_build(), max_prompt_embedding_table_size=NUM_VIRTUAL)
        engine = stand_in_engine(self.model, built, RANK, weights)
        session = TrtSession(engine, self.model, prompt_build(), RANK, "cpu", engine.trt)
        session.start(1, 8)
        with pytest.raises(EngineError) as caught:
            session.context([[1, 2]], virtual_tokens(self.model, (0,)))
        for part in ("prompt_embedding_table", "(12, 48)", "(1, 48) to (4, 48)"):
            assert part in str(caught.value)

    def test_engine_of_another_kind(self) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        with pytest.raises(EngineError) as caught:
            TrtSession(engine, self.model, prompt_build(), RANK, "cpu", engine.trt)
        for name in ("prompt_embedding_table", "tasks", "prompt_vocab_size"):
            assert f"{name}: missing" in str(caught.value)


def test_command_line(tmp_path: Path) -> None:
    flags = ["--vocab_size", "67", "--n_positions", "64", "--n_embd", "32", "--n_head", "2", "--n_layer", "1"]
    flags += ["--max_batch_size", "2", "--max_input_len", "8", "--max_output_len", "8", "--dtype", "float16"]
    flags += ["--target", "ampere", "--max_prompt_embedding_table_size", "10", "--log_level", "error"]
    build_script.run_build([*flags, "--output_dir", str(tmp_path)])
    info = open_engine(tmp_path)
    assert info.backend == "tensorrt"
    assert info.build.max_prompt_embedding_table_size == 10
