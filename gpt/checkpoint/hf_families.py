"""The Hugging Face families as a table: how each is recognised, what its config.json means, which source tensor is
which of ours.

A new family is a row of FAMILIES (docs/adding-a-model.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt.checkpoint.derived import concatenated, heads_apart, transposed
from gpt.checkpoint.layout import Tensor
from gpt.checkpoint.source import SourceTensor
from gpt.config import ACTIVATIONS, ModelConfig
from gpt.errors import Problems
from gpt.mapping import Split


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES: how a kind of model is recognised, configured, and where its tensors are.

    `names` are what --model may call it, the first is its own.  `sources` maps layout names to source names without
    prefix, {} for the layer; several source names stand side by side in ours.  `out_in`: linear weights are nn.Linear's
    [out, in], ours the transpose.  `heads_mixed`: the fused projection of a model with as many key heads as query heads
    is [heads, 3, D].  `ignored` are known buffers.
    """

    names: tuple[str, ...]
    model_type: str
    architectures: tuple[str, ...]
    sources: Mapping[str, str | tuple[str, ...]]
    ignored: re.Pattern[str]
    model_config: Callable[[Mapping[str, Any], Problems], dict[str, Any]]
    out_in: bool = False
    heads_mixed: bool = False
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: True

    @property
    def name(self) -> str:
        return self.names[0]

    def source_names(self, tensor: Tensor) -> tuple[str, ...]:
        layer, local_name = tensor.place
        names = self.sources[local_name]
        return tuple(name.format(layer) for name in ((names,) if isinstance(names, str) else names))

    def source_shapes(self, tensor: Tensor, model: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """What the tensors named by `source_names` must measure."""
        if len(self.source_names(tensor)) == 2:  # queries apart from keys and values
            query = model.n_head * model.head_size
            return tuple((*tensor.shape[:-1], width) for width in (query, tensor.shape[-1] - query))
        return (tensor.shape[::-1] if self._turned(tensor) else tensor.shape,)

    def assemble(self, tensor: Tensor, model: ModelConfig, parts: Sequence[SourceTensor]) -> SourceTensor:
        """The layout's tensor out of the source's."""
        source = parts[0] if len(parts) == 1 else concatenated(parts)
        if self._turned(tensor):
            source = transposed(source)
        if self.heads_mixed and tensor.split is Split.QKV and not model.multi_query:
            source = heads_apart(source, model.n_head)
        return source

    def _turned(self, tensor: Tensor) -> bool:
        return self.out_in and tensor.kind == "weight"


def _gpt2_config(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """GPT2Config: sizes must be there, the rest has the class's defaults."""
    return _config(config, problems, "gelu_new")


def _old_santacoder_config(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The configuration of SantaCoder's own code, a GPT2Config with attention_head_type."""
    return {**_config(config, problems, "gelu_new"), "n_kv_head": 1}


def _bigcode_config(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """GPTBigCodeConfig: multi-query unless it says otherwise."""
    values = _config(config, problems, "gelu_pytorch_tanh")
    multi_query = config.get("multi_query", True)
    if not isinstance(multi_query, bool):
        problems.add(f"multi_query: found {multi_query!r}, allowed: bool")
    return {**values, "n_kv_head": 1 if multi_query else values["n_head"]}


def _config(config: Mapping[str, Any], problems: Problems, default_act: str) -> dict[str, Any]:

    def size(*names: str) -> int | None:
        value = next((config[name] for name in names if name in config), None)
        if value is None:
            problems.add(f"{' or '.join(names)}: missing")
        elif type(value) is not int:
            problems.add(f"{names[0]}: found {value!r}, allowed: an integer")
        return value

    def option(name: str, default: Any) -> Any:
        value = config.get(name, default)
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            problems.add(f"{name}: found {value!r}, allowed: {type(default).__name__}")
        return value

    n_embd = size("n_embd", "hidden_size")
    n_head = size("n_head", "num_attention_heads")
    inner = config.get("n_inner")
    if inner is not None and type(inner) is not int:
        problems.add(f"n_inner: found {inner!r}, allowed: an integer or null")
    hidden_act = option("activation_function", default_act)
    if hidden_act in ACTIVATIONS and ACTIVATIONS[hidden_act].gated:
        problems.add(f"activation_function: found {hidden_act!r}, which this family has no weights for")
    for name in ("add_cross_attention", "is_encoder_decoder", "quantization_config", "pruned_heads"):
        if config.get(name):
            problems.add(f"{name}: found {config[name]!r}, not supported")
    return {
        "vocab_size": size("vocab_size"),
        "n_positions": size("n_positions", "max_position_embeddings"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": size("n_layer", "num_hidden_layers"),
        "n_kv_head": n_head,
        "inter_size": inner if inner is not None or n_embd is None else 4 * n_embd,
        "hidden_act": hidden_act,
        "layer_norm_epsilon": option("layer_norm_epsilon", 1e-5),
        "scale_attn_weights": option("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": option("scale_attn_by_inverse_layer_idx", False),
        "tied_head": option("tie_word_embeddings", True),
    }


_GPT2_SOURCES = {
    "model.wpe": "wpe.weight",
    "model.wte": "wte.weight",
    "model.final_layernorm.weight": "ln_f.weight",
    "model.final_layernorm.bias": "ln_f.bias",
    "model.lm_head.weight": "lm_head.weight",
    "input_layernorm.weight": "h.{}.ln_1.weight",
    "input_layernorm.bias": "h.{}.ln_1.bias",
    "attention.query_key_value.weight": "h.{}.attn.c_attn.weight",
    "attention.query_key_value.bias": "h.{}.attn.c_attn.bias",
    "attention.dense.weight": "h.{}.attn.c_proj.weight",
    "attention.dense.bias": "h.{}.attn.c_proj.bias",
    "post_attention_layernorm.weight": "h.{}.ln_2.weight",
    "post_attention_layernorm.bias": "h.{}.ln_2.bias",
    "mlp.dense_h_to_4h.weight": "h.{}.mlp.c_fc.weight",
    "mlp.dense_h_to_4h.bias": "h.{}.mlp.c_fc.bias",
    "mlp.dense_4h_to_h.weight": "h.{}.mlp.c_proj.weight",
    "mlp.dense_4h_to_h.bias": "h.{}.mlp.c_proj.bias",
}

_CONV1D_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# The first row that fits a config.json is taken.  Conv1D keeps its weights [in, out], as the layout does.
FAMILIES = (
    Family(
        names=("santacoder",),
        model_type="gpt2",
        architectures=("GPT2LMHeadCustomModel",),
        sources={
            **_GPT2_SOURCES,
            "attention.query_key_value.weight": ("h.{}.attn.q_attn.weight", "h.{}.attn.kv_attn.weight"),
            "attention.query_key_value.bias": ("h.{}.attn.q_attn.bias", "h.{}.attn.kv_attn.bias"),
        },
        ignored=_CONV1D_BUFFERS,
        model_config=_old_santacoder_config,
        recognises=lambda config: config.get("attention_head_type") == "multiquery",
    ),
    Family(
        names=("gpt2",),
        model_type="gpt2",
        architectures=("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"),
        sources=_GPT2_SOURCES,
        ignored=_CONV1D_BUFFERS,
        model_config=_gpt2_config,
    ),
    Family(
        names=("starcoder", "santacoder"),
        model_type="gpt_bigcode",
        architectures=("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
        sources=_GPT2_SOURCES,
        ignored=_CONV1D_BUFFERS,
        model_config=_bigcode_config,
        out_in=True,
        heads_mixed=True,
    ),
)
FAMILY_NAMES = ("gpt2", "santacoder", "starcoder")
