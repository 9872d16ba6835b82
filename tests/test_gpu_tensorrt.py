"""TensorRT engines executed on a GPU.  Run where a library and a card that it supports are: `pytest -m "gpu and
tensorrt"`; see docs/tensorrt.md.  Leaves tensorrt-report.json, or the file that GPT_TENSORRT_REPORT names."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, convert, open_session, random_prompts, relative_error
from ranks import PROGRAMS, without_mpi
from test_engine_trt_quantized import MODES, Quant, quantized_weights, step_inputs
from test_runtime_ranks import CASES, build_case
from trt_acceptance import (
    BOUNDS,
    PLUGINS,
    Open,
    Report,
    Weights,
    cases,
    check_buckets,
    check_limits,
    check_logits,
    check_speed,
)
from trt_models import MODELS, RANK, build_config

from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_io
from gpt.engine.trt_builder import NetworkBuild, build_plan
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_layers import to_torch_dtype
from gpt.engine.trt_library import error_recorder, has_plugins, library_info, load_for_build
from gpt.engine.trt_runtime import create_context, load_engine
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.request import Request
from gpt.runtime.trt_session import TrtSession

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "gpt2-tiny"
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def report() -> Report:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    facts = {
        "gpus": subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines(),
        "library": library_info(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return Report(Path(os.environ.get("GPT_TENSORRT_REPORT", "tensorrt-report.json")), facts)


@pytest.fixture
def open_on_gpu(tmp_path: Path) -> Open:
    def open_it(model: ModelConfig, build: BuildConfig, weights: Weights) -> TrtSession:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.engine"
        build_plan(model, build, RANK, weights.items(), path)
        return TrtSession.from_plan(path, model, build, RANK, DEVICE, library=library_info(build.targets))

    return open_it


@pytest.mark.parametrize(("name", "layout", "dtype"), list(cases()))
def test_logits(name: str, layout: str, dtype: str, report: Report, open_on_gpu: Open) -> None:
    if layout == PLUGINS and not has_plugins(load_for_build(())):
        report.add("logits", f"{name}, {layout}, {dtype}: not with this library", passed=True)
        return
    check_logits(report, open_on_gpu, name, layout, dtype)


def test_buckets_and_graphs(report: Report, open_on_gpu: Open) -> None:
    check_buckets(report, open_on_gpu)


def test_limits(report: Report, open_on_gpu: Open) -> None:
    check_limits(report, open_on_gpu)


def test_speed(report: Report, open_on_gpu: Open) -> None:
    model = replace(MODELS["gpt2"], n_embd=768, n_head=12, n_kv_head=12, n_layer=12, inter_size=3072, vocab_size=50257)
    check_speed(report, open_on_gpu, replace(model, n_positions=1024), "float16", 64)


def test_bundled_model(report: Report, tmp_path: Path) -> None:
    """From the checkpoint through build.py's folder: greedy texts of a trained model."""
    checkpoint = convert(BUNDLED, tmp_path / "ft")
    oracle = open_session(build_engine(checkpoint, tmp_path / "cpu"))
    flags = ["--backend", "tensorrt", "--use_gpt_attention_plugin", "--remove_input_padding"]
    session = load_session(build_engine(checkpoint, tmp_path / "gpu", *flags), "cuda")
    prompts = random_prompts((5, 17, 1, 9), 4096)
    both = [generate(each, Request(prompts, max_new_tokens=100)).tokens for each in (session, oracle)]
    same = sum(a == b for a, b in zip(*both, strict=True))
    report.add("greedy texts", "bundled model, 4 prompts of 100 new tokens", passed=same == 4, equal=same)
    assert same == 4, both


@pytest.mark.parametrize("plugins", [(), ("attention", "gemm", "layernorm")], ids=["native", "plugins"])
@pytest.mark.parametrize("mode", [*MODES, "cache"])
def test_quantized(mode: str, plugins: tuple[str, ...], report: Report, tmp_path: Path) -> None:
    """The library's kernels, or ours inside it, beside the evaluation of the very network they come from."""
    if plugins and (not has_plugins(load_for_build(())) or "fp8" in mode):
        report.add("quantized", f"{mode}: no plugins", passed=True)
        return
    quant = replace(MODES.get(mode, Quant()), kv_cache="int8" if mode == "cache" else None)
    if quant.weights == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        report.add("quantized", f"{mode}: not on this card", passed=True)
        return
    model = replace(MODELS["gpt2"], n_embd=192, inter_size=256)
    build = build_config("float16", quant=quant.config, plugins=plugins)
    held = {
        name: tensor.half()
        if tensor.dtype == torch.float32 and "scale" not in name and "smoother" not in name
        else tensor
        for name, tensor in quantized_weights(model, quant).items()
    }
    network = NetworkBuild(load_for_build(()), model, build, RANK, held)
    path = tmp_path / "a.engine"
    with open(path, "wb") as file:
        network.write_plan(file)
    inputs = step_inputs(torch.tensor([[3, 14, 15, 9], [27, 18, 28, 5]]), 0, packed=False)
    for port in trt_io.cache_inputs(model, build, Mapping()):
        dtype = torch.int8 if quant.kv_cache else torch.float16
        inputs[port.name] = torch.zeros(port.shape_for({"B": 2}), dtype=dtype)
    expected = NetworkEvaluator(network.trt, network.network, network.side_table)(
        {name: tensor.clone() for name, tensor in inputs.items()}
    )
    found = execute(path, inputs, {"logits": tuple(expected["logits"].shape)})
    error = relative_error(found["logits"].cpu(), expected["logits"])
    report.add("quantized", f"{mode} {' '.join(plugins)}", passed=error < 2e-2, error=error, bound=2e-2)
    assert error < 2e-2  # integers may round to either side, which one step of 127 bounds


def execute(path: Path, inputs: Weights, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """One run of a plan; shapes: of the outputs that are not caches, which take their inputs' ones."""
    engine, trt = load_engine(path, DEVICE, library_info())
    recorder = error_recorder(trt)
    context = create_context(engine, trt, recorder)
    scratch = torch.empty(max(1, engine.device_memory_size_v2), dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.Stream()
    context.set_optimization_profile_async(0, stream.cuda_stream)
    context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
    memory = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    for name, tensor in memory.items():
        assert context.set_input_shape(name, tuple(tensor.shape)), recorder.messages
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if name not in memory:
            alias = engine.get_aliased_input_tensor(name)
            shape = shapes.get(name) or tuple(memory[name.replace("present", "past")].shape)
            dtype = to_torch_dtype(trt, engine.get_tensor_dtype(name))
            memory[name] = memory[alias] if alias else torch.empty(shape, dtype=dtype, device=DEVICE)
        context.set_tensor_address(name, memory[name].data_ptr())
    torch.cuda.synchronize()
    assert context.execute_async_v3(stream.cuda_stream), recorder.messages
    torch.cuda.synchronize()
    return memory


def test_ranks(report: Report, tmp_path: Path) -> None:
    """Two engines with NCCL collectives; where there is one GPU, the report says that this was not shown."""
    if torch.cuda.device_count() < 2:
        report.add("ranks", "not run: one GPU", passed=True)
        return
    name = "multi-query"
    folders = {size: build_case(name, size, tmp_path / str(size)) for size in (1, 2)}
    flags = [*CASES[name].flags, "--backend", "tensorrt", "--world_size", "2", "--random_seed", "5"]
    sizes = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
    limits = ["--max_batch_size", "4", "--max_input_len", "40", "--max_output_len", "20", "--dtype", "float32"]
    build_engine(None, tmp_path / "trt", *sizes, *limits, *flags)
    results = []
    for size, folder, device in ((1, folders[1], "cpu"), (2, tmp_path / "trt", "cuda")):
        done = without_mpi(size, PROGRAMS / "logits.py", device, tmp_path / "out.pt", folder)
        assert [result.returncode for result in done] == [0] * size, done
        results.append(torch.load(tmp_path / "out.pt")[0])
    errors = [relative_error(a, b) for a, b in zip(results[1]["logits"], results[0]["logits"], strict=True)]
    bound = BOUNDS["float32"]
    report.add("ranks", "two GPUs, multi-query, float32", passed=max(errors) < bound, errors=errors, bound=bound)
    assert max(errors) < bound


def test_inspector(report: Report, tmp_path: Path) -> None:
    """What the library made of the layers, for whoever reads the report."""
    model, build = MODELS["gpt2"], build_config("float16", fused=True, profiling_verbosity="detailed")
    path = tmp_path / "a.engine"
    build_plan(model, build, RANK, {k: v.half() for k, v in quantized_weights(model, Quant()).items()}.items(), path)
    engine, trt = load_engine(path, DEVICE, library_info())
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    report.add("inspector", "gpt2, fused", passed=bool(layers), num_layers=engine.num_layers, layers=layers)
    assert layers
