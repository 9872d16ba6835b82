"""Named intermediate results of an engine folder, whichever executor it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gpt.checkpoint.random_weights import RandomWeights
from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig, ModelConfig
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
# Where values are rounded to integers, those in the middle between two go to either side: one step of one number.  In
# half precision, which the executors round to at different places, that is many numbers: with the bundled model, whose
# engines differ by 3e-7 in float32, up to 4.5e-2.
_ROUNDED_BOUNDS = {"float32": 2e-2, "float16": 6e-2, "bfloat16": 6e-2}


def default_prompts(model: ModelConfig, max_input_len: int) -> list[list[int]]:
    """Two prompts of one length, so that padded and packed engines see the same tokens in the same order."""
    length = min(8, max_input_len)
    return [[(7 * slot + 3 * row + 1) % model.vocab_size for slot in range(length)] for row in range(2)]


def compare_engines(a: EngineInfo, b: EngineInfo, *, bound: float | None = None) -> Comparison:
    """The same prompts through both; without a bound that of the coarser type of the two.

    Raises ConfigError for engines of different models, and what `trace_engine` raises.
    """
    if a.model != b.model:
        both = [
            f"{field.name}: {getattr(a.model, field.name)} and {getattr(b.model, field.name)}"
            for field in dataclasses.fields(ModelConfig)
            if getattr(a.model, field.name) != getattr(b.model, field.name)
        ]
        raise ConfigError("the engines are of different models", found=both)
    if bound is None:
        bound = max(_bound(info.build) for info in (a, b))
    prompts = default_prompts(a.model, min(a.build.max_input_len, b.build.max_input_len))
    return compare(trace_engine(a, prompts), trace_engine(b, prompts), bound)


def _bound(build: BuildConfig) -> float:
    rounds = build.quant.activations or build.quant.kv_cache
    return (_ROUNDED_BOUNDS if rounds else _BOUNDS)[build.dtype]


def trace_engine(info: EngineInfo, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The prompts and a few generation steps with fixed tokens, on the CPU; names begin with the step.

    Of a TensorRT engine its network is evaluated, from the configuration beside the plan and the weights it was built
    from; the plan itself is not used.  Raises ConfigError for engines of several ranks and where those weights are
    gone.
    """
    if info.build.world_size > 1:
        raise ConfigError(
            "differences are looked for in engines of one rank",
            found=f"{info.folder}: {info.build.world_size} ranks",
            hint="build the same checkpoint for one rank",
        )
    if info.backend == "tensorrt":
        return _trace_network(info, prompts)
    session = TorchSession(info.model, info.build, Mapping(), load_torch_weights(info, Mapping(), torch.device("cpu")))
    found: dict[str, torch.Tensor] = {}
    session.ops.trace = found
    return _steps(session, found, prompts)


def _trace_network(info: EngineInfo, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    from gpt.engine.trt_stand_in import stand_in_engine
    from gpt.runtime.trt_session import TrtSession

    weights = dict(engine_tensors(info.model, info.build, Mapping(), _source(info)))
    engine = stand_in_engine(info.model, info.build, Mapping(), weights)
    session = TrtSession(engine, info.model, info.build, Mapping(), "cpu", engine.trt)
    found: dict[str, torch.Tensor] = {}
    engine.trace = found
    return _steps(session, found, prompts)


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
