"""What a model is and how an engine was built: two frozen records, checked, saved beside what they describe.

Letters used all over the package: B batch, S tokens of this step, T tokens so far, N packed tokens, E hidden size, H
query heads, G key/value heads, D head size, F MLP inner size, V vocabulary, L layers, R ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt.dtypes import ITEMSIZE, canonical_dtype
from gpt.errors import ConfigError, Problems
from gpt.quant import FLOAT, QuantConfig


@dataclass(frozen=True)
class Activation:
    """`function` is one of gelu_erf, gelu_tanh, quick_gelu, relu, squared_relu, silu, tanh, sigmoid; a gated MLP
    computes proj(function(fc(x)) * gate(x))."""

    function: str
    gated: bool = False


# Every spelling that HF, FasterTransformer and NeMo write, with the meaning of the tool it comes from (plain
# `gelu` is HF's erf).
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation("gelu_erf"),
    "gelu_python": Activation("gelu_erf"),
    "gelu_erf": Activation("gelu_erf"),
    "gelu_new": Activation("gelu_tanh"),
    "gelu_fast": Activation("gelu_tanh"),
    "gelu_accurate": Activation("gelu_tanh"),
    "gelu_pytorch_tanh": Activation("gelu_tanh"),
    "gelu_python_tanh": Activation("gelu_tanh"),
    "gelu_tanh": Activation("gelu_tanh"),
    "quick_gelu": Activation("quick_gelu"),
    "relu": Activation("relu"),
    "relu2": Activation("squared_relu"),
    "squared-relu": Activation("squared_relu"),
    "squared_relu": Activation("squared_relu"),
    "silu": Activation("silu"),
    "swish": Activation("silu"),
    "tanh": Activation("tanh"),
    "sigmoid": Activation("sigmoid"),
    "swiglu": Activation("silu", gated=True),
    "fast-swiglu": Activation("silu", gated=True),
    "geglu": Activation("gelu_tanh", gated=True),
    "fast-geglu": Activation("gelu_tanh", gated=True),
    "geglu_erf": Activation("gelu_erf", gated=True),
    "reglu": Activation("relu", gated=True),
    "fast-reglu": Activation("relu", gated=True),
}

NORMALIZATIONS = ("layernorm", "rmsnorm")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, independent of where the weights came from, their dtype and the number of ranks."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_head: int
    n_layer: int
    n_kv_head: int
    inter_size: int
    hidden_act: str = "gelu"
    bias: bool = True
    layer_norm_epsilon: float = 1e-5
    rotary_pct: float = 0.0
    rotary_base: float = 10000.0
    rotary_scaling: float = 1.0  # positions are divided by it (linear interpolation, Chen et al. 2023)
    normalization: str = "layernorm"  # or "rmsnorm" (Zhang and Sennrich 2019), which has no biases
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tied_head: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "n_kv_head", "inter_size"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                problems.add(f"{name}: found {value}, allowed: 1 to {2**31 - 1}")
        if not problems:
            if self.n_embd % self.n_head:
                problems.add(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
            if self.n_head % self.n_kv_head:
                problems.add(f"n_head {self.n_head} is not divisible by the number of key/value heads {self.n_kv_head}")
            rotated = f"rotary_pct {self.rotary_pct} of a head of {self.head_size} rotates"
            if not 0.0 <= self.rotary_pct <= 1.0:
                problems.add(f"rotary_pct: found {self.rotary_pct}, allowed: 0 to 1")
            elif self.rotary_dim % 2:
                problems.add(f"{rotated} {self.rotary_dim} values, an odd number")
            elif self.rotary_pct > 0 and self.rotary_dim == 0:
                problems.add(f"{rotated} nothing")
        if not self.rotary_scaling > 0.0:
            problems.add(f"rotary_scaling: found {self.rotary_scaling}, allowed: above 0")
        if self.normalization not in NORMALIZATIONS:
            problems.add(f"normalization: found {self.normalization!r}, allowed: {', '.join(NORMALIZATIONS)}")
        if not 0.0 < self.layer_norm_epsilon < 1.0:
            problems.add(f"layer_norm_epsilon: found {self.layer_norm_epsilon}, allowed: above 0, below 1")
        if self.hidden_act not in ACTIVATIONS:
            problems.add(f"hidden_act: found {self.hidden_act!r}, allowed: {', '.join(ACTIVATIONS)}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and value < 0:
                problems.add(f"{name}: found {value}, allowed: 0 or more")
        problems.raise_if_any(ConfigError, "the model configuration is not valid")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def qkv_size(self) -> int:
        """Width of the fused projection, (H + 2G) * D."""
        return (self.n_head + 2 * self.n_kv_head) * self.head_size

    @property
    def multi_query(self) -> bool:
        return self.n_kv_head == 1 and self.n_head > 1

    @property
    def rotary_dim(self) -> int:
        return int(self.head_size * self.rotary_pct)

    @property
    def learned_positions(self) -> bool:
        return self.rotary_pct == 0.0

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.hidden_act]

    def attention_scale(self, layer: int) -> float:
        """The factor of the scores: 1/sqrt(D) or 1; over layer + 1 with HF's scale_attn_by_inverse_layer_idx."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def padded_vocab_size(self, world_size: int = 1) -> int:
        """V rounded up to a multiple of lcm(8, R): what the head really multiplies; the padding is never chosen."""
        step = math.lcm(8, world_size)
        return -(-self.vocab_size // step) * step

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        return cls(**_known_fields(cls, values))


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a saved record's keys; raises ConfigError for unknown or missing ones."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = Problems()
    for name in values:
        if name not in fields:
            problems.add(f"{name}: unknown key")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            problems.add(f"{name}: missing")
    problems.raise_if_any(ConfigError, f"this is no saved {cls.__name__}")
    return dict(values)


PROFILING_VERBOSITIES = ("layer_names_only", "detailed", "none")


@dataclass(frozen=True)
class BuildConfig:
    """How an engine is built: the options of build.py after defaults and the checkpoint have been taken in.

    A plugin field holds a dtype name, or None where the plugin is off.  `context_fmha` is 0 off, 1 half-precision
    accumulation, 2 fp32 accumulation.  `tokens_per_block` and `max_num_tokens`, of a step, belong to `paged_kv_cache`.
    `embedding_sharding_dim` is 0 by vocabulary, 1 by hidden size.  `seed` is set for random weights only.  `quant` says
    what is quantised.  For TensorRT: `batch_buckets` are the numbers of sequences, beams counted, that generation is
    compiled for one by one, beside the largest; none: one profile for all numbers.  `plugins`: those that the plan has,
    of attention, gemm, layernorm and lookup.
    """

    dtype: str = "float16"
    backend: str = "torch"
    targets: tuple[str, ...] = ()
    world_size: int = 1
    max_batch_size: int = 256
    max_input_len: int = 200
    max_output_len: int = 200
    max_beam_width: int = 1
    max_prompt_embedding_table_size: int = 0
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    parallel_build: bool = False
    gpt_attention_plugin: str | None = None
    gemm_plugin: str | None = None
    layernorm_plugin: str | None = None
    lookup_plugin: str | None = None
    context_fmha: int = 0
    remove_input_padding: bool = False
    paged_kv_cache: bool = False
    tokens_per_block: int = 64
    use_inflight_batching: bool = False
    max_num_tokens: int = 2048
    builder_opt: int | None = None
    batch_buckets: tuple[int, ...] = ()
    profiling_verbosity: str = "layer_names_only"
    weight_streaming: bool = False
    refit: bool = False
    timing_cache: str | None = None
    seed: int | None = None
    quant: QuantConfig = FLOAT
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        canonical_dtype(self.dtype)
        problems = Problems()
        sizes = ("world_size", "max_batch_size", "max_input_len", "max_output_len", "max_beam_width")
        for name in (*sizes, "tokens_per_block", "max_num_tokens"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                problems.add(f"{name}: found {value}, allowed: 1 to {2**31 - 1}")
        if not 0 <= self.max_prompt_embedding_table_size < 2**31:
            found = self.max_prompt_embedding_table_size
            problems.add(f"max_prompt_embedding_table_size: found {found}, allowed: 0 to {2**31 - 1}")
        if self.embedding_sharding_dim not in (0, 1):
            problems.add(f"embedding_sharding_dim: found {self.embedding_sharding_dim}, allowed: 0, 1")
        if self.use_inflight_batching and not self.paged_kv_cache:
            problems.add("use_inflight_batching: needs paged_kv_cache")
        if self.paged_kv_cache and self.backend == "tensorrt":
            problems.add("paged_kv_cache: a TensorRT network here attends to one contiguous cache per sequence")
        if any(not 1 <= size <= self.generation_batches[-1] for size in self.batch_buckets):
            buckets, largest = " ".join(map(str, self.batch_buckets)), f"max_batch_size {self.max_batch_size}"
            if self.max_beam_width > 1:
                largest += f" * max_beam_width {self.max_beam_width}"
            problems.add(f"batch_buckets: found {buckets}, allowed: 1 to {largest}")
        if self.profiling_verbosity not in PROFILING_VERBOSITIES:
            allowed = ", ".join(PROFILING_VERBOSITIES)
            problems.add(f"profiling_verbosity: found {self.profiling_verbosity!r}, allowed: {allowed}")
        problems.raise_if_any(ConfigError, "the build configuration is not valid")

    @property
    def max_seq_len(self) -> int:
        """Slots of the cache per sequence: prompt and new tokens together."""
        return self.max_input_len + self.max_output_len

    @property
    def generation_batches(self) -> tuple[int, ...]:
        """The most sequences, beams counted, of each of TensorRT's generation profiles, ascending."""
        largest = self.max_batch_size * self.max_beam_width
        return (*(size for size in sorted(set(self.batch_buckets)) if size < largest), largest)

    @property
    def fused_attention(self) -> bool:
        return self.gpt_attention_plugin is not None or self.context_fmha > 0

    @property
    def cache_in_place(self) -> bool:
        """TensorRT updates a quantised cache in place by a plugin only."""
        return self.backend != "tensorrt" or self.quant.kv_cache is None or "attention" in self.plugins

    def kv_cache_bytes(self, model: ModelConfig, batch_size: int, num_slots: int) -> int:
        """Bytes of one rank's cache, [L, 2, B, G/R, T, D] in the engine's dtype, or one byte each where quantised."""
        heads = max(1, model.n_kv_head // self.world_size)
        itemsize = 1 if self.quant.kv_cache else ITEMSIZE[self.dtype]
        copies = 1 if self.cache_in_place else 2
        return copies * 2 * model.n_layer * batch_size * heads * num_slots * model.head_size * itemsize

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BuildConfig:
        known = _known_fields(cls, values)
        for name in ("targets", "batch_buckets", "plugins"):
            known[name] = tuple(known.get(name, ()))
        known["quant"] = QuantConfig(**_known_fields(QuantConfig, known.get("quant", {})))
        return cls(**known)


def check_against_positions(model: ModelConfig, build: BuildConfig) -> None:
    """Raises ConfigError where learned positions cannot hold the longest sequence the limits allow."""
    if model.learned_positions and build.max_seq_len > model.n_positions:
        raise ConfigError(
            "the limits allow sequences longer than the model has positions",
            found=f"max_input_len {build.max_input_len} + max_output_len {build.max_output_len} = {build.max_seq_len}",
            allowed=f"at most n_positions = {model.n_positions}",
            hint=f"for example --max_input_len {max(1, model.n_positions - build.max_output_len)}",
        )
