"""SantaCoder and StarCoder: both layouts of the weights, one or many key heads, any number of ranks, beside HF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, convert, open_session, random_prompts, relative_error
from safetensors.torch import save_file
from sharded_ops import sharded_logits
from tiny_models import randomize
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import hf_gpt_convert
from gpt.runtime.generate import generate
from gpt.runtime.request import Request

LENGTHS = (5, 17, 1, 9)
SHAPES: dict[str, dict[str, Any]] = {
    "starcoder": {"n_head": 4, "n_embd": 48},
    "odd heads, inner 52": {"n_head": 4, "n_embd": 40, "n_inner": 52, "activation_function": "gelu_new"},
    "many key heads": {"n_head": 4, "n_embd": 48, "multi_query": False},
    "unscaled": {"n_head": 8, "n_embd": 64, "n_layer": 3, "scale_attn_weights": False, "vocab_size": 93},
}


def tiny_bigcode(path: Path, **shape: Any) -> GPTBigCodeForCausalLM:
    sizes = {"vocab_size": 101, "n_positions": 128, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**{**sizes, **shape})).eval()
    randomize(model, 0)
    model.save_pretrained(path)
    return model


def old_santacoder(model: GPTBigCodeForCausalLM, path: Path) -> None:
    """The same weights as SantaCoder's own code keeps them: Conv1D, queries apart from keys and values."""
    config, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if ".c_attn." in name:
            # [E + 2D, E] or [E + 2D]
            queries, rest = tensor.split([config.n_embd, tensor.shape[0] - config.n_embd])
            state[name.replace("c_attn", "q_attn")] = queries.t().contiguous()
            state[name.replace("c_attn", "kv_attn")] = rest.t().contiguous()
        elif tensor.dim() == 2 and ".h." in name:
            state[name] = tensor.t().contiguous()
        else:
            state[name] = tensor.contiguous()
        if name.endswith("c_attn.bias"):
            state[name.replace("c_attn.bias", "bias")] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    path.mkdir()
    save_file(state, path / "model.safetensors")
    names = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "n_inner", "layer_norm_epsilon")
    content = {name: getattr(config, name) for name in names} | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadCustomModel"],
        "attention_head_type": "multiquery",
        "activation_function": config.activation_function,
        "auto_map": {"AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel"},
    }
    (path / "config.json").write_text(json.dumps(content))
    # Remote code: must lie there unread.
    (path / "modeling_gpt2_mq.py").write_text("raise SystemExit('executed')")


def hf_logits(model: GPTBigCodeForCausalLM, prompts: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


def check_ranks(folder: Path, out: Path, reference: GPTBigCodeForCausalLM, world_sizes: tuple[int, ...]) -> None:
    prompts = random_prompts(LENGTHS, reference.config.vocab_size)
    new = [3, 1, 4, 1]
    longer = [[*prompt, token] for prompt, token in zip(prompts, new, strict=True)]
    expected = torch.cat([hf_logits(reference, prompts), hf_logits(reference, longer)])
    for world_size in world_sizes:
        logits = sharded_logits(convert(folder, out, tp=world_size), prompts, new)
        for ours, theirs in zip(logits, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_over_any_number_of_ranks(shape: dict[str, Any], tmp_path: Path) -> None:
    reference = tiny_bigcode(tmp_path / "hf", **shape)
    check_ranks(tmp_path / "hf", tmp_path / "ft", reference, (1, 2, 4))


def test_the_original_layout_of_santacoder(tmp_path: Path) -> None:
    reference = tiny_bigcode(tmp_path / "new", n_head=4, n_embd=48)
    old_santacoder(reference, tmp_path / "old")
    check_ranks(tmp_path / "old", tmp_path / "ft", reference, (1, 2))
    from_new = convert(tmp_path / "new", tmp_path / "ft-new")
    for path in from_new.glob("*.bin"):
        assert (tmp_path / "ft" / "1-gpu" / path.name).read_bytes() == path.read_bytes()


def test_greedy_ids_are_hf_ones(tmp_path: Path) -> None:
    reference = tiny_bigcode(tmp_path / "hf", n_head=4, n_embd=48)
    session = open_session(build_engine(convert(tmp_path / "hf", tmp_path / "ft"), tmp_path / "e"))
    prompts = random_prompts(LENGTHS, 101)
    tokens = generate(session, Request(prompts, max_new_tokens=60)).tokens
    for prompt, row in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False}
        output = reference.generate(ids, **options, eos_token_id=None, pad_token_id=0)
        assert row == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("chosen", "code"), [("starcoder", 0), ("santacoder", 0), ("gpt2", 2)])
def test_model_names(chosen: str, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_bigcode(tmp_path / "hf", n_head=4, n_embd=48)
    command = ["-i", str(tmp_path / "hf"), "-o", str(tmp_path / "ft"), "--model", chosen]
    assert hf_gpt_convert.main(command) == code
    if code:
        told = capfd.readouterr().err
        assert "gpt_bigcode" in told
        assert "starcoder or santacoder" in told


def test_a_plain_gpt2_is_no_santacoder(
    make_gpt2: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["-i", str(make_gpt2()), "-o", str(tmp_path / "ft"), "--model", "santacoder"]
    assert hf_gpt_convert.main(command) == 2
    assert "gpt2" in capfd.readouterr().err


def test_missing_and_misshapen_parts_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    old_santacoder(tiny_bigcode(tmp_path / "new", n_head=4, n_embd=48), tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    state = load_file(path)
    del state["transformer.h.0.attn.kv_attn.weight"]
    state["transformer.h.1.attn.kv_attn.bias"] = torch.zeros(30)
    save_file(state, path)
    assert hf_gpt_convert.main(["-i", str(tmp_path / "old"), "-o", str(tmp_path / "ft")]) == 3
    told = capfd.readouterr().err
    assert "h.0.attn.kv_attn.weight: missing" in told
    assert "h.1.attn.kv_attn.bias: found [30], config.json wants [24]" in told
