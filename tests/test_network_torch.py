"""The network run by PyTorch beside Hugging Face and beside a plain float64 GPT, through converter, build and
session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, convert, open_session, random_prompts, relative_error
from plain_gpt import plain_logits
from transformers import GPT2LMHeadModel

from gpt.engine.folder import EngineInfo
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_torch_weights
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "gpt2-tiny"

# Odd head counts, an MLP of another width, epsilon and GELU spellings varied, scores scaled in GPT-2's other two ways.
SHAPES: dict[str, dict[str, Any]] = {
    "five heads": {"n_head": 5, "n_embd": 60, "n_layer": 3, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "inner 80": {"n_head": 3, "n_embd": 48, "n_inner": 80, "activation_function": "gelu_pytorch_tanh"},
    "scaled": {
        "n_head": 7,
        "n_embd": 56,
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_by_inverse_layer_idx": True,
        "vocab_size": 307,
    },
    "untied": {"n_embd": 32, "activation_function": "relu", "scale_attn_weights": False, "tie_word_embeddings": False},
}
# float32 against float32: what is left is the order of additions.
FP32_BOUND = 1e-5
LENGTHS = (5, 17, 1, 9)


def hf_logits(model: GPT2LMHeadModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, -1]


def hf_greedy(model: GPT2LMHeadModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def same_as_hf(session: TorchSession, reference: GPT2LMHeadModel, num_tokens: int) -> None:
    prompts = random_prompts(LENGTHS, session.model.vocab_size)
    session.start(len(prompts), max(LENGTHS) + num_tokens)
    logits = session.context(prompts)
    for prompt, row in zip(prompts, logits, strict=True):
        assert relative_error(row, hf_logits(reference, prompt)) < FP32_BOUND
    tokens = generate(session, Request(prompts, max_new_tokens=num_tokens)).tokens
    assert tokens == [hf_greedy(reference, prompt, num_tokens) for prompt in prompts]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_ids_are_hf_ones(shape: dict[str, Any], make_gpt2: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_gpt2(tokenizer=False, n_positions=128, **shape)
    info = build_engine(convert(folder, tmp_path / "ft"), tmp_path / "engine", "--use_gpt_attention_plugin")
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    same_as_hf(open_session(info), reference, 100)


@pytest.mark.parametrize(
    "flags", [[], ["--use_gpt_attention_plugin", "--remove_input_padding"]], ids=["plain", "fused"]
)
def test_bundled_model(flags: list[str], tmp_path: Path) -> None:
    info = build_engine(convert(BUNDLED, tmp_path / "ft"), tmp_path / "engine", *flags)
    reference = GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    same_as_hf(open_session(info), reference, 100)


# Half precision rounds each operation: 2^-11 and 2^-8 a step, over some ten roundings that partly cancel.
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 5e-3), ("bfloat16", 2e-2)])
def test_half_precision_stays_near_float32(dtype: str, bound: float, tmp_path: Path) -> None:
    checkpoint = convert(BUNDLED, tmp_path / "ft")
    prompts = random_prompts(LENGTHS, 4096)
    logits = []
    for name in ("float32", dtype):
        info = build_engine(checkpoint, tmp_path / name, "--use_gpt_attention_plugin", "--dtype", name)
        session = open_session(info)
        session.start(len(prompts), 40)
        steps = [session.context(prompts).clone()]
        steps += [session.generation(torch.tensor([7, 8, 9, 10])).clone() for _ in range(3)]
        logits.append(torch.cat(steps))
    assert relative_error(logits[1], logits[0]) < bound
    assert relative_error(logits[1], logits[0]) > 0


RANDOM_SHAPES = {
    "rope swiglu no bias": ["--rotary_pct", "0.5", "--hidden_act", "swiglu", "--no_bias", "--inter_size", "40"],
    "multi-query": ["--multi_query_mode", "--hidden_act", "gelu_new"],
    "multi-query full rope": ["-mq", "--rotary_pct", "1.0", "--hidden_act", "geglu"],
    "learned squared-relu": ["--hidden_act", "squared-relu"],
}


def random_engine(tmp_path: Path, *flags: str) -> tuple[EngineInfo, dict[str, torch.Tensor]]:
    sizes = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
    info = build_engine(None, tmp_path / "engine", *sizes, "--dtype", "float32", "--random_seed", "5", *flags)
    return info, load_torch_weights(info, Mapping(), torch.device("cpu"))


@pytest.mark.parametrize("layout", [[], ["--remove_input_padding"]], ids=["padded", "packed"])
@pytest.mark.parametrize("attention", [[], ["--use_gpt_attention_plugin"]], ids=["plain", "fused"])
@pytest.mark.parametrize("shape", RANDOM_SHAPES.values(), ids=RANDOM_SHAPES)
def test_other_architectures(shape: list[str], attention: list[str], layout: list[str], tmp_path: Path) -> None:
    """Context, then generation steps, each equal to running the whole sequence from the start."""
    info, weights = random_engine(tmp_path, *shape, *attention, *layout)
    session = open_session(info)
    sequences = random_prompts(LENGTHS, 91)
    session.start(len(sequences), 30)
    logits = session.context(sequences)
    for step in range(6):
        for sequence, row in zip(sequences, logits, strict=True):
            assert relative_error(row, plain_logits(info.model, weights, sequence)[-1]) < FP32_BOUND
        new = [(11 * step + 3 * row) % 91 for row in range(len(sequences))]
        sequences = [[*sequence, token] for sequence, token in zip(sequences, new, strict=True)]
        logits = session.generation(torch.tensor(new))


def test_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    checkpoint = convert(BUNDLED, tmp_path / "ft")
    prompts = random_prompts((3, 40, 11, 11, 70, 1), 4096, seed=3)
    alone = []
    for layout in ([], ["--remove_input_padding"]):
        info = build_engine(checkpoint, tmp_path / f"engine{len(layout)}", "--use_gpt_attention_plugin", *layout)
        session = open_session(info)
        alone.append([generate(session, Request([p], max_new_tokens=40)).tokens[0] for p in prompts])
        assert generate(session, Request(prompts, max_new_tokens=40)).tokens == alone[-1]
        assert generate(session, Request(prompts[::-1], max_new_tokens=40)).tokens == alone[-1][::-1]
    assert alone[0] == alone[1]
