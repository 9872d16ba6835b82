"""What an engine folder is and whether it is whole, and which kind of artifact a path holds at all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from gpt.checkpoint.inspection import (
    Inspection,
    bad_values,
    inspect_checkpoint,
    inspect_hugging_face,
    inspect_nemo,
    inspect_prompt_table,
    wrong_checksums,
)
from gpt.config import BuildConfig
from gpt.console import human_bytes
from gpt.dtypes import dtype_name
from gpt.engine.folder import CONFIG_NAME, EngineInfo, open_engine
from gpt.engine.trt_library import known_library
from gpt.errors import ConfigError
from gpt.files import listing
from gpt.mapping import Mapping

_KNOWN = (
    "an FT checkpoint (config.ini), an engine folder (config.json of build.py), a Hugging Face model (config.json with "
    "model_type), a .nemo archive or its folder (model_config.yaml), a prompt table (.npy)"
)


def inspect(path: Path, *, checksums: bool = True, values: bool = True) -> Inspection:
    """Recognises what is at `path` and checks names, shapes, dtypes, sizes, checksums and values, without running it.

    checksums, values: whether all bytes are compared with their recorded checksums, and looked through for NaN and
    infinity.  Raises ConfigError only where there is nothing at `path`.
    """
    if not path.exists():
        raise ConfigError("there is nothing to check", found=path, allowed=_KNOWN)
    if path.is_file():
        return _inspect_file(path)
    if (path / "config.ini").is_file() or any(child.is_dir() for child in path.glob("*-gpu")):
        return inspect_checkpoint(path, checksums=checksums, values=values)
    config = _read_json(path / CONFIG_NAME)
    if "engine" in config or "builder_config" in config or any(path.glob("*.engine")):
        return _inspect_engine(path, checksums=checksums, values=values)
    if (path / "adapter_config.json").is_file():
        return inspect_prompt_table(path)
    if any(path.glob("model_config.yaml")) or any(path.glob("*/model_config.yaml")):
        return inspect_nemo(path)
    if (path / CONFIG_NAME).is_file():
        return inspect_hugging_face(path, values=values)
    return _unknown(path, listing(path))


def _inspect_file(path: Path) -> Inspection:
    if path.suffix == ".npy":
        return inspect_prompt_table(path)
    if path.suffix == ".nemo" or path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return inspect_nemo(path)
    return _unknown(path, path.name)


def _unknown(path: Path, found: str) -> Inspection:
    return Inspection(path, "unknown", problems=[f"not recognised: found {found}, allowed {_KNOWN}"])


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; {} for anything else, which the kind's own reader then explains."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _inspect_engine(path: Path, *, checksums: bool, values: bool) -> Inspection:
    result = Inspection(path, "engine folder")
    with result.collecting():
        info = open_engine(path)
        build = info.build
        result.kind = "engine folder of random weights" if build.seed is not None else result.kind
        library = " ".join(info.library[key] for key in ("name", "version") if key in info.library)
        result.facts.update(backend=info.backend, library=library)
        if build.targets:
            result.facts["targets"] = list(build.targets)
        result.describe_model(info.model)
        result.facts.update(dtype=build.dtype, ranks=build.world_size)
        result.facts["size"] = human_bytes(sum(file.num_bytes for file in info.files))
        result.facts["limits"] = {
            name: getattr(build, name)
            for name in ("max_batch_size", "max_input_len", "max_output_len", "max_prompt_embedding_table_size")
        }
        result.facts["options"] = _options(build)
        for key, fact in (("tool", "made_by"), ("command", "made_with"), ("checkpoint", "made_from")):
            if info.source.get(key):
                result.facts[fact] = info.source[key]
        result.tokenizer_dir = info.tokenizer_dir
        if checksums:
            result.problems += wrong_checksums({path / file.name: file.checksum for file in info.files})
        if info.backend == "tensorrt":
            with result.collecting():
                known_library(info.library)
        else:
            for rank in range(len(info.files)):
                with result.collecting():
                    result.problems += _tensor_problems(info, rank, values=values)
        ranks = " --spawn" if build.world_size > 1 else ""
        result.next_step = f"python run.py --engine_dir {shlex.quote(str(path))} --max_output_len 40{ranks}"
    return result


def _options(build: BuildConfig) -> list[str]:
    """What the engine has of what was asked for: a plan without plugins has none, whatever the flags said."""
    if build.backend == "tensorrt":
        buckets = " ".join(map(str, build.generation_batches))
        chosen = {
            f"compiled into the plan: {', '.join(build.plugins)}": bool(build.plugins),
            "fused attention": build.fused_attention and "attention" not in build.plugins,
            f"generation for batches of {buckets}": bool(build.batch_buckets),
            f"optimisation level {build.builder_opt}": build.builder_opt is not None,
            "weight streaming": build.weight_streaming,
            "weights can be replaced": build.refit,
        }
    else:
        plugins = ("gpt_attention", "gemm", "layernorm", "lookup")
        chosen = {f"{name} plugin": getattr(build, f"{name}_plugin") is not None for name in plugins}
        chosen["context fmha"] = build.context_fmha > 0
    chosen |= {build.quant.describe(): bool(build.quant.describe()), "packed prompts": build.remove_input_padding}
    return [text for text, given in chosen.items() if given]


def _tensor_problems(info: EngineInfo, rank: int, *, values: bool) -> list[str]:
    """Names, shapes, dtypes and values in one rank's file; an engine of random weights holds none."""
    from gpt.engine.tensor_file import map_tensor_file
    from gpt.engine.weights import file_layout

    name = info.files[rank].name
    weights, metadata = map_tensor_file(info.engine_path(rank))
    problems = []
    if metadata.get("build_id") != info.build_id:
        problems.append(f"{name}: build {metadata.get('build_id')}, {CONFIG_NAME} belongs to {info.build_id}")
    layout = file_layout(info.model, info.build, Mapping.of_build(info.build, rank))
    expected = {key: f"{list(shape)} {dtype}" for key, (dtype, shape) in layout.items()}
    for key in sorted(expected.keys() | weights.keys()):
        found = f"{list(weights[key].shape)} {dtype_name(weights[key].dtype)}" if key in weights else "nothing"
        wanted = expected.get(key, "nothing")
        if found != wanted:
            problems.append(f"{name}, {key}: found {found}, allowed {wanted}")
    if values:
        problems += bad_values((f"{name}, {key}", tensor) for key, tensor in weights.items())
    return problems
