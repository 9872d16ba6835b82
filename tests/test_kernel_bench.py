"""benchmarks/bench_kernels.py: what its rows count; on a GPU, that every case runs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_kernels


def test_bytes_and_operations() -> None:
    cases = {case.kernel: case for case in bench_kernels.weight_products("gpt2-medium", "fc1", 8)}
    weights, vectors = 4096 * 1024, 2 * 8 * (4096 + 1024)
    assert {case.operations for case in cases.values()} == {2 * 8 * weights}
    assert cases["skinny float16"].num_bytes == cases["torch float16"].num_bytes == 2 * weights + vectors
    assert cases["skinny int8"].num_bytes == weights + 2 * 4096 + vectors
    assert cases["skinny int4"].num_bytes == weights // 2 + 2 * 4096 * 16 + vectors
    widening = {case.kernel: case.num_bytes for case in bench_kernels.widening_cases("gpt2-medium", "fc1")}
    assert widening == {"widen int8": 3 * weights + 2 * 4096, "widen int4": weights // 2 * 5 + 2 * 4096 * 16}


def test_every_kernel_at_every_size() -> None:
    cases = list(bench_kernels.all_cases(["gpt2-xl"], ["fc2"], [1, 8]))
    assert len({(case.kernel, case.shape, case.num_tokens) for case in cases}) == len(cases)
    found = {(case.kernel, case.num_tokens) for case in cases}
    for batch_size, kind in ((1, "gemv"), (8, "skinny")):
        kernels = [f"{kind} {name}" for name in ("float16", "int8", "int4")]
        kernels += ["torch float16", "w8a8", "add_norm", "quantize_rows", "attention"]
        kernels += ["cached_attention", "paged_attention", "torch attention"]
        assert {(kernel, batch_size) for kernel in kernels} <= found
    assert {("widen int8", 0), ("widen int4", 0)} <= found


def test_no_gpu_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "gpt2-medium", "--product", "fc1", "--batch_size", "1", "--csv", str(tmp_path / "x.csv")]
    assert bench_kernels.main(flags) == 0
    assert "all cases measured" in capsys.readouterr().out
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert all(float(row["us"]) > 0 for row in csv.DictReader(file))
