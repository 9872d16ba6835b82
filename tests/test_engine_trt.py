"""The TensorRT network: really built, and evaluated layer by layer beside the PyTorch executor."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import relative_error
from trt_matrix import record, record_refusal
from trt_models import IDS, MODELS, RANK, build_config, define, evaluate, random_weights

from gpt import console
from gpt.engine import trt_builder, trt_library
from gpt.engine.trt_builder import build_plan
from gpt.engine.trt_check import check_build, estimate_build_bytes
from gpt.engine.trt_layers import Layers
from gpt.errors import ConfigError, EngineError
from gpt.runtime.torch_session import TorchSession

pytestmark = pytest.mark.tensorrt

FP32_BOUND = 1e-5


@pytest.fixture
def trt() -> Any:
    return trt_library.load()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_every_named_tensor_is_the_torch_executors(name: str, fused: bool, trt: Any) -> None:
    model, build = MODELS[name], build_config(fused=fused)
    session = TorchSession(model, build, RANK, random_weights(model))
    session.ops.trace = {}
    session.start(len(IDS), IDS.shape[1])
    session.context(IDS.tolist())
    values = evaluate(define(trt, model, build), model)
    assert len(session.ops.trace) == 3 + 3 * model.n_layer
    for tensor_name, expected in session.ops.trace.items():
        assert relative_error(values[tensor_name].reshape(expected.shape), expected) < FP32_BOUND, tensor_name


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("target", ["default", "turing", "ampere", "ada", "blackwell"])
def test_builds_for_target(target: str, fused: bool, tmp_path: Path) -> None:
    model, build = MODELS["gpt2"], build_config("float16", fused=fused, packed=True, targets=(target,))
    check_build(model, build)
    build_plan(model, build, RANK, random_weights(model, "float16").items(), tmp_path / "a.engine")
    record("gpt2", build, built=target)
    assert (tmp_path / "a.engine").stat().st_size > sum(t.nbytes for t in random_weights(model, "float16").values())
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_builds_every_model_and_dtype(name: str, dtype: str, trt: Any) -> None:
    every_card = ("ampere", "ada", "blackwell")
    layouts = ((False, False, every_card), (True, True, every_card), (False, True, ()), (True, False, ()))
    for fused, packed, targets in layouts:
        build = build_config(dtype, fused=fused, packed=packed, targets=targets, builder_opt=2)
        plan = io.BytesIO()
        define(trt, MODELS[name], build).write_plan(plan)
        assert plan.tell() > 0
        record(name, build, built=" ".join(targets) or "default")


@pytest.mark.parametrize("activation", ["relu", "squared_relu", "quick_gelu", "silu", "tanh", "sigmoid", "geglu"])
def test_activations(activation: str, trt: Any) -> None:
    model, build = replace(MODELS["gpt2"], hidden_act=activation), build_config()
    session = TorchSession(model, build, RANK, random_weights(model))
    session.start(len(IDS), IDS.shape[1])
    expected = session.context(IDS.tolist())
    values = evaluate(define(trt, model, build), model)
    assert relative_error(values["logits"][:, : model.vocab_size], expected) < FP32_BOUND


class TestLayers:
    """What the library lets pass in silence ends here."""

    @pytest.fixture
    def layers(self, trt: Any) -> Layers:
        recorder = trt_library.error_recorder(trt)
        self.builder = trt.Builder(trt_library.logger(trt))
        network = self.builder.create_network(0)
        network.error_recorder = recorder
        return Layers(trt, network, recorder)

    def test_operands_of_different_types(self, layers: Layers) -> None:
        a = layers.input("a", "float32", (-1, 8))
        with pytest.raises(EngineError, match="matrix product"):
            layers.matmul(a, layers.constant(torch.zeros(8, 8, dtype=torch.float16)))

    def test_name_in_use(self, layers: Layers) -> None:
        layers.input("a", "float32", (-1, 8))
        b = layers.input("b", "float32", (-1, 8))
        with pytest.raises(EngineError, match="named a"):
            layers.name(layers.activation(b, "RELU"), "a")

    def test_refused_rotation(self, layers: Layers) -> None:
        x = layers.input("x", "float32", (-1, 2, -1, 8))
        table = layers.constant(torch.zeros(4, 2))
        positions = layers.input("positions", "int32", (-1, -1))
        with pytest.raises(EngineError, match="rotary embedding"):
            layers.rotary(x, table, table, positions, 3)

    def test_refused_mask(self, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = (layers.input(name, "float16", (-1, 2, size, 16)) for name, size in (("q", -1), ("k", 8), ("v", 8)))
        mask = layers.input("mask", "bool", (-1, 1, -1, 8))
        # On a causal attention the library keeps no mask, and says nothing but a log line.
        monkeypatch.setattr(layers.trt.CausalMaskKind, "NONE", layers.trt.CausalMaskKind.LOWER_RIGHT)
        with pytest.raises(EngineError, match="did not take its mask"):
            layers.attention(q, k, v, mask)

    def test_equal_memory_is_one_constant(self, layers: Layers) -> None:
        table = torch.zeros(4, 8)
        assert layers.constant(table).name == layers.constant(table).name
        assert layers.constant(table).name != layers.constant(table, (1, 4, 8)).name


class TestBuildFails:
    model = MODELS["gpt2"]

    def test_library_messages_are_shown(self, tmp_path: Path) -> None:
        build = build_config("bfloat16", targets=("turing",))
        with pytest.raises(EngineError) as caught:
            build_plan(self.model, build, RANK, random_weights(self.model, "bfloat16").items(), tmp_path / "a.engine")
        assert "sm75" in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_refused_head_size_really_fails(self, trt: Any) -> None:
        model = replace(self.model, n_embd=36)
        with pytest.raises(ConfigError, match="head size 12") as caught:
            check_build(model, build_config("float16", fused=True))
        record_refusal(caught.value)
        with pytest.raises(EngineError):
            define(trt, model, build_config("float16", fused=True)).write_plan(io.BytesIO())
        define(trt, model, build_config("float16")).write_plan(io.BytesIO())

    def test_full_disk(self, trt: Any) -> None:
        class FullDisk(io.BytesIO):
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            define(trt, self.model, build_config()).write_plan(FullDisk())

    def test_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class ImpatientBar:
            num_steps = 0

            def __enter__(self) -> ImpatientBar:
                return self

            def __exit__(self, *error: object) -> None: ...

            def update(self) -> None:
                ImpatientBar.num_steps += 1
                signal.raise_signal(signal.SIGINT)

            def reset(self, total: int) -> None: ...

            def set_description_str(self, text: str) -> None: ...

            def refresh(self) -> None: ...

        monkeypatch.setattr(trt_builder, "progress", lambda **options: ImpatientBar())
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            build_plan(self.model, build_config(), RANK, random_weights(self.model).items(), tmp_path / "a.engine")
        assert ImpatientBar.num_steps <= 2  # of several hundred
        assert not list(tmp_path.iterdir())
        assert signal.getsignal(signal.SIGINT) is before


def test_a_bar_is_named_after_its_phase(trt: Any) -> None:
    """A colon is between the name and what is done of it, and no second one."""
    console.setup_logging("info")
    with console.progress(what="TensorRT", unit="step") as bar:
        trt_builder._progress_monitor(trt, bar, threading.Event()).phase_start("Fusing", None, 2)
        assert str(bar).startswith("TensorRT: Fusing: 0 of 2, ")


class TestCheckBuild:
    model = MODELS["gpt2"]

    def test_all_problems_at_once(self) -> None:
        build = build_config("float32", targets=("ada", "turing"), builder_opt=9, max_batch_size=2**30)
        with pytest.raises(ConfigError) as caught:
            check_build(self.model, build)
        record_refusal(caught.value)
        for part in ("SM75", "builder_opt 9", f"max_batch_size {2**30}"):
            assert part in str(caught.value)

    def test_unknown_target(self) -> None:
        with pytest.raises(ConfigError, match="hopper") as caught:
            check_build(self.model, build_config(targets=("ampere", "hopper")))
        assert "requirements-tensorrt.txt" in str(caught.value)
        record_refusal(caught.value)
        assert "blackwell" in str(caught.value)

    def test_refused_targets_really_fail(self, trt: Any) -> None:
        with pytest.raises(EngineError):
            define(trt, self.model, build_config("float32", targets=("turing",))).write_plan(io.BytesIO())

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, "float32 softmax"),
            ({"fused": True}, "no fused kernel for float32"),
            ({"dtype": "float16", "fused": True}, "fused IAttention"),
            ({"dtype": "float16", "context_fmha": 1}, "fused IAttention"),
            ({"context_fmha": 2}, "chooses its accumulation itself"),
            ({"gemm_plugin": "float32"}, "the library's own layers do gemm"),
            ({"layernorm_plugin": "float32"}, "the library's own layers do layernorm"),
            ({"lookup_plugin": "float32"}, "the library's own layers do lookup"),
            ({"packed": True}, "Remove Padding Enabled"),
        ],
    )
    def test_notes_say_what_was_selected(self, options: dict[str, Any], expected: str) -> None:
        assert any(expected in note for note in check_build(self.model, build_config(**options)))

    def test_the_library_and_its_cards_are_named(self, trt: Any) -> None:
        for targets, cards in (((), "its own choice of cards"), (("ada", "SM86"), "SM89, SM86")):
            note = check_build(self.model, build_config("float16", targets=targets))[0]
            assert note == f"Library: tensorrt_rtx {trt.__version__}, for {cards}"

    def test_plugin_of_another_dtype(self) -> None:
        notes = check_build(self.model, replace(build_config("float16"), gpt_attention_plugin="float32"))
        assert any("float32 asked for, the engine's float16 selected" in note for note in notes)

    def test_estimate_is_above_what_was_measured(self) -> None:
        measured = {237: 1045, 677: 1444, 2971: 4031}  # MiB of weights -> MiB at the peak
        for weights, peak in measured.items():
            assert peak <= estimate_build_bytes(weights * 2**20) / 2**20 <= 1.25 * peak


class TestLibrary:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tensorrt", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError) as caught:
            trt_library.load()
        for part in ("pip install -r requirements.txt", "pip install -r requirements-tensorrt.txt", "--backend torch"):
            assert part in str(caught.value)
        with pytest.raises(ConfigError, match="not installed"):
            check_build(MODELS["gpt2"], build_config())

    def test_one_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It would be found out by an attribute that is missing, or build networks of other types."""
        old = types.SimpleNamespace(__name__="tensorrt", __version__="10.16.1.11")
        monkeypatch.setitem(sys.modules, "tensorrt", old)
        with pytest.raises(ConfigError, match="tensorrt is not installed") as caught:
            trt_library.load([trt_library.TENSORRT])
        assert "found version 10.16.1.11, allowed: 11.0 or newer" in str(caught.value)

    def test_why_another_one_is_taken(
        self, trt: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        console.setup_logging("verbose")
        assert trt_library.load([trt_library.TENSORRT, trt_library.TENSORRT_RTX]) is trt
        assert "Not used: tensorrt: import of tensorrt halted" in capsys.readouterr().err

    def test_info(self, trt: Any) -> None:
        assert trt_library.library_info() == {"name": "tensorrt_rtx", "version": trt.__version__}
