"""benchmarks/bench_gpu.py on a CPU with tiny models: it runs, its rows are right, its formulas count what they say."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_gpu
import bench_modes
import gpu_peers
from common import append_csv
from gpu_cases import CASES, Shape, build_flags, prefill_flops, step_bytes
from gpu_load import STAGES
from gpu_measure import KernelTime, Timing, measure, profile_step, worst_margin
from gpu_rows import COLUMNS
from gpu_systems import HfEager, HfStatic, Ours, Setup

import build
from gpt.engine.folder import open_engine
from gpt.mapping import Mapping
from gpt.runtime.load import load_torch_weights, pick_device

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--dtype", "float32", "--input_len", "8", "--output_len", "6", "--repeat", "2"]
SMALL += ["--throughput_shape", "2", "8", "4", "--prefill_shape", "2", "80"]
SHAPE = Shape(3, 8, 6)


@dataclass(frozen=True)
class Result:
    output: str
    rows: list[dict[str, str]]
    kernels: list[dict[str, str]]
    folder: Path


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Everything, on both tiny models, as a user starts it."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--csv", str(folder / "gpu.csv"), "--profile_csv", str(folder / "kernels.csv")]
    command = [sys.executable, "benchmarks/bench_gpu.py", *SMALL, *files, "--case", "tiny", "tiny-mq"]
    command += ["--system", "ours", "hf_static", "hf_eager", "vllm"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return Result(run.stdout, read_rows(folder / "gpu.csv"), read_rows(folder / "kernels.csv"), folder)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_setup(folder: Path, case: str) -> Setup:
    flags = build_flags(CASES[case], "float32", 1, [SHAPE])
    build.run_build([*flags, "--output_dir", str(folder), "--log_level", "error"])
    return Setup(open_engine(folder), "cpu", folder)


def test_one_row_for_everything_that_was_asked_for(result: Result) -> None:
    found = {(row["kind"], row["case"], row["batch_size"], row["system"]) for row in result.rows}
    expected = set()
    for case in ("tiny", "tiny-mq"):
        for system in ("ours", "hf_static", "hf_eager"):
            expected |= {
                ("decode", case, "1", system),
                ("decode", case, "3", system),
                ("throughput", case, "2", system),
            }
        expected |= {("prefill", case, "2", "ours"), ("prefill", case, "2", "hf_eager"), ("load", case, "1", "ours")}
    assert found == expected
    assert len(result.rows) == len(expected)
    assert "vllm: not installed, left out" in result.output
    assert "0 failed, 0 left out" in result.output


def test_columns_say_what_they_should(result: Result) -> None:
    assert list(result.rows[0]) == ["date", *COLUMNS, "command"]
    for row in result.rows:
        assert row["device"]
        # A package's metadata may leave out what its build is called, as in 2.13.0+cu130.
        assert "torch " + torch.__version__.partition("+")[0] in row["versions"]
        if row["kind"] == "load":
            assert float(row["load_s_min"]) <= float(row["load_s"]) <= float(row["load_s_max"])
            stages = [float(row[f"load_{name}_s"]) for name in STAGES]
            assert 0 < sum(stages) < 10 * float(row["load_s_max"])
            assert float(row["load_torch_s"]) > float(row["load_weights_s"])  # of a tiny model
            continue
        assert float(row["first_token_ms_min"]) <= float(row["first_token_ms"]) <= float(row["first_token_ms_max"])
        assert (row["token_ms"] == "") == (row["kind"] == "prefill")
        if row["token_ms"]:
            token_ms, copy = float(row["token_ms"]), float(row["copy_gb_per_s"])
            assert 0 < float(row["token_ms_min"]) <= token_ms <= float(row["token_ms_max"])
            # Printed with four digits behind the point, and a copy's speed with one.
            assert float(row["limit_ms"]) == pytest.approx(int(row["step_bytes"]) / copy / 1e6, rel=0.1, abs=1e-4)


def test_same_ids_as_transformers(result: Result) -> None:
    peers = [row for row in result.rows if row["system"] != "ours"]
    assert {row["rows_like_ours"] for row in peers} == {"1/1", "2/2", "3/3"}
    assert all(row["rows_like_ours"][0] == row["batch_size"] for row in peers)


def test_kernels_of_a_step(result: Result) -> None:
    for kind, case in product(("profile", "prompt_profile"), ("tiny", "tiny-mq")):
        mine = [row for row in result.kernels if (row["kind"], row["case"]) == (kind, case)]
        assert sum(float(row["share"]) for row in mine) == pytest.approx(1.0, abs=1e-2)
        times = [float(row["us_per_step"]) for row in mine]
        assert times == sorted(times, reverse=True)
        calls = {row["kernel"]: float(row["calls_per_step"]) for row in mine}
        assert calls["aten::native_layer_norm"] == 5  # two in each of two layers, one at the end


def test_plots_are_drawn_from_the_files_alone(result: Result, tmp_path: Path) -> None:
    for path in result.folder.glob("*.svg"):
        path.unlink()
    files = [str(result.folder / name) for name in ("gpu.csv", "kernels.csv")]
    steps = product(("tiny", "tiny-mq"), ("1", "2_prompts"))
    names = {"gpu_latency.svg", "gpu_share.svg", *(f"kernels_{case}_{step}.svg" for case, step in steps)}
    assert bench_gpu.main(["--plot", *files]) == 0
    assert {path.name for path in result.folder.glob("*.svg")} == names
    made = tmp_path / "made"
    assert bench_gpu.main(["--plot", *files, "--plot_dir", str(made)]) == 0
    assert {path.name for path in made.iterdir()} == names
    assert all((made / name).read_bytes() == (result.folder / name).read_bytes() for name in names)


def test_the_table_of_the_last_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    same = {"device": "X", "kind": "decode", "dtype": "float16", "input_len": "8", "output_len": "4", "limit_ms": "0.5"}
    rows = [
        {**same, "case": "b", "batch_size": "16", "system": "ours_int8", "token_ms": "1", "share": "0.25"},
        {**same, "case": "b", "batch_size": "16", "system": "ours", "token_ms": "2", "share": "0.25"},
        {**same, "case": "b", "batch_size": "2", "system": "hf_static", "token_ms": "4", "share": "0.125"},
        {**same, "case": "b", "batch_size": "16", "system": "ours", "token_ms": "1", "share": "0.5"},
    ]
    rows[0]["limit_ms"] = "0.25"  # of fewer bytes; systems are compared with that of float weights
    for row in rows:
        row |= {"token_ms_min": row["token_ms"], "token_ms_max": row["token_ms"]}
    append_csv(tmp_path / "gpu.csv", rows)
    capsys.readouterr()
    assert bench_gpu.main(["--plot", str(tmp_path / "gpu.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| b | 2 | - | - | 4.000 | 0.500 | - |", "| b | 16 | 1.000 | 1.000 | - | 0.500 | 50% |"]


def test_a_spent_budget_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--case", "tiny", "--system", "ours", "--decode", "--budget", "0"]
    assert bench_gpu.main([*flags, "--csv", str(tmp_path / "x.csv")]) == 0
    assert "left out: decode tiny 1 x (8 + 6), 3 x (8 + 6) ours" in capsys.readouterr().out
    assert not (tmp_path / "x.csv").exists()


def test_a_failing_peer_ends_only_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: Setup) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("gpu_systems.HfStatic", fail)
    path = tmp_path / "x.csv"
    flags = [*SMALL, "--case", "tiny", "--decode", "--batch_size", "2", "--system", "ours", "hf_static", "hf_eager"]
    assert bench_gpu.main([*flags, "--csv", str(path)]) == 1
    assert [row["system"] for row in read_rows(path)] == ["ours", "hf_eager"]


def test_engines_with_quantised_weights_beside_the_float_one(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    flags = [*SMALL, "--case", "tiny", "--batch_size", "2", "--decode", "--profile"]
    files = ["--csv", str(path), "--profile_csv", str(tmp_path / "kernels.csv")]
    assert bench_gpu.main([*flags, *files, "--system", "ours_int4", "ours_int8", "ours"]) == 0
    rows = read_rows(path)
    assert [(row["kind"], row["system"]) for row in rows] == [("decode", n) for n in ("ours", "ours_int8", "ours_int4")]
    layers = 12 * 64 * 64 * 2  # weights of QKV, output and both of the MLP
    scales = (3 + 1 + 4 + 1) * 64 * 2, 12 * 64 * 2  # one float32 per output; one per 64 inputs of an output
    saved = [layers * 3 - 4 * scales[0], layers * 7 // 2 - 4 * scales[1]]
    assert [int(rows[0]["weight_bytes"]) - int(row["weight_bytes"]) for row in rows[1:]] == saved
    assert [int(rows[0]["step_bytes"]) - int(row["step_bytes"]) for row in rows[1:]] == saved
    assert all(row["rows_like_ours"].endswith("/2") for row in rows[1:])
    assert {path.name for path in tmp_path.glob("kernels*.svg")} == {
        f"kernels_tiny_2{system}.svg" for system in ("", "_ours_int8", "_ours_int4")
    }


@pytest.mark.parametrize("flags", [["--case", "gpt5"], ["--output_len", "1"]])
def test_wrong_command_lines(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--device", "cpu", *flags]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("case", ["tiny", "tiny-mq"])
def test_every_system_sees_the_weights_of_the_engine(case: str, tmp_path: Path) -> None:
    setup = make_setup(tmp_path, case)
    prompts = bench_gpu.random_prompts(CASES[case], SHAPE)
    session = Ours(setup).session
    session.start(SHAPE.batch_size, SHAPE.num_slots)
    ours = session.context(prompts)
    theirs = torch.stack([row for row in map(HfEager(setup).logits, prompts) if row is not None])
    # The design's bound for float32 beside HF.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("case", ["tiny", "tiny-mq"])
def test_step_bytes(case: str, tmp_path: Path) -> None:
    info = make_setup(tmp_path, case).info
    weights = load_torch_weights(info, Mapping(), pick_device("cpu"))
    read = sum(tensor.nbytes for name, tensor in weights.items() if name != "model.wpe")
    # Steps read 9, 10, ... 13 slots behind a prompt of 8; the formula rounds their mean to 8 + 3.
    per_slot = 3 * 2 * 2 * (1 if case == "tiny-mq" else 4) * 16 * 4  # B, L, K and V, G, D, bytes
    assert step_bytes(info.model, info.build, SHAPE) == read + per_slot * 11


@pytest.mark.parametrize("case", ["tiny", "tiny-mq"])
def test_prefill_flops(case: str, tmp_path: Path) -> None:
    """The counter of PyTorch sees the whole square of scores; half of it and half a diagonal are asked for."""
    setup = make_setup(tmp_path, case)
    model = HfEager(setup).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.config._attn_implementation = "eager"
        model(torch.tensor(bench_gpu.random_prompts(CASES[case], SHAPE)), use_cache=False, logits_to_keep=1)
    square, triangle = 8 * 8, 8 * 9 // 2
    surplus = 2 * 2 * (square - triangle) * 3 * 64 * 2  # a product's two operations, Q K^T and P V, B, E, L
    assert prefill_flops(setup.info.model, SHAPE) == counter.get_total_flops() - surplus


def test_static_cache_begins_anew(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, "tiny")
    prompts = bench_gpu.random_prompts(CASES["tiny"], SHAPE)
    system = HfStatic(setup)
    system.prepare(SHAPE)
    first = system.generate(prompts, 6)
    assert system.generate(prompts[::-1], 6) == first[::-1]
    assert system.generate(prompts, 1) == [row[:1] for row in first]


class Slow:
    """Takes a second per token of its own clock, half a second for the prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr("gpu_measure.time.perf_counter", lambda: self.now)

    def prepare(self, shape: Shape) -> None:
        self.now += 7.0

    def generate(self, prompts: object, num_tokens: int) -> list[list[int]]:
        self.now += 0.5 + num_tokens
        return [[5] * num_tokens]

    def logits(self, ids: object) -> torch.Tensor:
        return torch.tensor([0.0, 1.0, 2.0, 3.0])


def test_time_per_token_leaves_out_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    system = Slow(monkeypatch)
    timing = measure(system, Shape(1, 4, 3), [[1]], repeat=9, row_seconds=12.0, base_bytes=None)
    assert timing == Timing([[5] * 3], 10.5, [1500.0] * 3, [1000.0] * 3)


class Disturbed(Slow):
    """Its first runs of a single token in a round, `num_rounds` of them, take as long as three."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_rounds: int):
        super().__init__(monkeypatch)
        self.lengths: list[int] = []
        self.num_rounds = num_rounds

    def generate(self, prompts: object, num_tokens: int) -> list[list[int]]:
        self.lengths.append(num_tokens)
        if num_tokens == 1 and 1 < self.lengths.count(1) <= 1 + self.num_rounds:
            self.now += 2.0
        return super().generate(prompts, num_tokens)


def test_rounds_that_met_other_work_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"repeat": 2, "row_seconds": 3600.0, "base_bytes": None}
    timing = measure(Disturbed(monkeypatch, 3), Shape(1, 4, 3), [[1]], **settings)
    assert timing == Timing([[5] * 3], 10.5, [1500.0] * 2, [1000.0] * 2)
    with pytest.raises(RuntimeError, match="in 20 rounds 3 tokens took no longer than one"):
        measure(Disturbed(monkeypatch, 20), Shape(1, 4, 3), [[1]], **settings)


def test_ranks_run_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another rank met spoils this one's round too."""
    elsewhere = iter([True, False, True, True, False])
    system, told = Disturbed(monkeypatch, 0), []

    def any_rank(disturbed: bool) -> bool:
        told.append(disturbed)
        return disturbed or next(elsewhere)

    settings: dict[str, Any] = {"repeat": 2, "row_seconds": 3600.0, "base_bytes": None}
    timing = measure(system, Shape(1, 4, 3), [[1]], any_rank=any_rank, **settings)
    assert (told, timing.token_ms) == ([False] * 5, [1000.0] * 2)
    assert system.lengths == [3, 1, *[1, 3] * 5]


def test_a_busy_machine_loses_no_kernel_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of a single token met other work: its kernel took longer than all those of the longer run."""
    single = {"norm": (5, 90.0), "gemm": (8, 10.0), "prompt": (1, 4.0)}
    runs = iter([single, {"norm": (15, 60.0), "gemm": (24, 40.0), "prompt": (1, 9.0)}])
    monkeypatch.setattr("gpu_measure.kernels_of", lambda run, device: next(runs))
    kernels = profile_step(Slow(monkeypatch), Shape(1, 4, 3), [[1]], "cpu")
    assert kernels == [KernelTime("gemm", 8, 15.0), KernelTime("norm", 5, 0.0)]


def test_margin_of_ids_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    deviation = float(torch.tensor([0.0, 1.0, 2.0, 3.0]).std())
    prompts, theirs = [[1], [1]], [[3, 3], [3, 3]]
    margin = worst_margin(Slow(monkeypatch), prompts, [[3, 2], [1, 0]], theirs)
    assert margin == pytest.approx(2 / deviation)
    assert worst_margin(Slow(monkeypatch), prompts, theirs, theirs) is None


def test_folder_for_peers_holds_words_that_are_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = gpu_peers.save_hf(make_setup(tmp_path, "tiny"))
    gpu_peers.save_words(folder, 301)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["0", "17", "300"]) == [0, 17, 300]


def test_every_way_of_choosing_tokens_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "modes.csv"
    flags = ["--case", "tiny", "--device", "cpu", "--dtype", "float32", "--batch_size", "2", "--repeat", "1"]
    assert bench_modes.main([*flags, "--input_len", "5", "--output_len", "4", "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert [row["way"] for row in rows] == list(bench_modes.WAYS)
    assert all(0 < float(row["token_ms_min"]) <= float(row["token_ms"]) for row in rows)
