"""Named intermediate results of an engine folder, whichever executor it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gpt.checkpoint.random_weights import RandomWeights
from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig, ModelConfig
from gpt.console import log
from gpt.engine.diff import Comparison, Trace, compare
from gpt.engine.folder import EngineInfo
from gpt.engine.weights import WeightSource, engine_tensors
from gpt.errors import ConfigError
from gpt.mapping import Mapping
from gpt.runtime.load import load_torch_weights
from gpt.runtime.session import Session
from gpt.runtime.torch_session import TorchSession

NUM_STEPS = 2  # of generation, after the prompts
# Relative L2 of two executors: the order of additions in float32, and the rounding of every result in half precision.
_BOUNDS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
# With int8 weights the torch backend multiplies rows in two digits on a CPU, which lose up to 2^-16 of a row's largest
# number; of the bundled model 1.4e-4.
_INT8_WEIGHTS_BOUND = 3e-4
# In float32, where values are rounded to integers: one in the middle between two goes to either side, a whole step of
# one number, which moves others.  One in the first layer of the bundled model, whose outliers make steps large, becomes
# 2.7e-2 in the last.  Neighbours in FP8 are up to an eighth of a value apart, whatever its size: of a multi-query model
# of six layers one becomes 6.6e-2.
_ROUNDED_BOUND, _FP8_BOUND = 4e-2, 1e-1


def default_prompts(model: ModelConfig, max_input_len: int) -> list[list[int]]:
    """Two prompts of one length, so that padded and packed engines see the same tokens in the same order."""
    length = min(8, max_input_len)
    return [[(7 * slot + 3 * row + 1) % model.vocab_size for slot in range(length)] for row in range(2)]


def compare_engines(a: EngineInfo, b: EngineInfo, *, bound: float | None = None) -> Comparison:
    """The same prompts through both; without a bound that of the coarser type of the two.

    Without a bound, engines that round to integers are computed in float32, whatever their types: rounding every
    result in half precision, at places of each executor's own, sends numbers of every row to another integer, which
    hides differences.  Raises ConfigError for engines of different models, and what `trace_engine` raises.
    """
    if a.model != b.model:
        both = [
            f"{field.name}: {getattr(a.model, field.name)} and {getattr(b.model, field.name)}"
            for field in dataclasses.fields(ModelConfig)
            if getattr(a.model, field.name) != getattr(b.model, field.name)
        ]
        raise ConfigError("the engines are of different models", found=both)
    in_float32 = bound is None and any(_rounds(info.build) for info in (a, b))
    row_bound = None
    if bound is None:
        bound = max(_bound(info.build, in_float32) for info in (a, b))
        if in_float32 and bound < _INT8_WEIGHTS_BOUND:
            row_bound = bound
        if in_float32:
            log.info("Computed in float32: in half precision, rounding to integers would hide differences")
            to_fp8 = any("fp8" in (info.build.quant.weights, info.build.quant.kv_cache) for info in (a, b))
            bound = _FP8_BOUND if to_fp8 else _ROUNDED_BOUND
    prompts = default_prompts(a.model, min(a.build.max_input_len, b.build.max_input_len))
    trace_a, trace_b = (trace_engine(info, prompts, in_float32=in_float32) for info in (a, b))
    return compare(trace_a, trace_b, bound, row_bound)


def _rounds(build: BuildConfig) -> bool:
    """Whether activations or the cache become integers or FP8."""
    return build.quant.activations is not None or build.quant.kv_cache is not None


def _bound(build: BuildConfig, in_float32: bool) -> float:
    """Of what is not rounded to integers."""
    bound = _BOUNDS["float32" if in_float32 else build.dtype]
    in_two_digits = build.quant.weights == "int8" and build.quant.activations is None
    return max(bound, _INT8_WEIGHTS_BOUND) if in_two_digits else bound


def trace_engine(
    info: EngineInfo, prompts: Sequence[Sequence[int]], *, in_float32: bool = False
) -> dict[str, torch.Tensor]:
    """The prompts and a few generation steps with fixed tokens, on the CPU; names begin with the step.

    Of a TensorRT engine its network is evaluated, from the configuration beside the plan and the weights it was built
    from; the plan itself is not used.  in_float32: in this type instead of the engine's, with the same weights.

    Raises ConfigError for engines of several ranks and where those weights are gone.
    """
    if info.build.world_size > 1:
        raise ConfigError(
            "differences are looked for in engines of one rank",
            found=f"{info.folder}: {info.build.world_size} ranks",
            hint="build the same checkpoint for one rank",
        )
    is_plan, build = info.backend == "tensorrt", info.build
    if is_plan:
        weights = dict(engine_tensors(info.model, build, Mapping(), _source(info)))
    else:
        weights = load_torch_weights(info, Mapping(), torch.device("cpu"))
    if in_float32:
        build = dataclasses.replace(build, dtype="float32")
        half = (torch.float16, torch.bfloat16)
        weights = {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in weights.items()}
    found: dict[str, torch.Tensor] = {}
    open_session = _network_session if is_plan else _torch_session
    return _steps(open_session(info.model, build, weights, found), found, prompts)


def _torch_session(
    model: ModelConfig, build: BuildConfig, weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> Session:
    session = TorchSession(model, build, Mapping(), weights)
    session.ops.trace = found
    return session


def _network_session(
    model: ModelConfig, build: BuildConfig, weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> Session:
    from gpt.engine.trt_stand_in import stand_in_engine
    from gpt.runtime.trt_session import TrtSession

    engine = stand_in_engine(model, build, Mapping(), weights)
    engine.trace = found
    return TrtSession(engine, model, build, Mapping(), "cpu", engine.trt)


def _source(info: EngineInfo) -> WeightSource:
    if info.build.seed is not None:
        return RandomWeights(info.model, info.build.seed)
    folder = info.source.get("checkpoint")
    if not folder or not Path(folder).is_dir():
        raise ConfigError(
            "a plan does not give its weights back, and what it was built from is not there",
            found=str(folder),
            hint="build the engine again beside its checkpoint",
        )
    return Checkpoint.open(Path(folder))


def _steps(
    session: Session, found: dict[str, torch.Tensor], prompts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """found: where the session leaves the results of a step."""
    trace: dict[str, torch.Tensor] = {}
    session.start(len(prompts), max(map(len, prompts)) + NUM_STEPS)
    for step in range(NUM_STEPS + 1):
        found.clear()
        if step == 0:
            session.context(prompts)
        else:
            ids = [(11 * step + 5 * row) % session.model.vocab_size for row in range(len(prompts))]
            session.generation(torch.tensor(ids))
        name = "context" if step == 0 else f"generation {step}"
        order = _in_order(found, session.model)
        trace |= {f"{name}, {key}": found[key].clone() for key in order}
    return trace


def _in_order(found: Trace, model: ModelConfig) -> list[str]:
    """The names of gpt.network.gpt, in the order of the network."""
    names = ["embedding"]
    for layer in range(model.n_layer):
        names += [f"layers.{layer}.attention", f"layers.{layer}.mlp", f"layers.{layer}"]
    return [name for name in (*names, "final_layernorm", "logits") if name in found]
