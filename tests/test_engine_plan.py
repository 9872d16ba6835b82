"""The plan of build.py --dry_run beside what is really built and allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session

import build
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import builder
from gpt.engine.plan import CARDS, Plan, start_commands
from gpt.engine.tensor_file import map_tensor_file
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping

SIZES = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
LIMITS = ["--max_batch_size", "3", "--max_input_len", "10", "--max_output_len", "6", "--dtype", "float32"]
TINY = ["--dry_run", "--n_layer", "2", "--n_embd", "64", "--n_head", "2", "--random_seed", "1"]


def test_numbers_are_those_of_a_real_engine(tmp_path: Path) -> None:
    info = build_engine(None, tmp_path / "e", *SIZES, *LIMITS, "--multi_query_mode")
    plan = Plan.make(info.model, info.build)
    session = open_session(info)
    session.start(3, 16)
    assert plan.needed.kv_cache == session.cache.blocks.nbytes if session.cache else 0
    assert plan.needed.weights == sum(weight.nbytes for weight in session.ops.weights.values())
    assert plan.num_parameters * 4 == plan.needed.weights - 5 * 48 * 4  # 91 words are padded to 96


def test_file_of_a_checkpoint(tmp_path: Path) -> None:
    from engines import convert
    from tiny_models import tiny_gpt2

    info = build_engine(convert(tiny_gpt2(tmp_path / "hf"), tmp_path / "ft", tp=2), tmp_path / "e", "--world_size", "2")
    plan = Plan.make(info.model, info.build)
    for file in info.files:
        assert 0 < file.num_bytes - plan.needed.engine_file < 20000  # the header
    weights, _ = map_tensor_file(info.engine_path(1))
    assert sum(weight.nbytes for weight in weights.values()) == plan.needed.weights


@pytest.mark.parametrize("embedding", [False, True])
def test_ranks_share_the_weights(embedding: bool) -> None:
    model = ModelConfig(vocab_size=96, n_positions=32, n_embd=48, n_head=4, n_layer=3, n_kv_head=4, inter_size=96)
    config = BuildConfig(dtype="float32", world_size=4, use_parallel_embedding=embedding, seed=1)

    class Zeros:
        def read(self, tensor: object, mapping: Mapping) -> torch.Tensor:
            return torch.zeros(tensor.file_shape(mapping, model))  # type: ignore[attr-defined]

    made = sum(value.nbytes for _, value in engine_tensors(model, config, Mapping.of_build(config, 3), Zeros()))
    assert Plan.make(model, config).needed.weights == made


def test_the_largest_batch() -> None:
    model = ModelConfig(vocab_size=96, n_positions=64, n_embd=48, n_head=4, n_layer=3, n_kv_head=4, inter_size=96)
    plan = Plan.make(model, BuildConfig(max_batch_size=10, max_input_len=8, max_output_len=8))
    one = (plan.needed.kv_cache + plan.needed.activations) / 10
    assert plan.largest_batch(plan.needed.weights) == 0
    for batch in (0, 1, 7, 10):
        assert plan.largest_batch(int(plan.needed.weights + (batch + 0.5) * one)) == batch
    assert plan.largest_batch(plan.needed.weights + int(100 * one)) == 10
    assert plan.largest_batch(plan.needed.weights // 2) == 0


def test_a_gpu_rounds_sizes_up() -> None:
    """Rows to a batch that has a graph, slots to a multiple of 128; the rest of a GPU is not the engine's."""
    model = ModelConfig(vocab_size=96, n_positions=512, n_embd=48, n_head=4, n_layer=3, n_kv_head=4, inter_size=96)
    build_config = BuildConfig(max_batch_size=50, max_input_len=100, max_output_len=100)
    plan = Plan.make(model, build_config)
    cache = build_config.kv_cache_bytes(model, 64, 256)
    assert plan.gpu_bytes == plan.needed.weights + plan.needed.activations + cache + (1536 << 20)
    enough = plan.needed.weights + plan.needed.activations + cache
    assert [plan.largest_batch(enough - less, on_gpu=True) for less in (0, 1)] == [50, 49]
    assert plan.largest_batch(enough) == 50


def test_start_commands() -> None:
    assert start_commands(1, Path("a b"), 8) == ["python3 run.py --engine_dir 'a b' --max_output_len 8"]
    single, slurm = start_commands(8, Path("e"), 8)
    assert single.startswith("mpirun -np 8 python3 run.py")
    assert "--nodes 1 --ntasks 8 " in slurm
    (slurm,) = start_commands(16, Path("e"), 8)
    assert "--nodes 2 --ntasks 16 --ntasks-per-node 8 " in slurm
    assert "--mpi=pmi2 " in slurm  # for the MPI of requirements.txt


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (["--n_layer", "96", "--n_embd", "12288", "--n_head", "96", "--world_size", "8"], ["175 billion", "8 ranks"]),
        (
            ["--n_layer", "105", "--n_embd", "20480", "--n_head", "128", "--world_size", "16"],
            ["530 billion", "16 ranks", "--nodes 2 --ntasks 16"],
        ),
    ],
)
def test_dry_run(sizes: list[str], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*sizes, "--max_batch_size", "8", "--dry_run", "--output_dir", str(tmp_path / "e"), "--random_seed", "1"]
    assert build.main(flags) == 0
    out = capsys.readouterr().out
    for text in [*told, "H100 80GB    all 8", "RTX 4090     none", f"--engine_dir {tmp_path / 'e'}"]:
        assert text in out
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("flags", "cards"),
    [
        (["--target", "ada"], {"L4", "RTX 4090", "L40S"}),
        (["--target", "ampere"], {"A100 40GB", "A100 80GB"}),
        (["--target", "DEFAULT"], set(CARDS) - {"H100 80GB", "H200", "B200"}),
        (["--backend", "tensorrt"], set(CARDS) - {"H100 80GB", "H200", "B200"}),  # by TensorRT-RTX, where no GPU is
        ([], set(CARDS)),
    ],
)
def test_only_cards_that_load_the_plan_are_listed(
    flags: list[str], cards: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([*TINY, *flags, "--output_dir", str(tmp_path / "e")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {card for card in CARDS if any(line.startswith(f"  {card} ") for line in lines)} == cards
    assert any(line.startswith("  this machine ") for line in lines) == (flags == [])  # no plan runs on a CPU
    assert any("with rounded sizes" in line for line in lines) == (flags == [])


def test_a_plan_of_tensorrt_loads_on_the_kind_of_gpu_that_builds_it() -> None:
    model = ModelConfig(vocab_size=96, n_positions=64, n_embd=48, n_head=4, n_layer=3, n_kv_head=4, inter_size=96)
    plan = Plan.make(model, BuildConfig(backend="tensorrt"), {"name": "tensorrt", "compute_capability": "9.0"})
    lines = plan.describe(Path("e"), 8).splitlines()
    assert {card for card in CARDS if any(line.startswith(f"  {card} ") for line in lines)} == {"H100 80GB", "H200"}


def test_a_dry_run_is_of_what_the_backend_makes_of_the_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options, its notes, its library."""
    library = {"name": "tensorrt", "compute_capability": "9.0"}
    monkeypatch.setattr(
        builder, "prepare_backend", lambda model, build: (replace(build, max_batch_size=5), ["A note."], library)
    )
    assert build.main([*TINY, "--backend", "tensorrt"]) == 0
    told = capsys.readouterr()
    assert "A note." in told.err
    assert " for 5 sequences of " in told.out
    assert ("  H200 " in told.out, "  L40S " in told.out) == (True, False)


def test_what_cannot_be_built_is_refused_in_advance(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([*TINY, "--target", "turing", "--dtype", "bfloat16"]) == 2
    assert "it multiplies in float16 only" in capsys.readouterr().err
