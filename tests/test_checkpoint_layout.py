"""The table of tensors, against sizes worked out by hand from the format's description."""

from __future__ import annotations

import dataclasses
import math

import pytest

from gpt.checkpoint.expected import expected_files
from gpt.checkpoint.layout import QuantFiles, tensors
from gpt.config import ModelConfig
from gpt.mapping import Mapping

GPT2 = ModelConfig(vocab_size=50257, n_positions=1024, n_embd=768, n_head=12, n_layer=12, n_kv_head=12, inter_size=3072)
STARCODER = ModelConfig(
    vocab_size=49152, n_positions=8192, n_embd=6144, n_head=48, n_layer=40, n_kv_head=1, inter_size=24576
)

FLOAT_ONLY = QuantFiles()


def files(model: ModelConfig, world_size: int, quant: QuantFiles = FLOAT_ONLY) -> dict[str, tuple[int, ...]]:
    return {name: file.shape for name, file in expected_files(model, world_size, "float16", quant)}


def names(model: ModelConfig) -> set[str]:
    return {tensor.name for tensor in tensors(model)}


@pytest.mark.parametrize(
    ("file", "num_bytes"),
    [
        ("model.wte.bin", 77_194_752),
        ("model.wpe.bin", 1_572_864),
        ("model.layers.11.attention.query_key_value.weight.0.bin", 3_538_944),
        ("model.layers.0.attention.query_key_value.bias.0.bin", 4_608),
        ("model.layers.5.attention.dense.weight.0.bin", 1_179_648),
        ("model.layers.5.mlp.dense_h_to_4h.weight.0.bin", 4_718_592),
        ("model.layers.5.mlp.dense_4h_to_h.weight.0.bin", 4_718_592),
    ],
)
def test_sizes_of_the_124m_model_in_float16(file: str, num_bytes: int) -> None:
    assert math.prod(files(GPT2, 1)[file]) * 2 == num_bytes


@pytest.mark.parametrize(("world_size", "num_files"), [(1, 148), (2, 4 + 12 * (6 + 6 * 2)), (4, 4 + 12 * (6 + 6 * 4))])
def test_whole_tensors_are_written_once_and_the_others_per_rank(world_size: int, num_files: int) -> None:
    assert len(files(GPT2, world_size)) == num_files


def test_names_are_not_repeated() -> None:
    listed = [tensor.name for tensor in tensors(GPT2)]
    assert len(listed) == len(set(listed)) == 148


def test_what_a_rank_holds_of_the_124m_model() -> None:
    shapes = files(GPT2, 4)
    assert shapes["model.layers.0.attention.query_key_value.weight.3.bin"] == (768, 3 * 192)
    assert shapes["model.layers.0.attention.query_key_value.bias.3.bin"] == (3 * 192,)
    assert shapes["model.layers.0.attention.dense.weight.3.bin"] == (192, 768)
    assert shapes["model.layers.0.mlp.dense_h_to_4h.weight.3.bin"] == (768, 768)
    assert shapes["model.layers.0.mlp.dense_h_to_4h.bias.3.bin"] == (768,)
    assert shapes["model.layers.0.mlp.dense_4h_to_h.weight.3.bin"] == (768, 768)
    assert shapes["model.layers.0.mlp.dense_4h_to_h.bias.bin"] == (768,)


def test_one_key_value_head_is_repeated_on_every_rank() -> None:
    shapes = files(STARCODER, 4)
    assert {shapes[f"model.layers.39.attention.query_key_value.weight.{rank}.bin"] for rank in range(4)} == {
        (6144, 1792)
    }


def test_a_tensor_exists_only_where_the_model_has_it() -> None:
    assert "model.lm_head.weight" not in names(GPT2)
    assert "model.lm_head.weight" in names(dataclasses.replace(GPT2, tied_head=False))
    assert "model.wpe" not in names(dataclasses.replace(GPT2, rotary_pct=0.5))
    gated = names(dataclasses.replace(GPT2, hidden_act="swiglu"))
    assert {"model.layers.0.mlp.dense_h_to_4h.gate.weight", "model.layers.0.mlp.dense_h_to_4h.gate.bias"} <= gated
    without_bias = names(dataclasses.replace(GPT2, hidden_act="swiglu", bias=False))
    # Layernorms keep theirs.
    assert {name.split(".")[-2] for name in without_bias if name.endswith("bias")} == {
        "input_layernorm",
        "post_attention_layernorm",
        "final_layernorm",
    }


def test_local_sizes_add_up_to_the_whole() -> None:
    for tensor in tensors(GPT2):
        whole = math.prod(tensor.shape)
        local = math.prod(tensor.file_shape(Mapping(4, 0), GPT2))
        assert whole == local * (1 if tensor.file_name(3) == tensor.file_name(0) else 4)
