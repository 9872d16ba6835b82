"""Tiny models of each shape that quantisation must know, as converters see them, and HF's own activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import randomize, save_tokenizer

from gpt.checkpoint import hf, hf_files
from gpt.checkpoint.writer import Pair
from gpt.config import ModelConfig


def tiny_bigcode(path: Path, *, multi_query: bool = True, seed: int = 0, **config: Any) -> Path:
    """Saves a random GPTBigCode with a tokenizer and returns `path`."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"vocab_size": 301, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48}
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**{**sizes, "multi_query": multi_query, **config}))
    randomize(model, seed)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def source_of(folder: Path) -> tuple[ModelConfig, list[Pair]]:
    family, _, model = hf.read_model(folder)
    return model, hf.match_tensors(family, model, hf_files.open_weights(folder))


def plant_outliers(folder: Path, layer: int, channels: Sequence[int], factor: float) -> None:
    """Multiplies channels of both layernorms by `factor` and divides the rows behind them: the same function."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    rows = torch.tensor(channels)
    for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        for part in ("weight", "bias"):
            weights[f"transformer.h.{layer}.{norm}.{part}"][rows] *= factor
        weights[f"transformer.h.{layer}.{linear}.weight"][rows] /= factor
    save_file(weights, path)


def hooked_ranges(folder: Path, samples: Sequence[Sequence[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module name: (x, y)} as the original measures them: hooks on HF's modules, one text at a time, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def see(module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            both = [t.reshape(-1, t.shape[-1]).abs().amax(0) for t in (inputs[0], output)]
            if name in seen:
                both = [torch.maximum(old, new) for old, new in zip(seen[name], both, strict=True)]
            seen[name] = (both[0], both[1])

        return see

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([list(sample)]))
    return seen
