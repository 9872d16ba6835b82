"""The TensorRT session over the evaluator, beside the torch session: phases, profiles, addresses, cache in place."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, convert, random_prompts
from ranks import without_nccl
from transformers import GPT2LMHeadModel
from trt_matrix import record
from trt_models import LENGTHS, MODELS, RANK, build_config, logit_errors, random_weights

from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_library
from gpt.engine.trt_runtime import create_context
from gpt.engine.trt_stand_in import EvaluatorContext, EvaluatorEngine, stand_in_engine
from gpt.errors import ConfigError, EngineError
from gpt.runtime import trt_session
from gpt.runtime.generate import generate
from gpt.runtime.load import load_torch_weights
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trt_phase import Phase
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt

# Of the logits, relative L2, against the torch session of the same dtype.  float32: the order of additions; half
# precision: the rounding of every layer's result (2^-11 and 2^-8), which the two executors do at different places.
BOUNDS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}


def open_trt(model: ModelConfig, build: BuildConfig, weights: dict[str, torch.Tensor] | None = None) -> TrtSession:
    weights = random_weights(model, build.dtype) if weights is None else weights
    return over_engine(stand_in_engine(model, build, RANK, weights), model, build)


def over_engine(engine: EvaluatorEngine, model: ModelConfig, build: BuildConfig) -> TrtSession:
    return TrtSession(engine, model, build, RANK, "cpu", engine.trt)


def greedy(session: TrtSession | TorchSession, prompts: list[list[int]], num_tokens: int = 20) -> list[list[int]]:
    return generate(session, Request(prompts, max_new_tokens=num_tokens)).tokens


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_both_phases(name: str, fused: bool, packed: bool, dtype: str) -> None:
    model, build = MODELS[name], build_config(dtype, fused=fused, packed=packed)
    weights = random_weights(model, dtype)
    sessions = open_trt(model, build, weights), TorchSession(model, build, RANK, weights)
    errors = logit_errors(*sessions, random_prompts(LENGTHS, model.vocab_size), 8)
    assert all(error < BOUNDS[dtype] for error in errors), errors
    record(name, build, error=max(errors))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids(name: str, packed: bool) -> None:
    """Batches of other sizes in one session, the last again as the first: nothing is left of what came before."""
    model, build = MODELS[name], build_config(fused=True, packed=packed)
    session, reference = open_trt(model, build), TorchSession(model, build, RANK, random_weights(model))
    for seed, lengths in enumerate([LENGTHS, (12,), (7, 7), LENGTHS]):
        prompts = random_prompts(lengths, model.vocab_size, seed)
        assert greedy(session, prompts) == greedy(reference, prompts)


def test_greedy_ids_are_hf_ones(make_gpt2: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_gpt2(tokenizer=False)
    info = build_engine(convert(folder, tmp_path / "ft"), tmp_path / "engine", "--dtype", "float32")
    weights = load_torch_weights(info, RANK, torch.device("cpu"))
    session = open_trt(info.model, build_config(fused=True), weights)
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = random_prompts((9,), info.model.vocab_size)[0]
    ids = torch.tensor([prompt])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert greedy(session, [prompt]) == expected[:, len(prompt) :].tolist()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_prompt_does_not_depend_on_its_batch(packed: bool) -> None:
    model = MODELS["gpt2"]
    session = open_trt(model, build_config(fused=True, packed=packed))
    prompts = random_prompts(LENGTHS, model.vocab_size)
    assert greedy(session, prompts) == [greedy(session, [prompt])[0] for prompt in prompts]


def test_longest_sequence_fills_the_cache() -> None:
    model = MODELS["gpt2"]
    build = build_config(fused=True)
    session, reference = open_trt(model, build), TorchSession(model, build, RANK, random_weights(model))
    prompts = random_prompts((build.max_input_len,), model.vocab_size)
    assert greedy(session, prompts) == greedy(reference, prompts, build.max_output_len)
    session.generation(torch.tensor([1]))  # the last chosen token has not been written yet
    with pytest.raises(ConfigError, match="cache is full"):
        session.generation(torch.tensor([1]))


class TestLimits:
    model = MODELS["gpt2"]

    def test_start(self) -> None:
        session = open_trt(self.model, build_config())
        with pytest.raises(ConfigError, match="larger than the engine"):
            session.start(5, 10)

    def test_profile_of_the_engine(self) -> None:
        """The configuration promises more than the engine holds: the engine's own limits are told."""
        built = build_config(max_batch_size=2)
        engine = stand_in_engine(self.model, built, RANK, random_weights(self.model))
        session = over_engine(engine, self.model, replace(built, max_batch_size=8))
        session.start(3, 10)
        with pytest.raises(EngineError) as caught:
            session.context([[1, 2], [3], [4]])
        for part in ("context phase", "input_ids", "(3, 2)", "(1, 1) to (2, 12)"):
            assert part in str(caught.value)

    def test_engine_of_another_model(self) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        with pytest.raises(EngineError) as caught:
            over_engine(engine, replace(self.model, n_layer=3, n_embd=72), build_config("float16", packed=True))
        for part in (
            "past_key_2: missing",
            "packed_from_padded: missing",
            "past_key_0: found torch.float32 (-1, 3, 32, 16)",
        ):
            assert part in str(caught.value)


class Executions:
    """Every execution of a stand-in context in a test: which one, with which addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[EvaluatorContext, dict[str, int]]] = []
        execute = EvaluatorContext._execute

        def record(context: EvaluatorContext, shapes: Any, addresses: dict[str, int]) -> bool:
            self.seen.append((context, dict(addresses)))
            return execute(context, shapes, addresses)

        monkeypatch.setattr(EvaluatorContext, "_execute", record)


def raise_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("out of memory")


class TestAddresses:
    model = MODELS["gpt2"]

    def test_cache_is_updated_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        session = open_trt(self.model, build_config(fused=True))
        executions = Executions(monkeypatch)
        greedy(session, random_prompts((4, 2), self.model.vocab_size), 3)
        for _, addresses in executions.seen:
            for layer in range(self.model.n_layer):
                for kind in ("key", "value"):
                    assert addresses[f"past_{kind}_{layer}"] == addresses[f"present_{kind}_{layer}"]
        (context, _), *generation = executions.seen
        assert len(generation) == 2
        assert generation[0] == generation[1]
        assert generation[0][0] is not context
        written = session._memory[0]["past_key_0"].abs().sum((1, 3)) > 0  # [B, T]
        assert written.sum(1).tolist() == [4 + 2, 4]  # the shorter row: its padding, and its two later tokens over it

    def test_cache_elsewhere_is_refused(self) -> None:
        session = open_trt(self.model, build_config())
        session.start(1, 4)
        session.context([[1, 2]])
        elsewhere = torch.zeros_like(session._memory[0]["past_key_0"])
        session._context.context.set_tensor_address("present_key_0", elsewhere.data_ptr())
        with pytest.raises(EngineError, match="context phase: could not execute") as caught:
            session._context.run()
        assert "present_key_0 is not at the address of past_key_0" in str(caught.value)

    def test_missing_address_shape_and_memory(self) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        context = create_context(engine, engine.trt, trt_library.error_recorder(engine.trt))
        assert not context.execute_async_v3(0)
        assert "input_ids" in context.error_recorder.messages[0]
        assert not context.set_optimization_profile_async(2, 0)
        assert not context.set_tensor_address("nobody", 1)
        session = over_engine(engine, self.model, build_config())
        session._context.context._memory = None
        session.start(1, 4)
        with pytest.raises(EngineError, match="working memory"):
            session.context([[1, 2]])

    def test_inputs_live_as_long_as_their_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU they are copies, which the library knows by their addresses only."""
        session = open_trt(self.model, build_config())
        session.start(1, 4)
        copies: list[weakref.ref[torch.Tensor]] = []
        launch = Phase.launch

        def copy(tensor: torch.Tensor, _: torch.device) -> torch.Tensor:
            copies.append(weakref.ref(copied := tensor.clone()))
            return copied

        def launched(phase: Phase) -> None:
            assert len(copies) == len(session._inputs)
            assert None not in [each() for each in copies]
            launch(phase)

        monkeypatch.setattr(Phase, "launch", launched)
        monkeypatch.setattr(torch.Tensor, "to", copy)
        session.context([[1, 2]])

    def test_memory_that_runs_out_leaves_a_session_that_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        session = open_trt(self.model, build_config())
        expected = greedy(session, [[1, 2]], 3)
        with monkeypatch.context() as patch:
            patch.setattr(trt_session, "generation_inputs", raise_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                session.start(3, 4)
        assert greedy(session, [[1, 2]], 3) == expected

    def test_phases_share_their_working_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The stand-in overwrites it at every execution."""
        session = open_trt(self.model, build_config(batch_buckets=(2,)))
        executions = Executions(monkeypatch)
        for lengths in ((3,), (5, 2, 2)):
            greedy(session, random_prompts(lengths, self.model.vocab_size), 3)
        contexts = {id(context): context for context, _ in executions.seen}
        assert len(contexts) == 3
        assert {context._memory for context in contexts.values()} == {(session._scratch.data_ptr(), 256)}
        assert set(session._scratch.tolist()) == {0xFF}


class TestBucketsAndGraphs:
    model = MODELS["rotary_swiglu_grouped"]

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize("buckets", [(), (1, 2)], ids=["any size", "buckets"])
    def test_greedy_ids(self, buckets: tuple[int, ...], packed: bool) -> None:
        """Batches that fill a bucket, that do not, smaller ones after larger ones: with and without graphs."""
        build = build_config(fused=True, packed=packed, batch_buckets=buckets)
        weights = random_weights(self.model)
        engine = stand_in_engine(self.model, build, RANK, weights)
        captures: list[Phase] = []

        def capture(phase: Phase) -> Callable[[], None]:
            captures.append(phase)
            return phase.context.captured()

        plain = over_engine(engine, self.model, build)
        captured = TrtSession(engine, self.model, build, RANK, "cpu", engine.trt, capture=capture)
        reference = TorchSession(self.model, build, RANK, weights)
        for seed, lengths in enumerate([(3,), (12,), (7, 2), (1, 5, 2), (2, 2, 9, 4), (6, 3), (2, 11, 1)]):
            prompts = random_prompts(lengths, self.model.vocab_size, seed)
            expected = greedy(reference, prompts, 6)
            assert greedy(plain, prompts, 6) == expected
            assert greedy(captured, prompts, 6) == expected
        if buckets:  # memory grew twice; after that, two and three sequences find the graphs of their buckets
            assert [phase.what for phase in captures] == [f"generation of {size}" for size in (1, 2, 4, 2)]
        else:
            assert len(captures) == 6  # sizes 1 2 3 4 2 3

    @pytest.mark.parametrize(("buckets", "num_contexts"), [((), 2), ((1, 2), 4)], ids=["any size", "buckets"])
    def test_a_context_serves_all_batches_of_its_profile(
        self, buckets: tuple[int, ...], num_contexts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TensorRT-RTX compiles kernels whenever one is made."""
        made = []
        make = EvaluatorEngine.create_execution_context

        def counted(engine: EvaluatorEngine, config: Any) -> EvaluatorContext:
            made.append(engine)
            return make(engine, config)

        monkeypatch.setattr(EvaluatorEngine, "create_execution_context", counted)
        session = open_trt(self.model, build_config(batch_buckets=buckets))
        for lengths in [(3,), (7, 2), (2, 2, 9, 4), (6, 3), (2, 11, 1), (5,)]:
            greedy(session, random_prompts(lengths, self.model.vocab_size), 3)
        assert len(made) == num_contexts

    def test_a_graph_replaces_launches(self) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        num_replays = 0

        def capture(phase: Phase) -> Callable[[], None]:
            replay = phase.context.captured()

            def counted() -> None:
                nonlocal num_replays
                num_replays += 1
                replay()

            return counted

        gpus = without_nccl()
        session = TrtSession(engine, self.model, build_config(), RANK, "cpu", engine.trt, gpus, capture=capture)
        greedy(session, [[1, 2, 3]], 10)
        assert num_replays == 8  # the prompt and the first step are launched
        assert session._generation
        gpus.release_all()  # at the end of the process, before NCCL
        assert not session._generation

    @pytest.mark.parametrize("how", ["refused", "failed"])
    def test_steps_that_cannot_be_captured_are_launched(
        self, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        num_tries = 0

        def capture(phase: Phase) -> Callable[[], None]:
            nonlocal num_tries
            num_tries += 1
            raise RuntimeError("operation not permitted when stream is capturing")

        if how == "refused":  # not every library has the question
            monkeypatch.setattr(EvaluatorContext, "is_stream_capturable", lambda *_: False, raising=False)
        monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
        caplog.set_level("INFO", logger="gpt")
        session = TrtSession(engine, self.model, build_config(), RANK, "cpu", engine.trt, capture=capture)
        reference = TorchSession(self.model, build_config(), RANK, random_weights(self.model))
        assert greedy(session, [[1, 2, 3]], 6) == greedy(reference, [[1, 2, 3]], 6)
        assert num_tries == (how == "failed")
        assert ("without a CUDA graph: operation not permitted" in caplog.text) == (how == "failed")

    def test_rows_behind_a_batch_begin_anew(self) -> None:
        """Their positions grow with every step, and would leave the cache after some batches."""
        build = build_config(batch_buckets=(2,))
        session, reference = (
            open_trt(self.model, build),
            TorchSession(self.model, build, RANK, random_weights(self.model)),
        )
        prompts = random_prompts((3, 4, 2), self.model.vocab_size)
        expected = greedy(reference, prompts, 12)
        assert build.max_seq_len < 4 * 11
        for _ in range(4):
            assert greedy(session, prompts, 12) == expected

    def test_a_profile_per_bucket(self) -> None:
        build = build_config(batch_buckets=(2, 1))
        engine = stand_in_engine(self.model, build, RANK, random_weights(self.model))
        shapes = [engine.get_tensor_profile_shape("input_ids", profile) for profile in range(4)]
        assert shapes == [[(1, 1), (2, 6), (4, 12)], [(1, 1)] * 3, [(2, 1)] * 3, [(4, 1)] * 3]

    def test_sessions_share_an_engine(self) -> None:
        """Steps of two sessions in turn; each has its own cache."""
        build = build_config(fused=True)
        engine = stand_in_engine(self.model, build, RANK, random_weights(self.model))
        prompts = [random_prompts((5, 3), self.model.vocab_size, seed) for seed in (0, 1)]
        expected = [greedy(over_engine(engine, self.model, build), each, 5) for each in prompts]
        sessions = [over_engine(engine, self.model, build) for _ in prompts]
        for session, each in zip(sessions, prompts, strict=True):
            session.start(2, 10)
            session.context(each)
        found = []
        for session, rows in zip(sessions, expected, strict=True):
            for step in range(4):
                found.append(session.generation(torch.tensor([row[step] for row in rows])).argmax(-1).tolist())
                other = sessions[0] if session is sessions[1] else sessions[1]
                assert other._lengths == ([5, 3] if other is sessions[1] else [9, 7])
        assert found == [[row[step + 1] for row in rows] for rows in expected for step in range(4)]


class TestLibraryErrors:
    model = MODELS["gpt2"]

    def test_an_exception_of_the_library_is_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: EvaluatorContext, profile: int, stream: int) -> bool:
            self.error_recorder.report_error(self.engine.trt.ErrorCodeTRT.INVALID_ARGUMENT, "no such thing")
            raise RuntimeError("Error in set optimization profile async.")

        monkeypatch.setattr(EvaluatorContext, "set_optimization_profile_async", fail)
        with pytest.raises(EngineError, match="context phase: refused its profile") as caught:
            open_trt(self.model, build_config())
        for part in ("no such thing", "Error in set optimization profile async"):
            assert part in str(caught.value)

    def test_messages_belong_to_one_error(self) -> None:
        session = open_trt(self.model, build_config())
        session.start(1, 4)
        session.context([[1, 2]])
        session._begin_generation()
        session._step_memory["cache_write_index"].fill_(99)
        with pytest.raises(EngineError, match="outside the cache") as first:
            session.generation(torch.tensor([1]))
        session._scratch = session._scratch[:1]
        session._context.context.set_device_memory(session._scratch.data_ptr(), 1)
        with pytest.raises(EngineError, match="working memory") as second:
            session.context([[1, 2]])
        assert "outside the cache" in str(first.value)
        assert "outside the cache" not in str(second.value)

    @pytest.mark.parametrize("call", ["create_runtime_config", "create_execution_context"])
    def test_no_context(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine's own messages are shown: there is no context that could have any."""

        def nothing(engine: EvaluatorEngine, *_: object) -> None:
            engine.error_recorder.report_error(engine.trt.ErrorCodeTRT.INTERNAL_ERROR, "out of memory")

        monkeypatch.setattr(EvaluatorEngine, call, nothing)
        with pytest.raises(EngineError, match="cannot execute this engine") as caught:
            open_trt(self.model, build_config())
        assert "out of memory" in str(caught.value)
