"""What TensorRT can build, said before it tries."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from gpt.config import BuildConfig, ModelConfig
from gpt.engine import trt_io
from gpt.engine.trt_library import (
    TENSORRT,
    TENSORRT_RTX,
    compute_capability,
    has_plugins,
    library_name,
    load_for_build,
)
from gpt.errors import ConfigError, Problems

# GPU generations as people call them, in TensorRT-RTX's compute capabilities.  It has none for Hopper, 9.0.
TARGETS: dict[str, tuple[str, ...]] = {
    "turing": ("SM75",),
    "ampere": ("SM80", "SM86"),
    "ada": ("SM89",),
    "blackwell": ("SM120", "SM121"),
    **{name: (name,) for name in ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")},
}
DEFAULT_TARGET = "default"
# Every compute capability that TensorRT-RTX has, with some of its cards.
_CARDS = {
    "SM75": "GeForce RTX 20, Quadro RTX, T4",
    "SM80": "A100, A30",
    "SM86": "GeForce RTX 30, RTX A2000 to A6000, A10",
    "SM89": "GeForce RTX 40, RTX Ada, L4, L40S",
    "SM120": "GeForce RTX 50, RTX PRO Blackwell",
    "SM121": "GB10 (DGX Spark)",
}
# What the library multiplies on some targets only; int8 it multiplies on all.
_FIRST_CAPABILITY = {"int4": (80, "ampere"), "fp8": (89, "ada")}
_LARGEST_DIMENSION = 2**31 - 1
MOST_PROFILES = 8  # more were not tried
_FIRST_PLUGIN_CAPABILITY = 80
_LARGEST_PLUGIN_HEAD = 256  # what fits the shared memory of a program
# A line above the peaks that benchmarks/bench_trt_build.py measured in float16: 892 MiB for 237 MiB of weights with
# fused attention, 1045 MiB with separate layers, 1444 MiB for 677 MiB, 4031 MiB for 2971 MiB.
_BASE_BYTES = 800 * 2**20
_BYTES_PER_WEIGHT_BYTE = 1.25
# What plans of 1 to 24 layers held besides weights stays below these lines, for every target and number of targets.
_PLAN_BASE_BYTES = 3 * 2**20
_PLAN_BYTES_PER_FUSED_LAYER = int(1.5 * 2**20)
_PLAN_BYTES_PER_PLAIN_LAYER = int(2.7 * 2**20)


def compute_capabilities(targets: tuple[str, ...]) -> list[str]:
    """The library's names of `targets` in order, without repetitions; none for "default" and for no
    targets: the library's own choice.

    Raises ConfigError for unknown names, listing those there are.
    """
    if [target.lower() for target in targets] == [DEFAULT_TARGET]:
        return []
    spelled = {name.lower(): names for name, names in TARGETS.items()}
    unknown = [target for target in targets if target.lower() not in spelled]
    if unknown:
        raise ConfigError(
            "unknown target",
            found=", ".join(unknown),
            allowed=f"{DEFAULT_TARGET} alone, or any of {', '.join(TARGETS)}",
            hint="TensorRT-RTX builds for no other cards; for data-centre ones (H100, B200) install "
            "requirements-tensorrt.txt on a machine with the card and leave --target out",
        )
    return list(dict.fromkeys(name for target in targets for name in spelled[target.lower()]))


def loadable_cards(capabilities: list[str]) -> dict[str, str]:
    """Compute capability -> cards that can load an engine of these targets; none named: the library's own choice,
    which may be any of those it knows."""
    return {name: cards for name, cards in _CARDS.items() if not capabilities or name in capabilities}


def describe_capability(capability: tuple[int, int]) -> str:
    return f"compute capability {capability[0]}.{capability[1]}"


def plugins_of(trt: Any, model: ModelConfig, build: BuildConfig) -> tuple[str, ...]:
    """`BuildConfig.plugins`: of the plugins that the flags ask for those that the library takes and that this
    engine has work for."""
    if _why_no_plugins(trt):
        return ()
    wanted = {
        "attention": build.gpt_attention_plugin is not None and model.head_size <= _LARGEST_PLUGIN_HEAD,
        "gemm": build.gemm_plugin is not None and build.quant.weights in ("int8", "int4"),
        "layernorm": build.layernorm_plugin is not None,
        "lookup": build.lookup_plugin is not None,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _why_no_plugins(trt: Any) -> str:
    if not has_plugins(trt):
        return f"{library_name(trt)} takes none"
    if compute_capability(trt) < _FIRST_PLUGIN_CAPABILITY:
        return "Triton compiles them for compute capability 8.0 and above"
    return "" if find_spec("triton") else "Triton, which compiles them, is not installed"


def with_plugins(model: ModelConfig, build: BuildConfig) -> BuildConfig:
    """`build` with the plugins of the library that builds for its targets.  Raises ConfigError where there is none."""
    return replace(build, plugins=plugins_of(load_for_build(build.targets), model, build))


def check_build(model: ModelConfig, build: BuildConfig) -> list[str]:
    """What is worth saying about this build, one line each.

    Raises ConfigError where TensorRT is missing, or listing everything that it could not build.
    """
    trt = load_for_build(build.targets)
    problems = Problems()
    capabilities = compute_capabilities(build.targets)
    if "SM75" in capabilities and build.dtype != "float16":
        problems.add(f"target SM75 (Turing) with dtype {build.dtype}: it multiplies in float16 only")
    if build.max_batch_size * build.max_input_len > _LARGEST_DIMENSION:
        problems.add(
            f"max_batch_size {build.max_batch_size} * max_input_len {build.max_input_len} tokens: more than 2^31 - 1"
        )
    if build.builder_opt is not None and not 0 <= build.builder_opt <= 5:
        problems.add(f"builder_opt {build.builder_opt}: allowed 0 to 5")
    native = build.fused_attention and "attention" not in build.plugins
    if native and not _fused_head_size_builds(model.head_size, build.dtype):
        problems.add(
            f"head size {model.head_size} with fused attention in {build.dtype}: above 8 it must be a multiple of 8; "
            "without --use_gpt_attention_plugin and --enable_context_fmha any head size works, as does --dtype float32"
        )
    if library_name(trt) == TENSORRT and build.quant.weights == "fp8":  # of the GPU that builds
        capabilities = [f"SM{compute_capability(trt)}"]
    _check_quantization(build, capabilities, problems)
    if build.refit and library_name(trt) == TENSORRT_RTX and _gpu_capability() is None:
        problems.add("refit: TensorRT-RTX makes plans with replaceable weights on a machine with a GPU only")
    if trt_io.num_profiles(build) > MOST_PROFILES:
        problems.add(
            f"batch_buckets {' '.join(map(str, build.batch_buckets))}: {trt_io.num_profiles(build)} profiles, allowed: "
            f"{MOST_PROFILES}"
        )
    problems.raise_if_any(
        ConfigError, "TensorRT cannot build this engine", hint="change the above, or use --backend torch"
    )
    return _notes(trt, model, build)


def _check_quantization(build: BuildConfig, capabilities: list[str], problems: Problems) -> None:
    quant = build.quant
    if quant.kv_cache == "fp8":
        problems.add("fp8_kv_cache: the quantised cache of these networks is int8 (--int8_kv_cache)")
    first, card = _FIRST_CAPABILITY.get(quant.weights or "", (0, ""))
    too_old = [name for name in capabilities if int(name.removeprefix("SM")) < first]
    if too_old:
        problems.add(f"{quant.weights} weights for target {', '.join(too_old)}: they begin with SM{first} ({card})")


def estimate_build_bytes(weight_bytes: int) -> int:
    """Peak memory of the process while it builds, weights included, from a line above measured builds."""
    return _BASE_BYTES + int(_BYTES_PER_WEIGHT_BYTE * weight_bytes)


def estimate_plan_bytes(model: ModelConfig, build: BuildConfig, weight_bytes: int) -> int:
    """Size of the plan: the weights and the code of each layer, from a line above measured builds."""
    per_layer = _PLAN_BYTES_PER_FUSED_LAYER if build.fused_attention else _PLAN_BYTES_PER_PLAIN_LAYER
    return weight_bytes + _PLAN_BASE_BYTES + model.n_layer * per_layer


def _fused_head_size_builds(head_size: int, dtype: str) -> bool:
    """In half precision the library fails for other sizes (9 to 256 tried), even where it may write attention out."""
    return dtype == "float32" or head_size % 8 == 0 or head_size < 8


def _notes(trt: Any, model: ModelConfig, build: BuildConfig) -> list[str]:
    cards = ", ".join(compute_capabilities(build.targets)) or "its own choice of cards"
    if library_name(trt) == TENSORRT:
        cards = "this machine's kind of GPU"
    notes = [f"Library: {library_name(trt)} {trt.__version__}, for {cards}", _attention_note(model, build)]
    if build.context_fmha:
        notes.append("Context FMHA: the fused attention layer works in both phases and chooses its accumulation itself")
    if build.gpt_attention_plugin not in (None, build.dtype):
        notes.append(f"Attention plugin: {build.gpt_attention_plugin} asked for, the engine's {build.dtype} selected")
    notes += _plugin_notes(trt, build)
    if build.remove_input_padding:
        notes.append("Remove Padding Enabled: packed everywhere but inside attention")
    if build.timing_cache is not None and library_name(trt) == TENSORRT_RTX:
        notes.append("Timing cache: TensorRT-RTX has none, it chooses kernels on the machine that runs the engine")
    if build.batch_buckets:
        sizes = ", ".join(map(str, build.generation_batches))
        notes.append(f"Generation is compiled for batches of {sizes}; others are filled up to the next of them")
    capability = _gpu_capability()
    if library_name(trt) == TENSORRT_RTX and capability is not None:
        loadable = loadable_cards(compute_capabilities(build.targets))
        if "SM{}{}".format(*capability) not in loadable:
            here = describe_capability(capability)
            notes.append(f"This machine's GPU ({here}) cannot load this engine; cards of {', '.join(loadable)} can")
    return notes


def _plugin_notes(trt: Any, build: BuildConfig) -> list[str]:
    """One line for the plugins there are, one for each flag that gets the library's own layers, with the reason."""
    flags = {
        "attention": (build.gpt_attention_plugin, f"its kernel takes head sizes to {_LARGEST_PLUGIN_HEAD}"),
        "gemm": (build.gemm_plugin, "it multiplies int8 and int4 weights"),
        "layernorm": (build.layernorm_plugin, ""),
        "lookup": (build.lookup_plugin, ""),
    }
    notes = []
    if build.plugins:
        notes.append(f"Plugins: {', '.join(build.plugins)}, Triton kernels compiled into the plan")
    missing = [name for name, (dtype, _) in flags.items() if dtype is not None and name not in build.plugins]
    reason = _why_no_plugins(trt)
    if missing and reason:
        return [f"Plugins: {reason}; the library's own layers do {', '.join(missing)}"]
    return notes + [f"Plugins: {name} is done by the library's own layers: {flags[name][1]}" for name in missing]


def _attention_note(model: ModelConfig, build: BuildConfig) -> str:
    if "attention" in build.plugins:
        return f"Attention: plugin, {build.quant.kv_cache or build.dtype} cache in place"
    cache = "cache in place"
    if build.quant.kv_cache:
        cache = "two int8 caches that steps go to and fro between, together as large as one in half precision"
    if not build.fused_attention:
        return f"Attention: products and float32 softmax, {cache}; --use_gpt_attention_plugin fuses them"
    if build.dtype == "float32" or not 16 <= model.head_size <= 256:
        what = "float32" if build.dtype == "float32" else f"head size {model.head_size}"
        return f"Attention: IAttention, {cache}; TensorRT has no fused kernel for {what} and writes it out"
    return f"Attention: fused IAttention, {cache}"


def _gpu_capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
