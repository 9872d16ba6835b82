"""The checks of the GPU group, over the stand-in: they pass, they fail where they should, and leave a whole report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_gpu_tensorrt
import trt_acceptance
from trt_acceptance import PLUGINS, Report, Weights, cases, check_buckets, check_limits, check_logits, check_speed
from trt_models import MODELS, RANK

from gpt.config import BuildConfig, ModelConfig
from gpt.engine.trt_stand_in import stand_in_engine
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt


def open_stand_in(model: ModelConfig, build: BuildConfig, weights: Weights) -> TrtSession:
    engine = stand_in_engine(model, build, RANK, weights)
    return TrtSession(engine, model, build, RANK, "cpu", engine.trt, capture=lambda phase: phase.context.captured())


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json", {"gpus": ["none"]})


def read(report: Report) -> dict[str, object]:
    content = json.loads(report.path.read_text())
    assert isinstance(content, dict)
    return content


def test_checks_pass_and_are_reported(report: Report) -> None:
    check_logits(report, open_stand_in, "multi_query", "fused packed", "bfloat16")
    check_logits(report, open_stand_in, "rotary_swiglu_grouped", PLUGINS, "float16")
    check_buckets(report, open_stand_in)
    check_limits(report, open_stand_in)
    check_speed(report, open_stand_in, replace(MODELS["gpt2"], n_positions=160), "float32", 2)
    content = read(report)
    assert content["passed"] is True
    rows = content["rows"]
    assert isinstance(rows, list)
    assert [row["check"] for row in rows] == ["logits", "logits", "buckets", "limits", *["speed"] * 3]
    assert len(rows[0]["errors"]) == 9


def test_a_failed_check_is_reported(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trt_acceptance.BOUNDS, "float16", 1e-9)
    with pytest.raises(AssertionError):
        check_logits(report, open_stand_in, "gpt2", "plain padded", "float16")
    assert read(report)["passed"] is False


def test_the_group_is_left_out_here() -> None:
    assert [mark.name for mark in test_gpu_tensorrt.pytestmark] == ["gpu", "tensorrt"]
    assert len(list(cases())) == 48


@pytest.mark.parametrize(
    ("marks", "code", "told"),
    [
        ("gpu", pytest.ExitCode.NO_TESTS_COLLECTED, "deselected"),
        ("gpu and tensorrt", pytest.ExitCode.USAGE_ERROR, "nothing of this group can run here: a TensorRT"),
        ("tensorrt", pytest.ExitCode.OK, "test_limits"),
    ],
)
def test_a_machine_that_cannot_run_it(marks: str, code: int, told: str) -> None:
    """Among the tests for GPUs it is left out; asked for, it ends with the first reason; or it is listed."""
    file = str(Path(test_gpu_tensorrt.__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", marks, file]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
