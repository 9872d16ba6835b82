"""NeMo's model_config.yaml: what each key means for the network and for the place of the weights.

Keys that only training reads are not looked at.  Keys that change what the model computes are either honoured or, where
their value asks for something the network does not have, refused by name; see docs/nemo.md for the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, overload

from gpt.config import ModelConfig
from gpt.errors import CheckpointError, ConfigError, Problems, rethrow_as

_NORMALIZATIONS = {
    "layernorm": "layernorm",
    "low_precision_layernorm": "layernorm",
    "layernorm1p": "layernorm",
    "rmsnorm": "rmsnorm",
}
ACTIVATIONS = (
    *("gelu", "geglu", "fast-geglu", "swiglu", "fast-swiglu", "reglu", "fast-reglu"),
    "squared-relu",
)
_TANH_GELU = {"gelu": "gelu_new", "geglu": "geglu", "fast-geglu": "fast-geglu"}
_ERF_GELU = {"gelu": "gelu", "geglu": "geglu_erf", "fast-geglu": "geglu_erf"}
_POSITIONS = ("learned_absolute", "rope")
# Options of another network, with the value that switches them off.
_REQUIRED = {
    "transformer_block_type": "pre_ln",
    "attention_type": "multihead",
    "headscale": False,
    "multi_query_attention": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "scale_positional_embedding": False,
    "apply_embedding_scaling": False,
    "num_moe_experts": 1,
    "window_size": None,
    "virtual_pipeline_model_parallel_size": 1,
}


@dataclass(frozen=True)
class Training:
    """How the archive holds its weights.

    `legacy_qkv`: a rank's fused projection is [3, heads, D] instead of [heads, 3, D].  `fused_gate`: both matrices of a
    gated MLP are one, [2, F] on each rank.  `one_plus`: layernorm weights are stored without the 1 that NeMo adds.
    `head`: whether the yaml says that there is an output layer; None where it says nothing.
    """

    tensor_parallel: int
    pipeline_parallel: int
    legacy_qkv: bool
    fused_gate: bool
    one_plus: bool
    head: bool | None


@dataclass(frozen=True)
class NemoConfig:
    """A checked model_config.yaml.  `fields` are those of ModelConfig that it decides; `n_positions` may be missing."""

    training: Training
    fields: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    def model(self, **fields: Any) -> ModelConfig:
        """Adds what only weights and tokenizer tell.  Raises CheckpointError where the result is not valid."""
        try:
            return ModelConfig(**{**self.fields, **fields})
        except ConfigError as error:
            raise rethrow_as(error, CheckpointError, "this model cannot be converted: model_config.yaml") from error


def read_config(values: Mapping[str, Any]) -> NemoConfig:
    """Raises CheckpointError listing every key that is missing, unreadable or asks for an unknown network."""
    read = _Reader(values)
    for key, required in _REQUIRED.items():
        if values.get(key) not in (None, required):
            read.problems.add(f"{key}: found {values[key]!r}, allowed: {required!r}")
    activation = read.choice("activation", "gelu", ACTIVATIONS)
    normalization = read.choice("normalization", "layernorm", _NORMALIZATIONS)
    core = read.flag("mcore_gpt", False)
    shared = read.flag("share_embeddings_and_output_weights", None)
    training = Training(
        tensor_parallel=read.integer("tensor_model_parallel_size", 1),
        pipeline_parallel=read.integer("pipeline_model_parallel_size", 1),
        legacy_qkv=read.flag("megatron_legacy", False),
        fused_gate=activation.startswith("fast-") or core,
        one_plus=normalization == "layernorm1p",
        head=None if shared is None else not shared,
    )
    bias = read.flag("bias", True)
    fields = {
        **_sizes(read, training, core),
        "hidden_act": _hidden_act(read, activation, fused_kernel=bias or (core and activation.endswith("glu"))),
        "bias": bias,
        "layer_norm_epsilon": read.number("layernorm_epsilon", 1e-5),
        "normalization": _NORMALIZATIONS.get(normalization),
        "scale_attn_weights": read.flag("normalize_attention_scores", True),
        **_positions(read),
    }
    tokenizer = values.get("tokenizer") or {}
    if not isinstance(tokenizer, dict):
        read.problems.add(f"tokenizer: found {tokenizer!r}, allowed: a section")
    read.problems.raise_if_any(CheckpointError, "this model cannot be converted: model_config.yaml")
    return NemoConfig(training, fields, tokenizer)


def _sizes(read: _Reader, training: Training, core: bool) -> dict[str, int]:
    n_embd, n_head, n_layer = (read.integer(key) for key in ("hidden_size", "num_attention_heads", "num_layers"))
    groups = read.integer("num_query_groups", n_head)
    for key, found, allowed in (
        ("kv_channels", read.integer("kv_channels", n_embd // n_head), n_embd // n_head),
        ("num_query_groups", groups, groups if core else n_head),
    ):
        if found != allowed:
            read.problems.add(f"{key}: found {found}, allowed: {allowed}")
    if n_layer % training.pipeline_parallel:
        read.problems.add(f"num_layers {n_layer} is not divisible by pipeline_model_parallel_size")
    if groups % training.tensor_parallel:
        read.problems.add(f"{groups} key/value heads are not divisible by tensor_model_parallel_size")
    return {
        "n_embd": n_embd,
        "n_head": n_head,
        "n_kv_head": groups,
        "n_layer": n_layer,
        "inter_size": read.integer("ffn_hidden_size", 4 * n_embd),
    }


def _hidden_act(read: _Reader, activation: str, *, fused_kernel: bool) -> str:
    """NeMo's gelu is exact, but in its fused kernel (the default) and with openai_gelu the tanh approximation."""
    fused = read.flag("bias_activation_fusion", read.flag("bias_gelu_fusion", True)) and fused_kernel
    openai = read.flag("openai_gelu", False)
    if openai and activation not in _TANH_GELU:
        read.problems.add(f"openai_gelu: found True together with the activation {activation!r}")
    if activation in _TANH_GELU:
        return (_TANH_GELU if fused or openai else _ERF_GELU)[activation]
    return activation


def _positions(read: _Reader) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    kind = read.choice("position_embedding_type", "learned_absolute", _POSITIONS)
    key = next((key for key in ("max_position_embeddings", "encoder_seq_length") if read.values.get(key)), None)
    if key or kind == "rope":
        fields["n_positions"] = read.integer(key or "max_position_embeddings")
    if kind == "rope":
        fields["rotary_pct"] = read.number("rotary_percentage", 1.0)
        fields["rotary_base"] = read.number("rotary_base", 10000.0)
        fields["rotary_scaling"] = read.number("seq_len_interpolation_factor", 1.0)
    return fields


class _Reader:
    """Typed values of a yaml; null counts as absent.  What cannot be read is a problem, and something stands in."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems = Problems()

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None and default is None:
            self.problems.add(f"{key}: missing")
        elif value is not None and (type(value) is not int or value < 1):
            self.problems.add(f"{key}: found {value!r}, allowed: an integer of at least 1")
        elif value is not None:
            return value
        return default or 1

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        try:
            return float(value)  # also of '1e-05', which yaml takes for a word
        except (TypeError, ValueError):
            self.problems.add(f"{key}: found {value!r}, allowed: a number")
            return default

    @overload
    def flag(self, key: str, default: bool) -> bool: ...

    @overload
    def flag(self, key: str, default: None) -> bool | None: ...

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problems.add(f"{key}: found {value!r}, allowed: true or false")
        return default

    def choice(self, key: str, default: str, allowed: Collection[str]) -> str:
        value = default if self.values.get(key) is None else str(self.values[key])
        if value not in allowed:
            self.problems.add(f"{key}: found {value!r}, allowed: {', '.join(allowed)}")
        return value
