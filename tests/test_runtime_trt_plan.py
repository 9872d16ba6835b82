"""Plans of TensorRT on a machine without a GPU that loads them: what is said of them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from trt_models import MODELS, RANK, build_config, random_weights

import build as build_script
from gpt.engine import trt_library
from gpt.engine.folder import open_engine
from gpt.engine.trt_builder import build_plan
from gpt.errors import ConfigError, EngineError
from gpt.runtime.load import load_session
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt

RTX = {"name": "tensorrt_rtx", "version": trt_library.load().__version__}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A card")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


class TestPlan:
    """What can be said about plans without a GPU to load them on."""

    model = MODELS["gpt2"]

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("plan") / "a.engine"
        build_plan(cls.model, build_config(), RANK, random_weights(cls.model).items(), path)
        return path

    def test_needs_a_gpu(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which is said before a library that is missing: to install it would not help."""
        monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
        with pytest.raises(EngineError, match="needs an NVIDIA GPU") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cpu", library=RTX)
        assert "--backend torch" in str(caught.value)

    def test_unknown_library(self, plan: Path) -> None:
        with pytest.raises(EngineError, match="unknown library"):
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda", library={"name": "another"})

    @pytest.mark.parametrize(
        ("capability", "targets", "expected"),
        [
            ((9, 0), (), "SM89: GeForce RTX 40"),
            ((10, 0), ("default",), "SM120: GeForce RTX 50"),
            ((8, 9), ("ampere",), "SM86: GeForce RTX 30"),
        ],
        ids=["hopper", "blackwell of data centres", "built for others"],
    )
    def test_other_cards_are_named(
        self,
        capability: tuple[int, int],
        targets: tuple[str, ...],
        expected: str,
        plan: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pretend_gpu(monkeypatch, capability)
        build = build_config(targets=targets)
        with pytest.raises(EngineError, match="does not load on this GPU") as caught:
            TrtSession.from_plan(plan, self.model, build, RANK, "cuda", library=RTX)
        for part in (f"A card, compute capability {capability[0]}.{capability[1]}", expected, "--backend torch"):
            assert part in str(caught.value)
        assert ("SM89" in str(caught.value)) == (targets != ("ampere",))

    def test_another_version(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_gpu(monkeypatch, (8, 9))
        with pytest.raises(EngineError, match="another version of tensorrt_rtx") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda", library={**RTX, "version": "1.0.0"})
        assert f"built by 1.0.0, installed is {RTX['version']}" in str(caught.value)

    def test_missing_library(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_gpu(monkeypatch, (9, 0))
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(ConfigError, match="tensorrt is not installed") as caught:
            TrtSession.from_plan(
                plan, self.model, build_config(), RANK, "cuda", library={"name": "tensorrt", "version": "11.4.0.106"}
            )
        assert "pip install -r requirements-tensorrt.txt" in str(caught.value)

    def test_built_on_another_gpu(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """TensorRT itself builds for the GPU it builds on."""
        library = {"name": "tensorrt", "version": "11.4.0.106", "compute_capability": "8.0"}
        pretend_gpu(monkeypatch, (9, 0))
        with pytest.raises(EngineError, match="does not load on this GPU") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda", library=library)
        assert "compute capability 8.0, where it was built" in str(caught.value)

    @pytest.mark.parametrize("num_bytes", [0, 40, 100_000])
    def test_cut_short(self, num_bytes: int, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        short = tmp_path / "a.engine"
        short.write_bytes(plan.read_bytes()[:num_bytes])
        pretend_gpu(monkeypatch, (8, 9))
        with pytest.raises(EngineError, match="cannot load") as caught:
            TrtSession.from_plan(short, self.model, build_config(), RANK, "cuda", library=RTX)
        assert "a whole plan" in str(caught.value)
        assert "check.py" in str(caught.value)

    def test_library_says_why_it_cannot_load(self, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_gpu(monkeypatch, (8, 9))
        with pytest.raises(EngineError, match="cannot load") as caught:
            TrtSession.from_plan(plan, self.model, build_config(), RANK, "cuda", library=RTX)
        assert "built by the same version" in str(caught.value)

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
