"""Hugging Face model families as data: how config.json becomes a ModelConfig, which source tensor is which of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint.hf_files import read_json
from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.source import SourceTensor
from gpt.config import ACTIVATIONS, ModelConfig, rethrow_as
from gpt.console import log, verbose
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import CheckpointError, ConfigError, Problems

_GENERATION = "generation_config.json"
_LAYER = re.compile(r"h\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """`sources` maps layout names to source names without prefix, {} for the layer; `ignored` are known buffers."""

    name: str
    model_type: str
    architectures: tuple[str, ...]
    sources: Mapping[str, str]
    ignored: re.Pattern[str]
    model_config: Callable[[Mapping[str, Any], Problems], dict[str, Any]]

    def source_name(self, tensor: Tensor) -> str:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", tensor.name)
        return self.sources[match[2]].format(match[1]) if match else self.sources[tensor.name]


def read_model(folder: Path, chosen: str | None = None) -> tuple[Family, dict[str, Any], ModelConfig]:
    """The family, the raw config.json and what it means.  `chosen` is a family the user expects, or None.

    Raises CheckpointError listing all that is missing, contradictory or not supported in config.json.
    """
    path = folder / "config.json"
    if not path.is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
        hint = "this folder is converted already: give it to build.py --model_dir" if "config.ini" in names else None
        raise CheckpointError(f"no config.json in {folder}", found=found, allowed="a Hugging Face model", hint=hint)
    config = read_json(path)
    family = _recognise(config, chosen)
    problems = Problems()
    values = family.model_config(config, problems)
    problems.raise_if_any(CheckpointError, f"this model cannot be converted: {path}")
    generation = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # What `generate` obeys comes first, as in Hugging Face.
        token_id = config.get(name) if generation.get(name) is None else generation[name]
        values[name] = _token_id(name, token_id, values["vocab_size"])
    try:
        return family, config, ModelConfig(**values)
    except ConfigError as error:
        raise rethrow_as(error, CheckpointError, f"this model cannot be converted: {path}") from error


def match_tensors(
    family: Family, model: ModelConfig, found: Mapping[str, SourceTensor]
) -> list[tuple[Tensor, SourceTensor]]:
    """Pairs every tensor of the layout with its source.

    Each source tensor is used, known as a buffer that is not needed, or a problem.  Raises CheckpointError listing
    every missing, unknown or misshapen tensor.
    """
    problems = Problems()
    bare = _without_prefix(found, problems)
    layers = 1 + max((int(match[1]) for name in bare if (match := _LAYER.match(name))), default=-1)
    if layers != model.n_layer:
        problems.add(f"n_layer: config.json says {model.n_layer}, the weights have {layers} layers")
        model = dataclasses.replace(model, n_layer=max(1, min(model.n_layer, layers)))
    pairs = []
    for tensor in tensors(model):
        name = family.source_name(tensor)
        source = bare.pop(name, None)
        if source is None:
            problems.add(f"{name}: missing")
        elif source.shape != tensor.shape:
            problems.add(f"{name}: found {list(source.shape)}, config.json wants {list(tensor.shape)}")
        elif source.dtype not in FLOAT_DTYPES:
            problems.add(f"{name}: found {source.dtype}, allowed: {', '.join(FLOAT_DTYPES)}")
        else:
            pairs.append((tensor, source))
    for name in bare:
        layer = _LAYER.match(name)
        if family.ignored.fullmatch(name) or (model.tied_head and name == "lm_head.weight"):
            verbose(f"{name} is not needed")
        elif layer is None or int(layer[1]) < model.n_layer:
            problems.add(f"{name}: unknown")
    problems.raise_if_any(CheckpointError, "the weights do not fit config.json", hint="use both from the same model")
    return pairs


def _recognise(config: Mapping[str, Any], chosen: str | None) -> Family:
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if config.get("model_type", family.model_type) != family.model_type:
            continue
        if "model_type" not in config and not set(family.architectures) & set(architectures):
            continue
        if chosen not in (None, family.name):
            raise ConfigError("--model contradicts config.json", found=chosen, allowed=family.name)
        return family
    raise CheckpointError(
        "unknown architecture in config.json",
        found=f"model_type {config.get('model_type')!r}, architectures {architectures}",
        allowed=", ".join(f"model_type {family.model_type!r}" for family in FAMILIES.values()),
    )


def _without_prefix(found: Mapping[str, SourceTensor], problems: Problems) -> dict[str, SourceTensor]:
    """Base models are saved without `transformer.`, models with a head with it."""
    bare: dict[str, SourceTensor] = {}
    for name, tensor in found.items():
        short = name.removeprefix("transformer.")
        if short in bare:
            problems.add(f"{short}: there with and without the prefix 'transformer.'")
        bare[short] = tensor
    return bare


def _token_id(name: str, value: Any, vocab_size: int) -> int | None:
    if isinstance(value, list) and value:
        if len(value) > 1:
            log.warning("%s: %s, only the first is kept", name, value)
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab_size:
        log.warning("%s: %r is no token of a vocabulary of %d and is left out", name, value, vocab_size)
        return None
    return value


def _gpt2_config(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """GPT2Config: sizes must be there, the rest has the class's defaults."""

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
    hidden_act = option("activation_function", "gelu_new")
    if hidden_act in ACTIVATIONS and ACTIVATIONS[hidden_act].gated:
        problems.add(f"activation_function: found {hidden_act!r}, which a GPT-2 has no weights for")
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

# GPT-2's Conv1D keeps its weights [in, out], as the layout does: nothing is transposed.
FAMILIES = {
    "gpt2": Family(
        name="gpt2",
        model_type="gpt2",
        architectures=("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"),
        sources=_GPT2_SOURCES,
        ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
        model_config=_gpt2_config,
    )
}
