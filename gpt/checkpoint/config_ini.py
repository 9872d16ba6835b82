"""config.ini of a checkpoint folder: what model it holds, also in the spelling of FasterTransformer."""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.config import ModelConfig
from gpt.dtypes import canonical_dtype
from gpt.errors import CheckpointError, ConfigError, Problems

CONFIG_NAME = "config.ini"
# Field of ModelConfig, its type, and its names in the section [gpt]: first the one that is written, then
# FasterTransformer's.
_KEYS: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("n_embd", int, ("n_embd",)),
    ("n_head", int, ("n_head", "head_num")),
    ("n_layer", int, ("n_layer", "num_layer")),
    ("n_positions", int, ("n_positions", "max_pos_seq_len")),
    ("vocab_size", int, ("vocab_size",)),
    ("hidden_act", str, ("activation_function",)),
    ("layer_norm_epsilon", float, ("layer_norm_epsilon", "layernorm_eps")),
    ("inter_size", int, ("intermediate_size", "n_inner", "inter_size")),
    ("rotary_pct", float, ("rotary_pct",)),
    ("rotary_base", float, ("rotary_base",)),
    ("rotary_scaling", float, ("rotary_scaling_factor",)),
    ("normalization", str, ("normalization",)),
    ("bias", bool, ("bias",)),
    ("multi_query", bool, ("multi_query_mode", "multi_query")),
    ("n_kv_head", int, ("num_kv_heads",)),
    ("scale_attn_weights", bool, ("scale_attn_weights",)),
    ("scale_attn_by_inverse_layer_idx", bool, ("scale_attn_by_inverse_layer_idx",)),
    ("tied_head", bool, ("tie_word_embeddings",)),
    ("bos_token_id", int, ("bos_token_id", "start_id")),
    ("eos_token_id", int, ("eos_token_id", "end_id")),
    ("pad_token_id", int, ("pad_token_id",)),
)
_REQUIRED = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "hidden_act")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def model_to_ini(model: ModelConfig) -> dict[str, str]:
    """The keys of the section [gpt] that `model_from_ini` reads back."""
    return {names[0]: str(getattr(model, field)) for field, _, names in _KEYS}


def model_from_ini(section: Mapping[str, str], *, tied_head: bool | None = None) -> ModelConfig:
    """What the section [gpt] says, in the spelling of the converters here or of FasterTransformer.

    tied_head: whether the folder lacks a head of its own (a reader that finds no lm_head uses the embedding).
    Raises ConfigError naming every missing or unreadable key.
    """
    problems = Problems()
    values: dict[str, Any] = {}
    for field, kind, names in (*_KEYS, ("head_size", int, ("size_per_head",))):
        name = next((name for name in names if section.get(name, "None").strip() != "None"), None)
        if name is None:
            continue
        text = section[name].strip()
        try:
            values[field] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            problems.add(f"{name}: found {text!r}, allowed: {kind.__name__}")
            values[field] = None
    head_size, multi_query = values.pop("head_size", None), values.pop("multi_query", False)
    if "head_num" in section:
        values.setdefault("hidden_act", "gelu_new")
    if head_size and values.get("n_head"):
        values.setdefault("n_embd", values["n_head"] * head_size)
    for field, _, names in _KEYS:
        if field in _REQUIRED and field not in values:
            problems.add(f"{' or '.join(names)}: missing")
    problems.raise_if_any(ConfigError, "config.ini does not describe a model")
    values.setdefault("n_kv_head", 1 if multi_query else values["n_head"])
    values.setdefault("inter_size", 4 * values["n_embd"])
    if tied_head is not None:
        values["tied_head"] = tied_head
    return ModelConfig(**values)


def read_section(folder: Path) -> Mapping[str, str]:
    """The section [gpt] of the folder's config.ini.  Raises CheckpointError for a damaged file."""
    path = folder / CONFIG_NAME
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        return parser["gpt"]
    except (configparser.Error, UnicodeDecodeError, KeyError) as error:
        raise CheckpointError(
            f"damaged: {path}",
            found="no section [gpt]" if isinstance(error, KeyError) else str(error).replace("\n", " "),
            allowed="[gpt] and lines of key = value",
            hint="convert the model again",
        ) from error


def storage_dtype(section: Mapping[str, str]) -> str:
    """The dtype of the float files.  Raises ConfigError where there is no such type."""
    return canonical_dtype(section.get("storage_dtype", section.get("weight_data_type", "float32")))


def write_config(folder: Path, section: Mapping[str, object]) -> None:
    """config.ini with one section [gpt], every value as Python's str() of it; keys become lower case."""
    parser = configparser.ConfigParser(interpolation=None)
    parser["gpt"] = {key.lower(): " ".join(str(value).splitlines()) for key, value in section.items()}
    with open(folder / CONFIG_NAME, "w", encoding="utf-8") as file:
        parser.write(file)
