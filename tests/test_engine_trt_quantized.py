"""Quantised products and the int8 cache as TensorRT layers: built, and evaluated beside the same arithmetic written
plainly."""

from __future__ import annotations

import io
from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace

import pytest
import torch
from engines import random_prompts, relative_error
from trt_matrix import record, record_refusal
from trt_models import MODELS, RANK, build_config, random_weights

from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_io, trt_library
from gpt.engine.step import ContextStep
from gpt.engine.torch_executor import ACTIVATION_FUNCTIONS
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_layers import Layers
from gpt.engine.trt_quantized import QuantizedCache, QuantizedProducts
from gpt.engine.trt_stand_in import stand_in_engine
from gpt.errors import EngineError
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt

NAME = "x.dense"
NUM_IN, NUM_OUT = 64, 24
# Float results of exact integer sums: the order of additions, and where half precision rounds scale times integer.
BOUNDS = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Quant:
    """What is quantised, and how these tests make it."""

    weights: str | None = None
    activations: str | None = None
    kv_cache: str | None = None
    group: int = 0
    smoother: bool = False

    @property
    def config(self) -> QuantConfig:
        return QuantConfig(
            self.weights,
            self.activations,
            group_size=self.group,
            kv_cache=self.kv_cache,
            smoothers=self.smoother,
        )


MODES = {
    "int8": Quant("int8"),
    "int4": Quant("int4"),
    "int4 groups": Quant("int4", group=32),
    "static": Quant("int8", "per_tensor"),
    "per token": Quant("int8", "per_token"),
    "static, smoothed": Quant("int8", "per_tensor", smoother=True),
    "fp8 static": Quant("fp8", "per_tensor"),
    "fp8 per token": Quant("fp8", "per_token"),
}
INT_LIMIT = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def steps_of(weight: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> its integers (or FP8 numbers), unpacked, and the scale [out] or [out, groups]."""
    kind = quant.weights or ""
    groups = weight.unflatten(1, (-1, quant.group or weight.shape[1]))
    scale = groups.abs().amax(2, keepdim=True) / INT_LIMIT[kind]
    steps = (groups / scale).flatten(1)
    steps = steps.to(torch.float8_e4m3fn) if kind == "fp8" else steps.round().to(torch.int8)
    return steps, scale[..., 0] if quant.group else scale[:, 0, 0]


def quantized(weight: torch.Tensor, name: str, quant: Quant, seed: int = 3) -> dict[str, torch.Tensor]:
    """What an engine holds for one linear layer."""
    steps, scale = steps_of(weight, quant)
    stored = (steps[:, 0::2] & 15 | steps[:, 1::2] << 4).view(torch.uint8) if quant.weights == "int4" else steps
    held = {f"{name}.weight": stored, f"{name}.weight_scale": scale}
    if quant.activations == "per_tensor":
        held[f"{name}.input_scale"] = torch.tensor(0.03 if quant.weights == "int8" else 0.01)
    if quant.smoother:
        generator = torch.Generator().manual_seed(seed)
        held[f"{name}.smoother"] = torch.rand(weight.shape[1], generator=generator) + 0.5
    return held


def plainly(x: torch.Tensor, held: Dict[str, torch.Tensor], name: str, quant: Quant) -> torch.Tensor:
    """x [N, in] -> [N, out] in float64, from integers and scales."""
    weight, scale = held[f"{name}.weight"], held[f"{name}.weight_scale"].double()
    if weight.dtype == torch.uint8:
        low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
        weight = torch.stack([low - 16 * (low > 7), high - 16 * (high > 7)], 2).flatten(1)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    wide = (weight.double().unflatten(1, (groups, -1)) * scale.view(len(scale), groups, 1)).flatten(1)
    x = x.double()
    if quant.activations is None:
        return x @ wide.T
    x = x / held[f"{name}.smoother"].double() if quant.smoother else x
    limit = INT_LIMIT[quant.weights or ""]
    per_row = x.abs().amax(1, keepdim=True).clamp_min(1e-6) / limit
    step = held[f"{name}.input_scale"].double() if quant.activations == "per_tensor" else per_row
    if quant.weights == "fp8":
        rounded = (x / step).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    else:
        rounded = (x / step).round().clamp(-128, 127)
    return (rounded * step) @ wide.T


class Tiny:
    """A network of a few layers."""

    def __init__(self) -> None:
        self.trt = trt_library.load()
        self.recorder = trt_library.error_recorder(self.trt)
        self.builder = self.trt.Builder(trt_library.logger(self.trt))
        self.builder.error_recorder = self.recorder
        self.network = self.builder.create_network(0)
        self.network.error_recorder = self.recorder
        self.layers = Layers(self.trt, self.network, self.recorder)

    def builds(self, target: str | None, **shapes: tuple[int, ...]) -> bool:
        """shapes: of the inputs, for every dimension that changes 1 to 8."""
        config = self.builder.create_builder_config()
        if target is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.trt.ComputeCapability, target), 0)
        profile = self.builder.create_optimization_profile()
        for name, shape in shapes.items():
            limits = [tuple(limit if size == -1 else size for size in shape) for limit in (1, 4, 8)]
            profile.set_shape(name, *limits)
        config.add_optimization_profile(profile)
        return self.builder.build_serialized_network(self.network, config) is not None

    def evaluate(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return NetworkEvaluator(self.trt, self.network, self.layers.side_table)(inputs)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_product(mode: str, dtype: str, packed: bool) -> None:
    quant = MODES[mode]
    generator = torch.Generator().manual_seed(1)
    held = quantized(torch.randn(NUM_OUT, NUM_IN, generator=generator), NAME, quant)
    torch_type = getattr(torch, dtype)
    if quant.activations is None:  # such engines hold scales of their own type
        held[f"{NAME}.weight_scale"] = held[f"{NAME}.weight_scale"].to(torch_type)
    tiny = Tiny()
    shape = (-1, NUM_IN) if packed else (-1, -1, NUM_IN)
    x = tiny.layers.input("x", dtype, shape)
    tiny.layers.output(QuantizedProducts(tiny.layers, held, torch_type, quant.config)(x, NAME), "y")
    targets = (None, "SM89", "SM120") if quant.weights == "fp8" else (None, "SM80", "SM86", "SM89", "SM120")
    for target in targets if dtype == "float16" and packed else targets[:1]:
        assert tiny.builds(target, x=shape), (target, tiny.recorder.messages)
    values = torch.randn(6, NUM_IN, generator=generator)
    values[2] *= 40  # an outlier: saturates the static scale, and gets a scale of its own
    values[4] = 0
    values = values.to(torch_type)
    found = tiny.evaluate(x=values if packed else values.view(2, 3, NUM_IN))["y"]
    assert found.dtype == torch_type
    expected = plainly(values, held, NAME, quant)
    error = relative_error(found.reshape(expected.shape), expected)
    assert error < BOUNDS[dtype]
    built = " ".join(target or "default" for target in (targets if dtype == "float16" and packed else targets[:1]))
    record("one product", build_config(dtype, packed=packed), built=built, error=error, options=mode)


def test_fp8_is_refused_on_ampere() -> None:
    quant = MODES["fp8 static"]
    tiny = Tiny()
    x = tiny.layers.input("x", "float16", (-1, NUM_IN))
    held = quantized(torch.randn(NUM_OUT, NUM_IN), NAME, quant)
    tiny.layers.output(QuantizedProducts(tiny.layers, held, torch.float16, quant.config)(x, NAME), "y")
    assert not tiny.builds("SM80", x=(-1, NUM_IN))
    assert tiny.recorder.messages
    record_refusal(
        EngineError("TensorRT could not build", found=["FP8 products for ampere: " + tiny.recorder.messages[0]])
    )


class TestCache:
    G, T, D = 2, 10, 16

    def network(self, dtype: str) -> Tiny:
        tiny = Tiny()
        layers = tiny.layers
        weights = {"model.layers.0.attention.kv_scale": torch.tensor([0.05, 0.02])}
        past = layers.input("past", "int8", (-1, self.G, self.T, self.D))
        new = layers.input("new", dtype, (-1, self.G, -1, self.D))
        index = layers.input("index", "int32", (-1,))
        cache = QuantizedCache(layers, weights, getattr(torch, dtype), self.T)
        steps, present = cache.update(past, new, index, 0, "value")
        layers.output(steps, "steps")
        layers.output(present, "present")
        return tiny

    @pytest.mark.parametrize("target", [None, "SM80", "SM86", "SM89", "SM120"])
    def test_builds(self, target: str | None) -> None:
        tiny = self.network("float16")
        shapes = {"past": (-1, self.G, self.T, self.D), "new": (-1, self.G, -1, self.D), "index": (-1,)}
        assert tiny.builds(target, **shapes), tiny.recorder.messages

    @pytest.mark.parametrize("dtype", BOUNDS)
    @pytest.mark.parametrize(
        ("num_tokens", "index"), [(4, (0, 0)), (1, (3, 9)), (10, (0, 0)), (3, (2, 7)), (1, (0, 4))]
    )
    def test_update(self, num_tokens: int, index: tuple[int, int], dtype: str) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        past = torch.randint(-128, 128, (2, self.G, self.T, self.D), generator=generator, dtype=torch.int8)
        new = (torch.randn(2, self.G, num_tokens, self.D, generator=generator) * 2).to(getattr(torch, dtype))
        expected = past.clone()
        for row, first in enumerate(index):
            rounded = (new[row].float() / torch.tensor(0.02)).round().clamp(-128, 127)
            expected[row, :, first : first + num_tokens] = rounded.to(torch.int8)
        found = self.network(dtype).evaluate(past=past, new=new, index=torch.tensor(index, dtype=torch.int32))
        assert torch.equal(found["steps"], expected)
        attended = (expected.float() * 0.02).to(getattr(torch, dtype))
        for row, first in enumerate(index):
            if first == 0:  # a prompt
                attended[row, :, :num_tokens] = new[row]
        assert torch.equal(found["present"], attended)


def quantized_weights(model: ModelConfig, quant: Quant) -> dict[str, torch.Tensor]:
    """A whole model's: the linear layers quantised, a scale of 0.02 for keys and 0.01 for values."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in random_weights(model).items():
        linear = name.startswith("model.layers") and name.endswith(".weight") and "layernorm" not in name
        if linear and quant.weights:
            held |= quantized(tensor, name.removesuffix(".weight"), quant)
        else:
            held[name] = tensor
    if quant.kv_cache:
        for layer in range(model.n_layer):
            held[f"model.layers.{layer}.attention.kv_scale"] = torch.tensor([0.02, 0.01])
    return held


class PlainSession(TorchSession):
    """The torch executor, its linear layers computed plainly, its cache rounded to integers."""

    def __init__(self, model: ModelConfig, build: BuildConfig, held: Dict[str, torch.Tensor], quant: Quant):
        super().__init__(model, replace(build, quant=QuantConfig()), RANK, random_weights(model))
        if quant.weights:
            self.ops.linear = self.linear(held, quant)  # type: ignore[method-assign]
        if quant.kv_cache:
            attention = self.ops.attention

            def rounded(qkv: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
                if isinstance(self.ops.step, ContextStep):  # prompts see themselves as they are
                    result = attention(qkv, layer, scale)
                    assert self.cache is not None
                    for part, step in zip(self.cache.blocks[layer], (0.02, 0.01), strict=True):
                        part.copy_((part / step).round().clamp(-128, 127) * step)
                    return result
                width = self.model.n_head * self.model.head_size
                q, k, v = qkv.split([width, *[self.model.n_kv_head * self.model.head_size] * 2], -1)
                k, v = ((x / s).round().clamp(-128, 127) * s for x, s in ((k, 0.02), (v, 0.01)))
                return attention(torch.cat([q, k, v], -1), layer, scale)

            self.ops.attention = rounded  # type: ignore[method-assign]

    def linear(self, held: Dict[str, torch.Tensor], quant: Quant) -> Callable[..., torch.Tensor]:
        def product(
            x: torch.Tensor, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
        ) -> torch.Tensor:
            y = plainly(x, held, name, quant).float()
            if bias and f"{name}.bias" in held:
                y += held[f"{name}.bias"]
            return y if activation is None else ACTIVATION_FUNCTIONS[activation](y)

        return product


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", ["int8", "int4", "per token", "static", "cache", "int8, cache"])
@pytest.mark.parametrize("name", ["gpt2", "rotary_swiglu_grouped"])
def test_whole_network(name: str, mode: str, packed: bool) -> None:
    """Prompts and two generation steps; ours and the plain ones may round a value that lies in the middle to different
    sides, which one step of an integer bounds."""
    quant = MODES.get(mode.removesuffix(", cache"), Quant())
    if "cache" in mode:
        quant = replace(quant, kv_cache="int8")
    model, build = MODELS[name], build_config(packed=packed, quant=quant.config)
    held = quantized_weights(model, quant)
    network = NetworkBuild(trt_library.load(), model, build, RANK, held)
    plan = io.BytesIO()
    network.write_plan(plan)
    assert plan.tell() > 0
    session = PlainSession(model, build, held, quant)
    session.start(2, 8)
    evaluator = NetworkEvaluator(network.trt, network.network, network.side_table)
    ids = torch.tensor([[3, 14, 15, 9], [27, 18, 28, 5]])
    caches = {
        port.name: torch.zeros(port.shape_for({"B": 2}), dtype=torch.int8 if quant.kv_cache else torch.float32)
        for port in trt_io.cache_inputs(model, build, Mapping())
    }
    for first, tokens in ((0, ids), (4, torch.tensor([[7], [8]])), (5, torch.tensor([[60], [61]]))):
        expected = session.context(tokens.tolist()) if first == 0 else session.generation(tokens[:, 0])
        values = evaluator(step_inputs(tokens, first, packed=packed) | caches)
        error = relative_error(values["logits"][:, : model.vocab_size], expected)
        assert error < 1e-4
        record(name, build, built="default", error=error)
        caches = {key: values[key.replace("past", "present")] for key in caches}


@pytest.mark.parametrize("buckets", [(), (2,)], ids=["any size", "buckets"])
@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
def test_session_with_an_int8_cache(captured: bool, buckets: tuple[int, ...]) -> None:
    """Steps go to and fro between two caches; prompts of several lengths, batches of several sizes."""
    quant = Quant("int8", kv_cache="int8")
    model, build = MODELS["gpt2"], build_config(batch_buckets=buckets, quant=quant.config)
    held = quantized_weights(model, quant)
    engine = stand_in_engine(model, build, RANK, held)
    capture = (lambda phase: phase.context.captured()) if captured else None
    session = TrtSession(engine, model, build, RANK, "cpu", engine.trt, capture=capture)
    reference = PlainSession(model, build, held, quant)
    for seed, lengths in enumerate([(3,), (5, 2, 7), (4, 9), (1, 1, 6)]):
        prompts = random_prompts(lengths, model.vocab_size, seed)
        both = [generate(each, Request(prompts, max_new_tokens=7)).tokens for each in (session, reference)]
        assert both[0] == both[1]


def step_inputs(tokens: torch.Tensor, first: int, *, packed: bool) -> dict[str, torch.Tensor]:
    batch, width = tokens.shape
    inputs = {
        "input_ids": tokens,
        "position_ids": torch.arange(first, first + width).repeat(batch, 1),
        "last_token_ids": torch.full((batch,), width - 1),
        "cache_write_index": torch.full((batch,), first),
    }
    if packed:
        inputs = {name: tensor.flatten() for name, tensor in inputs.items()}
        everything = torch.arange(batch * width)
        inputs |= {"padded_from_packed": everything.view(batch, width), "packed_from_padded": everything}
        inputs["last_token_ids"] = everything.view(batch, width)[:, -1].contiguous()
    return {name: tensor.int() for name, tensor in inputs.items()}


def test_scales_of_no_axis_are_refused() -> None:
    tiny = Tiny()
    x = tiny.layers.input("x", "int8", (4, 8))
    layer = tiny.network.add_dequantize(x, tiny.layers.constant(torch.ones(4)), tiny.trt.float32)
    layer.axis = 0
    tiny.network.mark_output(layer.get_output(0))
    layer.axis = -1
    with pytest.raises(EngineError, match="of no axis"):
        tiny.evaluate(x=torch.zeros(4, 8, dtype=torch.int8))
