"""Engines of several ranks on this machine: the same logits and texts as one rank."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, convert, engines_of_ranks, relative_error
from ranks import PROGRAMS, environment, mpirun, run_arguments, run_program, without_mpi
from tiny_models import tiny_gpt2

import build
import run
from gpt.checkpoint.layout import tensors
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.folder import EngineInfo, open_engine
from gpt.engine.inspection import inspect
from gpt.engine.weights import engine_bytes, engine_layout, engine_tensors
from gpt.mapping import Mapping

pytestmark = pytest.mark.mpi

# 91 words and 4 ranks: the last rank has fewer words than padding would suggest.
SIZES = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
LIMITS = ["--max_batch_size", "4", "--max_input_len", "40", "--max_output_len", "20"]
FP32_BOUND, BF16_BOUND = 1e-5, 2e-2


@dataclass(frozen=True)
class Case:
    """flags: of build.py.  hf: GPT2Config of a checkpoint, None for random weights."""

    flags: tuple[str, ...] = ()
    hf: dict[str, Any] | None = None
    bound: float = FP32_BOUND


CASES = {
    "gpt2": Case(("--use_gpt_attention_plugin",), {"n_head": 4, "n_embd": 48}),
    "gpt2 untied, embedding by hidden size": Case(
        ("--use_parallel_embedding", "--embedding_sharding_dim", "1"), {"tie_word_embeddings": False}
    ),
    "gpt2 untied, embedding by vocabulary": Case(("--use_parallel_embedding",), {"tie_word_embeddings": False}),
    "gpt2 bfloat16": Case(("--dtype", "bfloat16"), {"n_head": 4, "n_embd": 48}, BF16_BOUND),
    "multi-query": Case(("--multi_query_mode", "--hidden_act", "gelu_new", "--remove_input_padding")),
    "rope swiglu": Case(("--rotary_pct", "0.5", "--hidden_act", "swiglu", "--no_bias", "--inter_size", "40")),
    "embedding by vocabulary": Case(("--use_parallel_embedding", "--use_gpt_attention_plugin")),
    "virtual tokens": Case(("--max_prompt_embedding_table_size", "6")),
    "virtual tokens, embedding by vocabulary": Case(
        ("--max_prompt_embedding_table_size", "6", "--use_parallel_embedding")
    ),
    "virtual tokens, embedding by hidden size": Case(
        ("--max_prompt_embedding_table_size", "6", "--use_parallel_embedding", "--embedding_sharding_dim", "1"),
        {"tie_word_embeddings": False},
    ),
}


def build_case(name: str, world_size: int, base: Path, case: Case | None = None) -> Path:
    """case: one that is not among CASES."""
    case, out = case or CASES[name], base / f"{name}-{world_size}"
    flags = [*case.flags, *LIMITS, "--world_size", str(world_size)]
    if case.hf is None:
        build_engine(None, out, *SIZES, "--dtype", "float32", "--random_seed", "5", *flags)
        return out
    hf = base / name / "hf"
    if not hf.exists():
        tiny_gpt2(hf, tokenizer=False, **case.hf)
    build_engine(convert(hf, base / name, tp=world_size), out, *flags)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: logits and tokens of each case, all ranks in agreement."""
    base = tmp_path_factory.mktemp("ranks")
    found = {}
    for world_size in (1, 2, 4):
        folders = [build_case(name, world_size, base) for name in CASES]
        done = mpirun(world_size, PROGRAMS / "logits.py", "cpu", base / "out.pt", *folders)
        assert done.returncode == 0, done.stderr
        found[world_size] = torch.load(base / "out.pt")
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_the_whole(name: str, world_size: int, results: dict[int, list[dict[str, Any]]]) -> None:
    index = list(CASES).index(name)
    whole, parts = results[1][index], results[world_size][index]
    for ours, expected in zip(parts["logits"], whole["logits"], strict=True):
        assert relative_error(ours, expected) < CASES[name].bound
    if CASES[name].bound == FP32_BOUND:
        assert parts["tokens"] == whole["tokens"]


def test_parts_of_a_divided_table_are_the_table(tmp_path: Path) -> None:
    model = ModelConfig(
        vocab_size=91, n_positions=16, n_embd=24, n_head=3, n_layer=1, n_kv_head=3, inter_size=96, tied_head=False
    )
    values = {tensor.name: torch.randn(tensor.shape) for tensor in tensors(model)}

    class Whole:
        def read(self, tensor: Any, mapping: Mapping) -> torch.Tensor:
            return mapping.shard(tensor.split, values[tensor.name], model)

    for dim in (0, 1):
        config = BuildConfig(dtype="float32", world_size=3, use_parallel_embedding=True, embedding_sharding_dim=dim)
        ranks = []
        for rank in range(3):
            mapping = Mapping.of_build(config, rank)
            ranks.append(dict(engine_tensors(model, config, mapping, Whole())))
            shapes = {tensor.name: tensor.shape for tensor in engine_layout(model, mapping)}
            assert {name: tuple(value.shape) for name, value in ranks[-1].items()} == shapes
        joined = torch.cat([rank["model.wte"] for rank in ranks], dim)
        assert torch.equal(joined[:91], values["model.wte"])
        head = torch.cat([rank["model.lm_head.weight"] for rank in ranks])
        assert head.shape == (96, 24)  # a multiple of lcm(8, 3)
        assert torch.equal(head[:91], values["model.lm_head.weight"])
        assert head[91:].abs().max() == 0
        assert engine_bytes(model, Mapping.of_build(config), "float32") < engine_bytes(model, Mapping(3), "float32")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, EngineInfo]:
    return engines_of_ranks(tmp_path_factory.mktemp("text"), 1, 2, 4)


SAMPLED = ["--top_k", "30", "--temperature", "1.5", "--repetition_penalty", "1.2"]


@pytest.mark.parametrize(
    "decoding", [[], ["--streaming"], [*SAMPLED, "--seed", "7"]], ids=["greedy", "streaming", "sampled"]
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_output_is_that_of_one_rank(
    world_size: int, decoding: list[str], engines: dict[int, EngineInfo], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--input_text", "the end", "a", "in the north", "on", "re", *decoding]
    assert run.main([str(word) for word in run_arguments(engines[1], *prompts)[1:]]) == 0
    result = mpirun(world_size, *run_arguments(engines[world_size], *prompts, "--log_level", "info"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == capsys.readouterr().out
    assert "[rank 0] [I] Engine loaded" in result.stderr
    assert "[rank 1]" not in result.stderr


def test_ranks_share_the_seed_that_nobody_gave(
    engines: dict[int, EngineInfo], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks with seeds of their own would go on from different tokens: the one told repeats the text on one rank."""
    result = mpirun(2, *run_arguments(engines[2], *SAMPLED, "--log_level", "info"))
    assert result.returncode == 0, result.stderr
    seeds = re.findall(r"--seed (\d+)", result.stderr)
    assert len(seeds) == 1
    assert run.main([str(word) for word in run_arguments(engines[1], *SAMPLED, "--seed", *seeds)[1:]]) == 0
    assert result.stdout == capsys.readouterr().out


def test_carriage_returns_are_read_as_written() -> None:
    """What the comparisons of this file rest on: a model of random weights may say any byte."""
    assert run_program([sys.executable, "-c", "print('a\\rb')"], environment()).stdout == "a\rb\n"


def test_every_rank_logs_when_asked(engines: dict[int, EngineInfo]) -> None:
    result = mpirun(2, *run_arguments(engines[2], "--log_level", "debug"))
    assert "[rank 0] [I] Engine loaded" in result.stderr
    assert "[rank 1] [I] Engine loaded" in result.stderr


def test_spawn_starts_the_ranks(engines: dict[int, EngineInfo]) -> None:
    results = []
    job = environment(SLURM_JOB_ID="77", SLURM_NODELIST="no-such-node", SLURM_NNODES="1", SLURM_TASKS_PER_NODE="1")
    for world_size in (1, 2):
        words = [sys.executable, *map(str, run_arguments(engines[world_size], "--spawn"))]
        results.append(run_program(words, job))
    assert [result.returncode for result in results] == [0, 0], results
    assert results[0].stdout == results[1].stdout != ""


def test_ranks_without_mpi(engines: dict[int, EngineInfo], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(word) for word in run_arguments(engines[1])[1:]]) == 0
    first, second = without_mpi(2, *run_arguments(engines[2]))
    assert (first.returncode, first.stdout) == (0, capsys.readouterr().out), first.stderr
    assert (second.returncode, second.stdout) == (0, "")


def test_files_are_written_once(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    ids = tmp_path / "in.csv"
    ids.write_text("1,2,3\n4,5\n")
    texts = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.csv"
        result = mpirun(world_size, *run_arguments(engines[world_size], "--input_tokens", ids, "--output_csv", out))
        assert result.returncode == 0, result.stderr
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.csv", "2.csv", "in.csv"]


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_summaries_on_ranks(paged: bool, engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    articles = tmp_path / "articles.jsonl"
    rows = [{"article": "the north " * n, "highlights": "the end"} for n in (2, 3)]
    articles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = []
    for world_size in (1, 2):
        info = engines[world_size]
        hf = Path(json.loads((info.folder / "config.json").read_text())["engine"]["source"]["checkpoint"]).parents[1]
        folder = info.folder
        if paged:
            checkpoint, folder = hf / "ft" / f"{world_size}-gpu", tmp_path / f"paged-{world_size}"
            build_engine(checkpoint, folder, *LIMITS, "--world_size", str(world_size), "--paged_kv_cache")
        flags = ["--test_trt_llm", "--test_hf", "--hf_model_location", hf / "hf", "--engine_dir", folder]
        flags += ["--dataset_path", articles, "--output_len", 6, "--device", "cpu", "--max_ite", 2]
        result = mpirun(world_size, "summarize.py", *flags, "--log_level", "error")
        assert result.returncode == 0, result.stderr
        outputs.append(re.findall(r"rouge\w+ : .*|identical .*| Output : .*", result.stdout))
    assert outputs[0] == outputs[1]
    assert "identical output ids: 2 of 2 articles" in outputs[1]


def test_build_of_another_number_of_ranks(
    engines: dict[int, EngineInfo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((engines[2].folder / "config.json").read_text())["engine"]["source"]["checkpoint"]
    assert build.main(["--model_dir", source, "--world_size", "4", "--output_dir", str(tmp_path / "e")]) == 3
    told = capsys.readouterr().err
    assert "-tp 4" in told
    assert "hf_gpt_convert.py" in told
    assert "--world_size 2" in told
    assert not (tmp_path / "e").exists()


def test_builds_in_one_or_several_processes_are_equal(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    source = json.loads((engines[4].folder / "config.json").read_text())["engine"]["source"]["checkpoint"]
    serial = build_engine(Path(source), tmp_path / "e", *LIMITS, "--world_size", "4")
    parallel = engines[4]
    assert [(file.name, file.num_bytes) for file in serial.files] == [(f.name, f.num_bytes) for f in parallel.files]
    for rank in range(4):
        # What differs is the build's id in the header.
        ours, theirs = (info.engine_path(rank).read_bytes() for info in (serial, parallel))
        assert ours.replace(serial.build_id.encode(), parallel.build_id.encode()) == theirs
    assert json.loads((parallel.folder / "config.json").read_text())["builder_config"]["parallel_build"] is True


def test_divided_engines_pass_the_check(tmp_path: Path) -> None:
    """check.py expects of every rank the parts that build.py gave it."""
    for name in ("gpt2 untied, embedding by vocabulary", "gpt2 untied, embedding by hidden size"):
        assert inspect(build_case(name, 4, tmp_path), checksums=True, values=True).problems == []


def test_build_is_one_process(tmp_path: Path) -> None:
    result = mpirun(2, "build.py", *SIZES, "--world_size", "2", "--output_dir", tmp_path / "e")
    assert result.returncode == 2
    assert "--parallel_build" in result.stderr
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("world_size", "layers", "width", "heads"), [(8, 96, 12288, 96), (16, 105, 20480, 128)], ids=["175B", "530B"]
)
def test_the_largest_engines_of_random_weights_hold_no_weights(
    world_size: int, layers: int, width: int, heads: int, tmp_path: Path
) -> None:
    sizes = ["--n_layer", str(layers), "--n_embd", str(width), "--n_head", str(heads), "--vocab_size", "51200"]
    info = build_engine(
        None, tmp_path / "e", *sizes, "--n_positions", "2048", "--dtype", "float16", "--world_size", str(world_size)
    )
    assert len(info.files) == world_size
    assert sum(path.stat().st_size for path in info.folder.rglob("*") if path.is_file()) < 100_000
    assert open_engine(info.folder).model.n_layer == layers
