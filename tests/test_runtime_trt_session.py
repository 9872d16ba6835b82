"""The TensorRT session over the evaluator, beside the torch session: phases, profiles, addresses, cache in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, convert, random_prompts, relative_error
from transformers import GPT2LMHeadModel
from trt_models import LENGTHS, MODELS, RANK, build_config, random_weights

import build as build_script
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_library, trt_runtime
from gpt.engine.folder import open_engine
from gpt.engine.trt_builder import build_plan
from gpt.engine.trt_stand_in import EvaluatorContext, EvaluatorEngine, stand_in_engine
from gpt.errors import ConfigError, EngineError
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session, load_torch_weights
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt

# Of the logits, relative L2, against the torch session of the same dtype.  float32: the order of additions; half
# precision: the rounding of every layer's result (2^-11 and 2^-8), which the two executors do at different places.
BOUNDS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
NUM_STEPS = 8


def open_trt(model: ModelConfig, build: BuildConfig, weights: dict[str, torch.Tensor] | None = None) -> TrtSession:
    weights = random_weights(model, build.dtype) if weights is None else weights
    return over_engine(stand_in_engine(model, build, RANK, weights), model, build)


def over_engine(engine: EvaluatorEngine, model: ModelConfig, build: BuildConfig) -> TrtSession:
    return TrtSession(engine, model, build, RANK, "cpu", engine.trt)


def greedy(session: TrtSession | TorchSession, prompts: list[list[int]], num_tokens: int = 20) -> list[list[int]]:
    return generate(session, prompts, max_new_tokens=num_tokens, end_id=None).tokens


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_both_phases(name: str, fused: bool, packed: bool, dtype: str) -> None:
    model, build = MODELS[name], build_config(dtype, fused=fused, packed=packed)
    weights = random_weights(model, dtype)
    sessions = open_trt(model, build, weights), TorchSession(model, build, RANK, weights)
    prompts = random_prompts(LENGTHS, model.vocab_size)
    for session in sessions:
        session.start(len(prompts), max(LENGTHS) + NUM_STEPS)
    actual, expected = (session.context(prompts) for session in sessions)
    for step in range(NUM_STEPS + 1):
        assert relative_error(actual, expected) < BOUNDS[dtype], f"step {step}"
        chosen = expected.argmax(-1)
        if step < NUM_STEPS:
            actual, expected = (session.generation(chosen) for session in sessions)


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


class TestAddresses:
    model = MODELS["gpt2"]

    def test_cache_is_updated_in_place(self) -> None:
        build = build_config(fused=True)
        session = open_trt(self.model, build)
        seen: list[dict[str, int]] = []
        execute = session._context.execute_async_v3

        def record(stream: int) -> bool:
            seen.append(dict(session._context._addresses))
            return execute(stream)

        session._context.execute_async_v3 = record
        greedy(session, random_prompts((4, 2), self.model.vocab_size), 3)
        for addresses in seen:
            for layer in range(self.model.n_layer):
                for kind in ("key", "value"):
                    assert addresses[f"past_{kind}_{layer}"] == addresses[f"present_{kind}_{layer}"]
        # Generation keeps every address: a captured graph of the step would stay valid.
        assert len(seen) == 3
        assert seen[1] == seen[2]
        written = session._memory["past_key_0"].abs().sum((1, 3)) > 0  # [B, T]
        assert written.sum(1).tolist() == [4 + 2, 4]  # the shorter row: its padding, and its two later tokens over it

    def test_cache_elsewhere_is_refused(self) -> None:
        session = open_trt(self.model, build_config())
        session.start(1, 4)
        session.context([[1, 2]])
        elsewhere = torch.zeros_like(session._memory["past_key_0"])
        session._context.set_tensor_address("present_key_0", elsewhere.data_ptr())
        with pytest.raises(EngineError, match="not at the address of past_key_0"):
            session._run()

    def test_missing_address_and_shape(self) -> None:
        engine = stand_in_engine(self.model, build_config(), RANK, random_weights(self.model))
        context = EvaluatorContext(engine)
        context.error_recorder = trt_library.error_recorder(engine.trt)
        assert not context.execute_async_v3(0)
        assert "input_ids" in context.error_recorder.messages[0]
        assert not context.set_optimization_profile_async(2, 0)
        assert not context.set_tensor_address("nobody", 1)


class TestPlan:
    """What can be said about plans without a GPU to load them on."""

    model = MODELS["gpt2"]

    @pytest.fixture
    def plan(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.engine"
        build_plan(self.model, build_config(), RANK, random_weights(self.model), path)
        return path

    def test_needs_a_gpu(self, plan: Path) -> None:
        with pytest.raises(EngineError, match="needs an NVIDIA GPU") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cpu")
        assert "--backend torch" in str(caught.value)

    def test_unknown_library(self, plan: Path) -> None:
        with pytest.raises(EngineError, match="unknown library"):
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda", library="another")

    def test_hopper_is_named(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
        with pytest.raises(EngineError, match="do not load on this GPU") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda")
        assert "compute capability 9.0" in str(caught.value)

    def test_library_says_why_it_cannot_load(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trt_runtime, "_check_device", lambda trt, device: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        with pytest.raises(EngineError, match="cannot load") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda")
        assert "a plan built by the same version" in str(caught.value)

    def test_from_command_line_to_session(self, tmp_path: Path) -> None:
        flags = ["--vocab_size", "67", "--n_positions", "64", "--n_embd", "32", "--n_head", "2", "--n_layer", "1"]
        flags += ["--max_batch_size", "2", "--max_input_len", "8", "--max_output_len", "8", "--dtype", "float16"]
        flags += ["--target", "ampere", "ada", "--use_gpt_attention_plugin", "--log_level", "error"]
        build_script.run_build([*flags, "--output_dir", str(tmp_path)])
        info = open_engine(tmp_path)
        assert info.backend == "tensorrt"
        assert info.library["name"] == "tensorrt_rtx"
        with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
            load_session(info, "cpu")
