"""A Hugging Face folder as a source: config.json becomes a ModelConfig, every tensor is matched with one of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.checkpoint.hf_families import FAMILIES, Family
from gpt.checkpoint.hf_files import read_json
from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.source import SourceTensor, equal_values
from gpt.config import ModelConfig
from gpt.console import log, verbose
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import CheckpointError, ConfigError, Problems, rethrow_as
from gpt.files import listing

_GENERATION = "generation_config.json"
_LAYER = re.compile(r"h\.(\d+)\.")
_TABLE, _HEAD = "wte.weight", "lm_head.weight"


def read_model(folder: Path, chosen: str | None = None) -> tuple[Family, dict[str, Any], ModelConfig]:
    """The family, the raw config.json and what it means.  `chosen` is a family the user expects, or None.

    Raises CheckpointError listing all that is missing, contradictory or not supported in config.json.
    """
    path = folder / "config.json"
    if not path.is_file():
        converted = (folder / "config.ini").is_file()
        raise CheckpointError(
            f"no config.json in {folder}",
            found=listing(folder),
            allowed="a Hugging Face model",
            hint="this folder is converted already: give it to build.py --model_dir" if converted else None,
        )
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


def with_own_head(model: ModelConfig, found: Mapping[str, SourceTensor]) -> ModelConfig:
    """`model`, untied where the files have a head that is not the embedding: they are what was trained, and Hugging
    Face goes by them too."""
    bare = _without_prefix(found, Problems())
    if not model.tied_head or _HEAD not in bare or _TABLE not in bare or equal_values(bare[_HEAD], bare[_TABLE]):
        return model
    log.warning("tie_word_embeddings is true, but %s differs from %s: the head is kept apart", _HEAD, _TABLE)
    return dataclasses.replace(model, tied_head=False)


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
        parts = _take(family, model, tensor, bare, problems)
        if parts is not None:
            pairs.append((tensor, family.assemble(tensor, model, parts)))
    for name in bare:
        layer = _LAYER.match(name)
        if family.ignored.fullmatch(name) or (model.tied_head and name == _HEAD):
            verbose(f"{name} is not needed")
        elif layer is None or int(layer[1]) < model.n_layer:
            problems.add(f"{name}: unknown")
    problems.raise_if_any(CheckpointError, "the weights do not fit config.json", hint="use both from the same model")
    return pairs


def _take(
    family: Family, model: ModelConfig, tensor: Tensor, bare: dict[str, SourceTensor], problems: Problems
) -> list[SourceTensor] | None:
    """The source tensors of one of ours, out of `bare`; None where there is a problem."""
    parts: list[SourceTensor] = []
    names, shapes = family.source_names(tensor), family.source_shapes(tensor, model)
    for name, shape in zip(names, shapes, strict=True):
        source = bare.pop(name, None)
        if source is None:
            problems.add(f"{name}: missing")
        elif source.shape != shape:
            problems.add(f"{name}: found {list(source.shape)}, config.json wants {list(shape)}")
        elif source.dtype not in FLOAT_DTYPES:
            problems.add(f"{name}: found {source.dtype}, allowed: {', '.join(FLOAT_DTYPES)}")
        elif parts and parts[0].dtype != source.dtype:
            problems.add(f"{name}: found {source.dtype}, {names[0]} has {parts[0].dtype}")
        else:
            parts.append(source)
    return parts if len(parts) == len(names) else None


def _recognise(config: Mapping[str, Any], chosen: str | None) -> Family:
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if config.get("model_type", family.model_type) != family.model_type:
            continue
        # Configurations of 2019 name neither: --model does.
        unnamed = "model_type" not in config and not architectures and chosen in family.names
        if "model_type" not in config and not unnamed and not set(family.architectures) & set(architectures):
            continue
        if not family.recognises(config):
            continue
        if chosen is not None and chosen not in family.names:
            raise ConfigError(
                "--model contradicts config.json",
                found=f"--model {chosen} for model_type {family.model_type!r}, architectures {architectures}",
                allowed=" or ".join(family.names) + ", or no --model at all",
            )
        return family
    raise CheckpointError(
        "unknown architecture in config.json",
        found=f"model_type {config.get('model_type')!r}, architectures {architectures}",
        allowed=", ".join(sorted({f"model_type {family.model_type!r}" for family in FAMILIES})),
        hint=None if "model_type" in config or architectures else "--model names the family",
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
