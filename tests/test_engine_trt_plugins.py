"""Networks with plugins, over the stand-in for `tensorrt`: beside the torch engine, and what a build would embed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import compiling
from engines import build_engine, random_prompts
from plugin_cases import BOUNDS, Case, cases, largest_error
from test_engine_quant import FAMILIES, INT8_BOUND, MODES, WEIGHT_ONLY_BOUND
from test_engine_trt_quant_modes import CACHE, LIMITS, SIZES
from trt_matrix import record
from trt_models import MODELS, RANK, build_config, define, random_weights

from gpt.config import BuildConfig, ModelConfig
from gpt.engine import builder, trt_check
from gpt.engine.folder import EngineInfo, open_engine
from gpt.engine.inspection import inspect
from gpt.engine.trt_check import check_build, plugins_of
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_graph import config_network, network_layers
from gpt.engine.trt_io import cache_inputs, outputs
from gpt.engine.trt_plugin_api import ShapeExpr, TensorDesc, without_libraries
from gpt.engine.trt_plugin_kernels import PLUGINS, Lookup
from gpt.engine.trt_plugin_stand_in import StandIn, load_with_plugins
from gpt.engine.trt_plugins import definition
from gpt.engine.trt_stand_in import stand_in_engine
from gpt.errors import ConfigError, EngineError
from gpt.quant import QuantConfig
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trace import compare_engines
from gpt.runtime.trt_session import TrtSession

pytestmark = pytest.mark.tensorrt

ALL = ("attention", "gemm", "layernorm", "lookup")
CASES = [
    ("gpt2", "float", ALL, [], "float32"),
    ("gpt2", "float", ("attention", "layernorm", "lookup"), ["--remove_input_padding"], "float16"),
    ("gpt2", "float", ("lookup",), [], "float32"),
    ("gpt2", "int8", ALL, [*CACHE, "--remove_input_padding"], "float32"),
    ("gpt2", "int4 groups", ALL, CACHE, "float32"),
    ("gpt2", "int4", ("gemm",), [], "float32"),
    ("gpt2", "smooth both", ALL, CACHE, "float32"),
    ("gpt2", "smooth token", ("gemm",), [], "float32"),
    ("gpt2", "smooth both", ("layernorm",), [], "float32"),
    ("gpt-next", "smooth both", ALL, ["--remove_input_padding"], "float32"),
    ("gpt-next", "int4 groups", ALL, CACHE, "float32"),
    ("multi-query", "smooth token", ALL, CACHE, "float32"),
]


@pytest.mark.parametrize(("family", "mode", "plugins", "more", "dtype"), CASES)
def test_networks_with_plugins_compute_what_torch_engines_do(
    family: str, mode: str, plugins: tuple[str, ...], more: list[str], dtype: str, tmp_path: Path
) -> None:
    """Every named tensor of the prompts' step and of two generation steps."""
    flags = [*SIZES, *LIMITS, *FAMILIES[family], *MODES.get(mode, []), *more, "--dtype", dtype]
    reference = build_engine(None, tmp_path / "torch", *flags)
    plan = with_plugins(reference, plugins)
    bound = 5e-3 if dtype == "float16" else INT8_BOUND if mode.startswith("smooth") or more else WEIGHT_ONLY_BOUND
    comparison = compare_engines(plan, reference, bound=bound)
    assert comparison.first is None, list(comparison.lines())
    record(family, plan.build, error=max(one.error for one in comparison.differences))


def with_plugins(info: EngineInfo, plugins: tuple[str, ...]) -> EngineInfo:
    """The engine that `tensorrt` would have built."""
    return replace(info, build=replace(info.build, backend="tensorrt", plugins=plugins))


@pytest.fixture(scope="module")
def library() -> StandIn:
    trt = load_with_plugins()
    assert isinstance(trt, StandIn)
    return trt


def test_only_the_plugins_that_were_chosen_are_in_the_network() -> None:
    kinds: dict[tuple[str, ...], dict[str, str]] = {}
    for plugins in (ALL, ("attention",), ()):
        layers = network_layers(config_network(MODELS["gpt2"], build_config(plugins=plugins)).network)
        kinds[plugins] = {layer.kind: layer.operation for layer in layers if layer.kind.startswith("PLUGIN")}
    assert kinds[()] == {}
    assert kinds["attention",] == {"PLUGIN attention": "attention 1"}
    assert set(kinds[ALL]) == {"PLUGIN attention", "PLUGIN norm", "PLUGIN lookup"}


def test_what_a_plugin_hands_on() -> None:
    """Biases of a sum over ranks are added once, behind it; products that round their inputs themselves get float32."""
    for world_size, has_bias in ((1, [True, True]), (3, [True, False])):
        build = build_config("float16", world_size=world_size, plugins=ALL, quant=QuantConfig("int8"))
        found = [facts_of(build, f"linear model.layers.0.attention.{name}") for name in ("query_key_value", "dense")]
        assert [facts["attributes"]["has_bias"] for facts in found] == has_bias
    for activations, dtype in ((None, "HALF"), ("per_token", "FLOAT")):
        build = build_config("float16", plugins=("layernorm",), quant=QuantConfig("int8", activations))
        facts = facts_of(build, "layer_norm model.layers.0.input_layernorm model.layers.0.attention.query_key_value")
        assert (facts["plugin"], facts["attributes"]["dtype"]) == ("norm", dtype)
    smooth = build_config("float16", plugins=ALL, quant=QuantConfig("int8", "per_tensor"))
    assert facts_of(smooth, "linear model.layers.0.attention.dense")["plugin"] == "int8_gemm"


def facts_of(build: BuildConfig, operation: str) -> dict[str, Any]:
    """What the last layer of an operation carries."""
    network = config_network(MODELS["gpt2"], build).network
    every = [json.loads(network.get_layer(index).metadata or "{}") for index in range(network.num_layers)]
    found: dict[str, Any] = [facts for facts in every if facts.get("operation") == operation and "plugin" in facts][-1]
    return found


def test_attributes_of_a_plugin_matter(library: Any) -> None:
    """The evaluation goes by what the layer carries."""
    model, build = MODELS["rotary_swiglu_grouped"], build_config(plugins=ALL)
    network = define(library, model, build)
    engine = NetworkEvaluator(library, network.network, network.side_table)
    layers = [network.network.get_layer(index) for index in range(network.network.num_layers)]
    attention = next(layer for layer in layers if layer.name == "gpt::attention")
    inputs = {
        "input_ids": torch.tensor([[3, 1, 4]], dtype=torch.int32),
        "position_ids": torch.tensor([[0, 1, 2]], dtype=torch.int32),
        "last_token_ids": torch.tensor([2], dtype=torch.int32),
        "cache_write_index": torch.tensor([0], dtype=torch.int32),
    }
    inputs |= {port.name: torch.zeros(port.shape_for({"B": 1})) for port in cache_inputs(model, build, RANK)}
    before = engine({name: tensor.clone() for name, tensor in inputs.items()})["logits"]
    facts = json.loads(attention.metadata)
    for name, value in (("scale", 0.01), ("rotary_dim", 0)):
        attention.metadata = json.dumps({**facts, "attributes": {**facts["attributes"], name: value}})
        after = engine({name: tensor.clone() for name, tensor in inputs.items()})["logits"]
        assert (after - before).abs().max() > 1e-4
    attention.metadata = json.dumps({**facts, "plugin": "other"})
    with pytest.raises(EngineError, match="plugin other"):
        engine(inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_sessions_with_plugins_generate_what_torch_does(name: str, packed: bool) -> None:
    """Batches of several sizes through buckets and captured steps, prompts of several lengths."""
    model = MODELS[name]
    build = build_config(packed=packed, plugins=ALL, batch_buckets=(2,))
    weights = random_weights(model)
    engine = stand_in_engine(model, build, RANK, weights)
    session = TrtSession(engine, model, build, RANK, "cpu", engine.trt, capture=lambda phase: phase.context.captured())
    reference = TorchSession(model, build, RANK, weights)
    for seed, lengths in enumerate([(5, 1, 11, 3), (12,), (7, 2)]):
        prompts = random_prompts(lengths, model.vocab_size, seed)
        both = [generate(each, Request(prompts, max_new_tokens=12)).tokens for each in (session, reference)]
        assert both[0] == both[1]


def test_an_int8_cache_in_place_is_one_cache() -> None:
    quant = QuantConfig(kv_cache="int8")
    model, plain = MODELS["gpt2"], build_config("float16", quant=quant)
    build = replace(plain, plugins=("attention",))
    assert (build.cache_in_place, plain.cache_in_place) == (True, False)
    assert 2 * build.kv_cache_bytes(model, 3, 20) == plain.kv_cache_bytes(model, 3, 20)
    assert [port.alias for port in outputs(model, build, RANK)] == [None] * 5


def test_flags_choose_plugins_where_the_library_has_them(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["gpt2"]
    every = build_config(fused=True, gemm_plugin="float32", layernorm_plugin="float32", lookup_plugin="float32")
    assert plugins_of(library, model, every) == ("attention", "layernorm", "lookup")  # a float product is no plugin's
    assert plugins_of(library, model, replace(every, quant=QuantConfig("int8"))) == ALL
    assert plugins_of(library, model, replace(every, quant=QuantConfig("fp8", "per_token"))) == plugins_of(
        library, model, every
    )
    assert plugins_of(library, model, build_config()) == ()
    assert plugins_of(library, replace(model, n_embd=3 * 264), every) == ("layernorm", "lookup")
    assert plugins_of(library.rtx, model, every) == ()
    monkeypatch.setattr(library, "compute_capability", 75)
    assert plugins_of(library, model, every) == ()
    monkeypatch.setattr(trt_check, "load_for_build", lambda targets: library)
    expected = (
        "Plugins: Triton compiles them for compute capability 8.0 and above; the library's own layers do attention"
    )
    assert f"{expected}, gemm, layernorm, lookup" in check_build(model, every)
    monkeypatch.setattr(library, "compute_capability", 90)
    monkeypatch.setattr(trt_check, "find_spec", lambda name: None)
    assert plugins_of(library, model, every) == ()


def test_a_library_without_plugins_says_so_in_one_line() -> None:
    build = build_config(fused=True, lookup_plugin="float32")
    notes = [note for note in check_build(MODELS["gpt2"], build) if note.startswith("Plugins")]
    assert notes == ["Plugins: tensorrt_rtx takes none; the library's own layers do attention, lookup"]


def test_notes_of_plugins(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_check, "load_for_build", lambda targets: library)
    build = build_config("float16", fused=True, gemm_plugin="float16", quant=QuantConfig(kv_cache="int8"))
    chosen = trt_check.with_plugins(MODELS["gpt2"], build)
    assert chosen.plugins == ("attention",)
    notes = check_build(MODELS["gpt2"], chosen)
    assert "Attention: plugin, int8 cache in place" in notes
    assert "Plugins: attention, Triton kernels compiled into the plan" in notes
    assert "Plugins: gemm is done by the library's own layers: it multiplies int8 and int4 weights" in notes
    odd = replace(MODELS["gpt2"], n_embd=3 * 20)  # the library's fused layer takes no such head in half precision
    assert trt_check.check_build(odd, chosen)


def test_fp8_on_a_gpu_without_it_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorrt` builds for the GPU there is."""
    monkeypatch.setattr(trt_check, "load_for_build", lambda targets: library)
    build = build_config("float16", quant=QuantConfig("fp8", "per_token"))
    assert check_build(MODELS["gpt2"], build)[0].endswith(", for this machine's kind of GPU")
    monkeypatch.setattr(library, "compute_capability", 80)
    with pytest.raises(ConfigError, match="fp8 weights for target SM80: they begin with SM89"):
        check_build(MODELS["gpt2"], build)


def test_a_plan_is_told_that_its_cache_is_written_in_place(library: Any) -> None:
    for plugins, expected in ((("attention",), True), (("lookup",), False)):
        network = define(library, MODELS["gpt2"], build_config(plugins=plugins))
        feature = library.PreviewFeature.ALIASED_PLUGIN_IO_10_03
        assert network._config().get_preview_feature(feature) is expected


def test_the_stand_in_takes_what_the_library_takes() -> None:
    trt = without_libraries()
    with pytest.raises(TypeError):
        2 * ShapeExpr(3)  # type: ignore[operator]
    lookup: Any = definition(trt, Lookup)
    assert lookup is definition(trt, Lookup)
    with pytest.raises(ValueError, match="expected"):
        lookup(None, None, width=8, capability=90)  # the order counts
    with pytest.raises(ValueError, match="expected"):
        lookup(None, None, capability=90, width=8.0)
    with pytest.raises(ValueError, match="expected"):
        lookup(None, capability=90, width=8)

    def describe(width: int, x: TensorDesc) -> tuple[TensorDesc]:
        return (x,)

    describe.__annotations__ = {"width": int, "x": TensorDesc, "return": tuple[TensorDesc]}
    with pytest.raises(ValueError, match="tensors come first"):
        trt.plugin.register("gpt::other")(describe)


@pytest.mark.parametrize(
    "case", [case for case in cases(90) if case.dtype != torch.bfloat16], ids=lambda case: case.name
)
def test_launches_compute_the_reference(case: Case) -> None:
    """Every tactic with the constants it is compiled with, as many programs as are launched, arguments in order."""
    for tactic in range(1, case.plugin.num_tactics + 1):
        assert largest_error(case.interpreted(tactic), case.expected()) < BOUNDS[case.dtype], tactic


# No two that differ by the type alone, to save time; the GPU test compiles and runs all.
WORDS = ("float16", "grouped", "256", "product", "norm", "integers", "lookup")


@pytest.mark.parametrize(
    ("capability", "target", "words"),
    [(90, "sm_90a", WORDS), (80, "sm_80", ("multi", "5 rows")), (100, "sm_100a", ("5 rows", "lookup"))],
)
def test_what_a_build_embeds(capability: int, target: str, words: tuple[str, ...]) -> None:
    """Compiled for a compute capability without a GPU: one entry; inputs, sizes and outputs in their order."""
    program = Path(__file__).parent / "plugin_cases.py"
    lines = [json.loads(line) for line in compiling(str(program), str(capability), *words).splitlines()]
    wanted = [case for case in cases(capability) if any(word in case.name for word in words)]
    if capability == 90:
        assert {line["plugin"] for line in lines} == {plugin.name for plugin in PLUGINS}
    for line, case in zip(lines, wanted, strict=True):
        assert len(line["tactics"]) == case.plugin.num_tactics
        for tactic in line["tactics"].values():
            before, after = ["u64"] * len(case.inputs), ["u64"] * case.plugin.num_outputs
            expected = [*before, *["u32"] * len(tactic["sizes"]), *after]
            assert tactic["parameters"][: len(expected)] == expected
            assert tactic["parameters"][len(expected) :] == ["u64"] * 2  # scratch, for which null is passed
            assert tactic["target"] == [target]
            assert 0 <= tactic["shared_mem"] <= 48 << 10
            assert tactic["block_x"] % 32 == 0
            assert min(tactic[f"grid_{axis}"] for axis in "xyz") >= 1


def test_a_kernel_that_needs_more_than_a_launch_is_refused() -> None:
    """In a process that compiles: too much shared memory, parameters out of order, another entry than the one named."""
    source = """
from dataclasses import replace
from plugin_cases import BOUNDS, Case, cases, largest_error
from gpt.errors import ConfigError
from gpt.kernels.aot import compile_kernel, ptx_parameters
case = next(case for case in cases(90) if case.name == "int8 product of 150 rows")
call = case.plugin.call([*case._types(), "HALF"], 2)
for wrong in (
    replace(call, num_stages=5, constants={**call.constants, "STAGES": 5}),
    replace(call, types=dict(reversed(call.types.items()))),
):
    try:
        compile_kernel(wrong, 90)
    except ConfigError as error:
        print(error)
try:
    ptx_parameters(".entry a() .entry b()", "a")
except ConfigError as error:
    print(error)
"""
    done = compiling("-c", source)
    assert "bytes of shared memory, allowed: 49152" in done
    assert "the parameters do not stand in this order" in done
    assert "the code does not have one entry" in done


def test_the_interpreter_compiles_nothing() -> None:
    case = next(cases(90))
    with pytest.raises(ConfigError, match="interpreter"):
        case.kernels()


def test_an_engine_says_which_plugins_its_plan_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the library's choice through the build into config.json and what check.py says."""
    given = []

    def build_plan(model: ModelConfig, build: BuildConfig, mapping: Any, weights: Any, path: Path) -> None:
        given.append(build.plugins)
        path.write_bytes(b"a plan")

    monkeypatch.setattr(builder, "with_plugins", lambda model, build: replace(build, plugins=("attention",)))
    monkeypatch.setattr(builder, "build_plan", build_plan)
    info = build_engine(None, tmp_path, *SIZES, *LIMITS, "--backend", "tensorrt", "--use_gpt_attention_plugin")
    assert given == [("attention",)]
    assert open_engine(tmp_path).build.plugins == info.build.plugins == ("attention",)
    assert "compiled into the plan: attention" in inspect(tmp_path).facts["options"]
