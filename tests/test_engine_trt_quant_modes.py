"""Quantised engines by build.py --backend tensorrt: the walked network beside the torch engine of the same flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import build_engine
from test_engine_quant import FAMILIES, INT8_BOUND, MODES, WEIGHT_ONLY_BOUND
from tiny_models import tiny_gpt2
from trt_matrix import record, record_refusal

import build
from gpt.engine.folder import EngineInfo
from gpt.engine.plan import Plan
from gpt.errors import ConfigError
from gpt.runtime.trace import compare_engines

pytestmark = pytest.mark.tensorrt

SIZES = [
    "--vocab_size",
    "71",
    "--n_positions",
    "48",
    "--n_embd",
    "64",
    "--n_head",
    "4",
    "--n_layer",
    "2",
    "--max_batch_size",
    "4",
    "--max_input_len",
    "12",
]
LIMITS = ["--max_output_len", "20", "--random_seed", "4"]
CACHE = ["--int8_kv_cache"]
# Random weights have deviations of 0.02, whose FP8 numbers differ from each other by up to a sixteenth.
BOUNDS = {"fp8": 2e-2, "smooth": INT8_BOUND, "int8": WEIGHT_ONLY_BOUND, "int4": WEIGHT_ONLY_BOUND}
# Inputs that differ by float16's 5e-4 go to another integer in one of a hundred cases, in each product anew.
HALF_BOUND = 2e-2
CASES = [
    *(("gpt2", mode, [], "float32") for mode in MODES),
    ("gpt2", "float", CACHE, "float32"),
    ("gpt2", "int8", [*CACHE, "--remove_input_padding", "--use_gpt_attention_plugin"], "float32"),
    ("gpt2", "smooth both", [*CACHE, "--batch_buckets", "2"], "float16"),
    ("gpt-next", "int4 groups", [*CACHE, "--remove_input_padding"], "float32"),
    ("gpt-next", "smooth both", CACHE, "float32"),
    ("multi-query", "smooth token", CACHE, "float32"),
]


def pair(tmp_path: Path, checkpoint: Path | None, *flags: str) -> tuple[EngineInfo, EngineInfo]:
    """The TensorRT engine and the torch engine of the same flags."""
    return (
        build_engine(checkpoint, tmp_path / "trt", *flags, "--backend", "tensorrt"),
        build_engine(checkpoint, tmp_path / "torch", *flags),
    )


@pytest.mark.parametrize(("family", "mode", "more", "dtype"), CASES)
def test_networks_compute_what_torch_engines_do(
    family: str, mode: str, more: list[str], dtype: str, tmp_path: Path
) -> None:
    """Every named tensor of the prompts' step and of two generation steps."""
    flags = [*SIZES, *LIMITS, *FAMILIES[family], *MODES.get(mode, []), *more, "--dtype", dtype]
    plan, reference = pair(tmp_path, None, *flags)
    assert plan.engine_path(0).stat().st_size > 0
    assert plan.build.quant == reference.build.quant
    bound = HALF_BOUND if dtype == "float16" else INT8_BOUND if CACHE[0] in more else BOUNDS[mode.split()[0]]
    comparison = compare_engines(plan, reference, bound=bound)
    assert comparison.first is None, list(comparison.lines())
    record(family, plan.build, built="default", error=max(one.error for one in comparison.differences))


def test_the_mode_matters(tmp_path: Path) -> None:
    """A network that ignored the flags would be as near to the float engine as it is to the quantised one."""
    flags = [*SIZES, *LIMITS, *FAMILIES["gpt2"], "--dtype", "float32"]
    reference = build_engine(None, tmp_path / "float", *flags)
    plan = build_engine(None, tmp_path / "trt", *flags, *MODES["int8"], *CACHE, "--backend", "tensorrt")
    assert compare_engines(plan, reference, bound=WEIGHT_ONLY_BOUND).first is not None


def test_a_calibrated_checkpoint_with_smoothers(tmp_path: Path) -> None:
    import hf_gpt_convert

    texts = tmp_path / "texts.txt"
    texts.write_text("The quick brown fox.\n\nthe hen and the rat in the inn on her heath\n\nA tin hat\n")
    model = tiny_gpt2(tmp_path / "hf", n_embd=64)
    calibration = ["-sq", "0.5", "--smooth-dense-proj", "--calib-data", str(texts), "-p", "1"]
    assert hf_gpt_convert.main(["-i", str(model), "-o", str(tmp_path), *calibration]) == 0
    limits = ["--max_batch_size", "2", "--max_input_len", "12", "--max_output_len", "8", "--dtype", "float32"]
    flags = ["--use_smooth_quant", "--per_channel", *CACHE, *limits]
    plan, reference = pair(tmp_path, tmp_path / "1-gpu", *flags)
    assert plan.build.quant.smoothers
    comparison = compare_engines(plan, reference, bound=INT8_BOUND)
    assert comparison.first is None, list(comparison.lines())
    record("gpt2, calibrated", plan.build, built="default", error=max(one.error for one in comparison.differences))


@pytest.mark.parametrize(
    ("mode", "target", "reason"),
    [("int4", "turing", "they begin with SM80 (ampere)"), ("fp8", "ampere", "they begin with SM89 (ada)")],
)
def test_targets_that_cannot_are_refused(mode: str, target: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        build.run_build([*SIZES, *LIMITS, *MODES[mode], "--target", target, "--output_dir", str(tmp_path / "out")])
    assert reason in str(raised.value)
    assert not (tmp_path / "out").exists()
    record_refusal(raised.value)


@pytest.mark.parametrize(("mode", "target"), [("int8", "turing"), ("smooth both", "turing"), ("fp8", "ada")])
def test_targets_that_can(mode: str, target: str, tmp_path: Path) -> None:
    cache = CACHE if target == "turing" else []
    flags = [*SIZES, *LIMITS, *MODES[mode], *cache, "--target", target, "blackwell", "--dtype", "float16"]
    plan = build_engine(None, tmp_path / "trt", *flags)
    record("gpt2", plan.build, built=f"{target} blackwell")


def test_a_quantised_cache_is_counted_twice(tmp_path: Path) -> None:
    """Its steps go to and fro between two."""
    flags = [*SIZES, *LIMITS, *CACHE, "--dtype", "float16"]
    plan, reference = pair(tmp_path, None, *flags)
    needed = [Plan.make(info.model, info.build).needed.kv_cache for info in (plan, reference)]
    assert needed[0] == 2 * needed[1]
