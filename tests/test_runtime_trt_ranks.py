"""TensorRT networks of several ranks: built one by one, and evaluated together, their collectives between processes."""

from __future__ import annotations

import ctypes
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, relative_error
from ranks import PROGRAMS, mpirun
from test_engine_quant import INT8_BOUND, WEIGHT_ONLY_BOUND
from test_runtime_ranks import CASES, FP32_BOUND, LIMITS, SIZES, build_case
from trt_matrix import record
from trt_models import MODELS, build_config, context_inputs, define, layers_of

import build
from gpt.comm import NullCommunicator
from gpt.config import BuildConfig
from gpt.engine import trt_library
from gpt.engine.folder import open_engine
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_runtime import set_communicator
from gpt.errors import ConfigError, EngineError
from gpt.mapping import Mapping
from gpt.runtime.load import load_session

pytestmark = [pytest.mark.tensorrt, pytest.mark.mpi]

LAYOUTS = {2: "tensorrt padded plain", 4: "tensorrt packed fused"}
# Four processes share few processors: those cases in which a rank's number matters most.
CHOSEN = {2: list(CASES), 4: ["gpt2", "multi-query", "virtual tokens, embedding by vocabulary"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, per case: the torch executor on one, the TensorRT networks on two and four."""
    base = tmp_path_factory.mktemp("trt_ranks")
    found = {}
    for world_size, device in {1: "cpu", **LAYOUTS}.items():
        folders = [build_case(name, world_size, base) for name in CHOSEN.get(world_size, CASES)]
        result = mpirun(world_size, PROGRAMS / "logits.py", device, base / "out.pt", *folders)
        assert result.returncode == 0, result.stderr
        found[world_size] = torch.load(base / "out.pt")
    return found


@pytest.mark.parametrize(("name", "world_size"), [(name, size) for size in LAYOUTS for name in CHOSEN[size]])
def test_networks_together_are_the_model(name: str, world_size: int, results: dict[int, list[dict[str, Any]]]) -> None:
    whole, parts = results[1][list(CASES).index(name)], results[world_size][CHOSEN[world_size].index(name)]
    errors = [relative_error(ours, expected) for ours, expected in zip(parts["logits"], whole["logits"], strict=True)]
    assert max(errors) < CASES[name].bound
    record(name, rank_build(name, world_size), error=max(errors))
    if CASES[name].bound == FP32_BOUND:
        assert parts["tokens"] == whole["tokens"]


def test_networks_with_plugins_together_are_the_model(results: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    """A rank's heads, a product's part without its bias, an embedding cut either way."""
    names = [name for name in CASES if CASES[name].bound == FP32_BOUND]
    folders = [build_case(name, 2, tmp_path) for name in names]
    done = mpirun(2, PROGRAMS / "logits.py", "tensorrt packed plugins", tmp_path / "out.pt", *folders)
    assert done.returncode == 0, done.stderr
    for name, parts in zip(names, torch.load(tmp_path / "out.pt"), strict=True):
        whole = results[1][list(CASES).index(name)]
        pairs = zip(parts["logits"], whole["logits"], strict=True)
        assert max(relative_error(ours, expected) for ours, expected in pairs) < FP32_BOUND, name
        assert parts["tokens"] == whole["tokens"], name


def rank_build(name: str, world_size: int) -> BuildConfig:
    """What the networks of a case were built with."""
    flags, layout = CASES[name].flags, LAYOUTS[world_size]
    return build_config(
        "bfloat16" if "bfloat16" in flags else "float32",
        fused="fused" in layout,
        packed="packed" in layout,
        world_size=world_size,
        use_parallel_embedding="--use_parallel_embedding" in flags,
        embedding_sharding_dim=int("--embedding_sharding_dim" in flags),
        max_prompt_embedding_table_size=6 * ("--max_prompt_embedding_table_size" in flags),
    )


QUANTIZED = {
    "int8": (["--use_weight_only"], WEIGHT_ONLY_BOUND),
    "int4": (["--use_weight_only", "--weight_only_precision", "int4"], WEIGHT_ONLY_BOUND),
    "smooth": (["--use_smooth_quant", "--per_token", "--per_channel", "--int8_kv_cache"], INT8_BOUND),
}


def test_quantised_networks_together_are_the_ranks_of_torch(tmp_path: Path) -> None:
    """Plans of both ranks, and their networks evaluated in two processes beside the torch executor in as many."""
    flags = [*SIZES, *LIMITS, "--multi_query_mode", "--dtype", "float32", "--random_seed", "5", "--world_size", "2"]
    folders, builds = [], []
    for name, (quant, _) in QUANTIZED.items():
        folders.append(build_engine(None, tmp_path / name, *flags, *quant).folder)
        plans = build_engine(None, tmp_path / f"plans of {name}", *flags, *quant, "--backend", "tensorrt")
        builds.append(plans.build)
        assert [plans.engine_path(rank).stat().st_size > 0 for rank in (0, 1)] == [True, True]
    found = []
    for device in ("cpu", LAYOUTS[2]):
        result = mpirun(2, PROGRAMS / "logits.py", device, tmp_path / "out.pt", *folders)
        assert result.returncode == 0, result.stderr
        found.append(torch.load(tmp_path / "out.pt"))
    for (name, (_, bound)), config, torch_ranks, networks in zip(QUANTIZED.items(), builds, *found, strict=True):
        errors = [relative_error(*pair) for pair in zip(networks["logits"], torch_ranks["logits"], strict=True)]
        assert max(errors) < bound, name
        record("multi_query", config, built="default", error=max(errors))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_rank_builds(dtype: str, world_size: int) -> None:
    build = build_config(
        dtype,
        fused=True,
        packed=True,
        world_size=world_size,
        use_parallel_embedding=True,
        targets=("ampere", "ada", "blackwell"),
    )
    for rank in (0, world_size - 1):
        plan = io.BytesIO()
        define(trt_library.load(), MODELS["multi_query"], build, rank).write_plan(plan)
        assert plan.tell() > 0
    record("multi_query", build, built=" ".join(build.targets))


def test_from_the_command_line(tmp_path: Path) -> None:
    flags = [*SIZES, *LIMITS, "--dtype", "float16", "--random_seed", "1", "--log_level", "error"]
    build.run_build([*flags, "--target", "ada", "--world_size", "2", "--output_dir", str(tmp_path)])
    info = open_engine(tmp_path)
    assert [file.name for file in info.files] == [f"gpt_float16_tp2_rank{rank}.engine" for rank in (0, 1)]
    with pytest.raises(ConfigError, match="has 2 ranks, 1 was started"):
        load_session(info, "cpu")


class TestCollectives:
    model = MODELS["multi_query"]
    build = build_config(world_size=2)

    def network(self) -> Any:
        return define(trt_library.load(), self.model, self.build, 1)

    def evaluate(self, network: Any, comm: NullCommunicator | None = None) -> None:
        evaluator = NetworkEvaluator(network.trt, network.network, network.side_table)
        evaluator.comm = comm or TwoRanks()
        evaluator(context_inputs(self.model, self.build, Mapping(2, 1)))

    def test_metadata_tells_what_the_library_does_not(self) -> None:
        network = self.network()
        self.evaluate(network)
        collectives = layers_of(network, "DIST_COLLECTIVE", "IDistCollectiveLayer")
        kinds = [json.loads(layer.metadata)["collective"] for layer in collectives]
        assert kinds == ["ALL_REDUCE"] * 2 * self.model.n_layer + ["ALL_GATHER"]
        assert {layer.num_ranks for layer in collectives} == {2}

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"collective": "REDUCE_SCATTER"}, "REDUCE_SCATTER SUM"),
            ({"reduction": "MAX"}, "ALL_REDUCE MAX"),
            ({"root": 0}, "a root"),
            ({"groups": [0, 1]}, "groups"),
        ],
    )
    def test_others_are_refused(self, change: dict[str, Any], expected: str) -> None:
        network = self.network()
        layer = layers_of(network, "DIST_COLLECTIVE", "IDistCollectiveLayer")[0]
        layer.metadata = json.dumps({**json.loads(layer.metadata), **change})
        with pytest.raises(EngineError, match=expected):
            self.evaluate(network)

    def test_number_of_ranks(self) -> None:
        with pytest.raises(EngineError, match="2 ranks, 1 are here"):
            self.evaluate(self.network(), NullCommunicator())

    def test_nccl_address_travels_in_a_capsule(self) -> None:
        given = []

        class Nccl(TwoRanks):
            def nccl_address(self) -> int:
                return 0xABCDEF0

        class Context:
            def set_communicator(self, capsule: object) -> bool:
                given.append(capsule)
                return True

        assert set_communicator(Context(), Nccl(), torch.device("cuda"))
        read = ctypes.pythonapi.PyCapsule_GetPointer
        read.restype, read.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        assert [read(capsule, None) for capsule in given] == [0xABCDEF0]


class TwoRanks(NullCommunicator):
    """Two that hold the same."""

    size = 2

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor *= 2

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([tensor, tensor], dim)
