"""What the options of build.py become in TensorRT's builder, and what is refused or said to do nothing."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trt_matrix import record, record_refusal
from trt_models import MODELS, RANK, build_config, define, random_weights

import build as build_script
from gpt.engine import trt_check, trt_library
from gpt.engine.estimate import check_room, estimate
from gpt.engine.folder import open_engine
from gpt.engine.trt_builder import NetworkBuild, build_plan, read_timing_cache, write_timing_cache
from gpt.engine.trt_check import check_build
from gpt.engine.trt_weights import weights_in_file
from gpt.errors import ConfigError, EngineError, GptError
from gpt.runtime import trt_session

pytestmark = pytest.mark.tensorrt

MODEL = MODELS["gpt2"]
SIZES = ["--vocab_size", "67", "--n_positions", "64", "--n_embd", "32", "--n_head", "2", "--n_layer", "1"]
LIMITS = ["--max_batch_size", "4", "--max_input_len", "8", "--max_output_len", "8", "--dtype", "float16"]


def config_of(**options: Any) -> tuple[Any, Any]:
    """The builder configuration of a network, and what keeps it alive."""
    network = define(trt_library.load(), MODEL, build_config(**options))
    return network._config(), network


def test_flags() -> None:
    config, network = config_of(
        builder_opt=1, profiling_verbosity="detailed", weight_streaming=True, refit=True, batch_buckets=(1, 2)
    )
    flags = network.trt.BuilderFlag
    assert config.builder_optimization_level == 1
    assert config.profiling_verbosity == network.trt.ProfilingVerbosity.DETAILED
    assert config.get_flag(flags.WEIGHT_STREAMING)
    assert config.get_flag(flags.REFIT)
    assert config.num_optimization_profiles == 4
    plain, other = config_of()
    assert not plain.get_flag(flags.WEIGHT_STREAMING)
    assert not plain.get_flag(flags.REFIT)
    assert not plain.get_flag(flags.TF32)  # types are as written, float32 too
    assert network.network.get_flag(network.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert plain.num_optimization_profiles == 2
    del other


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_buckets_and_streaming_build(packed: bool) -> None:
    options = {"batch_buckets": (1, 2), "max_prompt_embedding_table_size": 6, "weight_streaming": True}
    build = build_config("float16", fused=True, packed=packed, profiling_verbosity="none", **options)
    plan = io.BytesIO()
    define(trt_library.load(), MODEL, build).write_plan(plan)
    assert plan.tell() > 0
    record("gpt2", build, built="default", options="weight streaming")


def test_timing_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library without one has the calls, which is enough to run them."""
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
    path = tmp_path / "model.cache"
    config, network = config_of()
    with caplog.at_level("INFO", logger="gpt"), pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
        read_timing_cache(config, path)
    assert "is new" in caplog.text
    with pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
        write_timing_cache(config, path)
    assert path.is_file()
    monkeypatch.setattr("gpt.engine.trt_builder.TENSORRT_RTX", "another")
    other = define(network.trt, MODEL, build_config(timing_cache=str(path)))
    path.unlink()
    with pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
        other.write_plan(io.BytesIO())
    assert path.is_file()
    elsewhere = define(network.trt, MODEL, build_config(timing_cache=str(tmp_path / "nowhere" / "model.cache")))
    plan = io.BytesIO()
    with (
        caplog.at_level("INFO", logger="gpt"),
        pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"),
    ):
        elsewhere.write_plan(plan)
    assert plan.tell() > 0
    assert "Timing cache: not written" in caplog.text


def test_streaming_keeps_what_the_library_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
    engine = SimpleNamespace(get_weight_streaming_automatic_budget=lambda: 3 << 20, streamable_weights_size=8 << 20)
    with caplog.at_level("INFO", logger="gpt"):
        trt_session._stream_weights(engine)
    assert engine.weight_streaming_budget_v2 == 3 << 20
    assert "3 of 8 MiB stay on the GPU" in caplog.text


def test_a_refused_budget_is_told() -> None:
    """The library's setter raises nothing."""

    class Engine:
        weight_streaming_budget_v2 = property(lambda self: 0, lambda self, budget: None)

        def get_weight_streaming_automatic_budget(self) -> int:
            return 3 << 20

    with pytest.raises(EngineError, match="refused its own weight streaming budget"):
        trt_session._stream_weights(Engine())


class TestRefusals:
    def test_refit_without_a_gpu(self) -> None:
        with pytest.raises(ConfigError, match="on a machine with a GPU only") as refused:
            check_build(MODEL, build_config(refit=True))
        record_refusal(refused.value)
        with pytest.raises(EngineError) as caught:  # and so it is
            define(trt_library.load(), MODEL, build_config(refit=True)).write_plan(io.BytesIO())
        assert "found" in str(caught.value)

    def test_too_many_profiles(self) -> None:
        with pytest.raises(ConfigError, match=f"9 profiles, allowed: {trt_check.MOST_PROFILES}") as refused:
            check_build(MODEL, build_config(max_batch_size=64, batch_buckets=(1, 2, 3, 4, 5, 6, 7)))
        record_refusal(refused.value)

    def test_buckets_outside_the_limits(self) -> None:
        with pytest.raises(ConfigError, match="batch_buckets: found 2 9, allowed: 1 to max_batch_size 4"):
            build_config(batch_buckets=(2, 9))

    def test_strip_plan(self) -> None:
        with pytest.raises(ConfigError, match=r"run\.py cannot put the weights back"):
            build_script.run_build([*SIZES, *LIMITS, "--target", "ada", "--strip_plan"])

    def test_builder_that_gives_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No exception, no message but what the recorder got: that is shown."""
        network = define(trt_library.load(), MODEL, build_config())

        class Builder:
            def __getattr__(self, name: str) -> Any:
                return getattr(network_builder, name)

            def build_serialized_network_to_stream(self, *_: object) -> bool:
                network.recorder.report_error(network.trt.ErrorCodeTRT.INTERNAL_ERROR, "the tactic has no\n  memory")
                return False

        network_builder, network.builder = network.builder, Builder()
        with pytest.raises(EngineError, match="could not build the engine") as caught:
            network.write_plan(io.BytesIO())
        assert "the tactic has no memory" in str(caught.value)
        assert "--log_level verbose" in str(caught.value)

    @pytest.mark.parametrize(
        ("call", "what"), [("create_network", "a network"), ("create_builder_config", "a configuration")]
    )
    def test_builder_that_makes_nothing(self, call: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        trt = trt_library.load()

        def nothing(builder: Any, *_: object) -> None:
            builder.error_recorder.report_error(trt.ErrorCodeTRT.INTERNAL_ERROR, "there is no memory")

        monkeypatch.setattr(trt.Builder, call, nothing)
        with pytest.raises(EngineError, match=f"could not begin {what}") as caught:
            NetworkBuild(trt, MODEL, build_config(), RANK, random_weights(MODEL)).write_plan(io.BytesIO())
        assert "there is no memory" in str(caught.value)

    @pytest.mark.parametrize("kind", ["Builder", "Runtime"])
    def test_library_that_cannot_begin(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As it fails where the driver is too old: its classes' constructors return nothing."""

        def nothing(log: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        trt = trt_library.load()
        monkeypatch.setattr(trt, kind, nothing)
        with pytest.raises(EngineError, match="cannot begin on this machine") as caught:
            trt_library.begin_library(trt, kind)
        for part in (trt.__version__, "factory function returned nullptr", "--log_level verbose", "driver"):
            assert part in str(caught.value)


class TestNotes:
    @pytest.mark.parametrize(
        ("capability", "targets", "loads"),
        [((9, 0), (), False), ((10, 0), ("default",), False), ((8, 6), ("ada",), False), ((8, 9), ("ada",), True)],
    )
    def test_of_a_gpu_that_cannot_load_what_it_builds(
        self, capability: tuple[int, int], targets: tuple[str, ...], loads: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trt_check, "_gpu_capability", lambda: capability)
        notes = "\n".join(check_build(MODEL, build_config("float16", targets=targets)))
        here = f"This machine's GPU (compute capability {capability[0]}.{capability[1]}) cannot load this engine"
        assert (here in notes) == (not loads)

    def test_of_tensorrt(self) -> None:
        notes = "\n".join(check_build(MODEL, build_config(timing_cache="model.cache", batch_buckets=(1, 2))))
        assert "Timing cache: TensorRT-RTX has none" in notes
        assert "compiled for batches of 1, 2, 4" in notes

    def test_of_torch(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        flags = ["--timing_cache", "x", "--batch_buckets", "1", "--profiling_verbosity", "none", "--weight_streaming"]
        flags += ["--refit", "--strongly_typed", "--random_seed", "1", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
        caplog.set_level("INFO", logger="gpt")
        build_script.run_build([*SIZES, *LIMITS, *flags])
        said = {record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()}
        for flag in (flag for flag in flags[: flags.index("--random_seed")] if flag.startswith("--")):
            assert sum(line.startswith(flag) for line in said) == 1, flag


def test_dry_run_knows_that_a_plan_holds_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for target, made_at_load in (([], True), (["--target", "ada"], False)):
        build_script.run_build([*SIZES, *LIMITS, *target, "--random_seed", "1", "--dry_run"])
        assert ("made when it is loaded" in capsys.readouterr().out) == made_at_load


def test_options_travel_with_the_engine(tmp_path: Path) -> None:
    flags = ["--batch_buckets", "2", "1", "--profiling_verbosity", "detailed", "--weight_streaming", "--strongly_typed"]
    build_script.run_build([*SIZES, *LIMITS, *flags, "--target", "ada", "--output_dir", str(tmp_path)])
    build = open_engine(tmp_path).build
    assert build.generation_batches == (1, 2, 4)
    assert (build.batch_buckets, build.profiling_verbosity, build.weight_streaming) == ((2, 1), "detailed", True)


class TestWeightsInFile:
    def test_are_the_weights(self, tmp_path: Path) -> None:
        weights = {
            "a": torch.arange(5, dtype=torch.int8),
            "b": torch.randn(3, 7),
            "c": torch.randn(4).bfloat16(),
            "d": torch.tensor(0.5),
        }
        with weights_in_file(tmp_path / "w", iter(weights.items())) as mapped, mapped.releasing_memory():
            for _ in range(2):
                for name, expected in weights.items():
                    found = mapped.tensors[name]
                    assert found.dtype == expected.dtype
                    assert torch.equal(found, expected)
                    assert found.data_ptr() % 64 == 0
                mapped._pages.madvise(4)  # type: ignore[union-attr]  # gone, and back when they are asked for
        assert not list(tmp_path.iterdir())

    def test_nothing_is_left_of_a_failed_build(self, tmp_path: Path) -> None:
        def broken() -> Any:
            yield "model.wte", torch.zeros(3)
            raise OSError("No space left on device")

        with pytest.raises(OSError, match="No space left"):
            build_plan(MODEL, build_config(), RANK, broken(), tmp_path / "a.engine")
        assert not list(tmp_path.iterdir())

    def test_the_disk_has_to_hold_it_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = estimate(MODEL, build_config(), RANK)
        assert needed.temporary_file == sum(tensor.nbytes for tensor in random_weights(MODEL).values())
        free = needed.engine_file + needed.temporary_file
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        check_room(needed, tmp_path)
        free -= 1
        with pytest.raises(GptError, match="does not fit"):
            check_room(needed, tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        with weights_in_file(tmp_path / "w", ()) as mapped, mapped.releasing_memory():
            assert mapped.tensors == {}
