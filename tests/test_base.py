"""Errors, dtypes, the two configuration records and the split rules."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gpt.checkpoint.config_ini import model_from_ini, model_to_ini
from gpt.checkpoint.layout import tensors
from gpt.config import ACTIVATIONS, BuildConfig, ModelConfig, check_against_positions
from gpt.dtypes import canonical_dtype
from gpt.engine.original_config import builder_config, plugin_config
from gpt.errors import CheckpointError, ConfigError, EngineError, GptError, Problems, rethrow_as
from gpt.mapping import Mapping, Split, check_divides

MODEL = ModelConfig(vocab_size=301, n_positions=64, n_embd=48, n_head=6, n_layer=2, n_kv_head=6, inter_size=120)
MULTI_QUERY = dataclasses.replace(MODEL, n_kv_head=1)


# Errors.


def test_an_error_says_what_found_allowed_next_in_that_order() -> None:
    error = ConfigError("no such rank", found=4, allowed="0 to 3", hint="start 4 processes")
    assert str(error).splitlines() == [
        "no such rank",
        "  found:   4",
        "  allowed: 0 to 3",
        "  next:    start 4 processes",
    ]


def test_an_error_lists_several_findings_and_omits_what_is_unknown() -> None:
    assert str(CheckpointError("two files are wrong", found=["a.bin", "b.bin"])).splitlines() == [
        "two files are wrong",
        "  found:",
        "    - a.bin",
        "    - b.bin",
    ]


@pytest.mark.parametrize(("kind", "code"), [(GptError, 1), (ConfigError, 2), (CheckpointError, 3), (EngineError, 3)])
def test_exit_codes(kind: type[GptError], code: int) -> None:
    assert kind("x").exit_code == code


def test_problems_are_raised_together_and_counted_beyond_the_limit() -> None:
    problems = Problems()
    problems.raise_if_any(CheckpointError, "nothing is wrong")
    for index in range(22):
        problems.add(f"file {index}")
    with pytest.raises(CheckpointError) as caught:
        problems.raise_if_any(CheckpointError, "files are missing", hint="copy again")
    assert caught.value.found == [*(f"file {index}" for index in range(20)), "... and 2 more"]
    assert caught.value.hint == "copy again"


def test_the_same_details_under_another_exit_code() -> None:
    error = rethrow_as(ConfigError("n_head: missing", hint="look"), CheckpointError, "config.ini is damaged")
    assert (error.exit_code, error.what, error.found, error.hint) == (
        3,
        "config.ini is damaged",
        ["n_head: missing"],
        "look",
    )


# Types.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("half", "float16"), ("bfloat16", "bfloat16")],
)
def test_dtype_names(name: str, dtype: str) -> None:
    assert canonical_dtype(name) == dtype


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'int8'[\s\S]*float32, float16, bfloat16"):
        canonical_dtype("int8")


# The model.


def test_a_wrong_model_is_told_everything_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(
            MODEL, n_head=7, n_kv_head=2, hidden_act="gello", layer_norm_epsilon=0.0, rotary_pct=1.5, eos_token_id=-1
        )
    text = str(caught.value)
    for part in ("n_embd 48", "key/value heads 2", "'gello'", "layer_norm_epsilon", "rotary_pct", "eos_token_id"):
        assert part in text


@pytest.mark.parametrize(
    "name", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "n_kv_head", "inter_size"]
)
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_sizes_have_bounds(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found {value}"):
        ModelConfig.from_json({**MODEL.to_json(), name: value})


@pytest.mark.parametrize(("rotary_pct", "word"), [(0.4, "odd"), (0.01, "nothing")])
def test_rotary_must_turn_pairs(rotary_pct: float, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(MODEL, rotary_pct=rotary_pct)  # 8 values per head: 3.2 and 0.08 of them


def test_the_meaning_of_activation_names() -> None:
    functions = {name: activation.function for name, activation in ACTIVATIONS.items()}
    assert functions["gelu"] == "gelu_erf"  # in HF's sense
    assert {functions[name] for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")} == {"gelu_tanh"}
    assert {name for name, activation in ACTIVATIONS.items() if activation.gated} == {
        *("swiglu", "fast-swiglu", "geglu", "fast-geglu", "geglu_erf", "reglu", "fast-reglu")
    }


def test_derived_sizes() -> None:
    assert (MODEL.head_size, MODEL.qkv_size, MODEL.multi_query) == (8, 144, False)
    assert (MULTI_QUERY.qkv_size, MULTI_QUERY.multi_query) == (64, True)
    assert MODEL.learned_positions
    assert not dataclasses.replace(MODEL, rotary_pct=0.5).learned_positions


@pytest.mark.parametrize(("ranks", "padded"), [(1, 304), (2, 304), (3, 312), (16, 304), (5, 320)])
def test_the_vocabulary_is_padded_to_whole_shares_of_eight(ranks: int, padded: int) -> None:
    assert MODEL.padded_vocab_size(ranks) == padded


def test_attention_scale() -> None:
    assert MODEL.attention_scale(1) == pytest.approx(8**-0.5)
    assert dataclasses.replace(MODEL, scale_attn_weights=False).attention_scale(1) == 1.0
    assert dataclasses.replace(MODEL, scale_attn_by_inverse_layer_idx=True).attention_scale(1) == pytest.approx(
        8**-0.5 / 2
    )


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        MULTI_QUERY,
        dataclasses.replace(
            MODEL, hidden_act="swiglu", bias=False, rotary_pct=0.5, tied_head=False, bos_token_id=1, eos_token_id=2
        ),
        dataclasses.replace(
            MODEL, layer_norm_epsilon=1e-12, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True
        ),
    ],
)
def test_a_model_survives_its_files(model: ModelConfig) -> None:
    assert model_from_ini(model_to_ini(model)) == model
    assert ModelConfig.from_json(json.loads(json.dumps(model.to_json()))) == model


def test_the_spelling_of_fastertransformer_is_read() -> None:
    section = {
        "head_num": "16",
        "size_per_head": "64",
        "inter_size": "4096",
        "num_layer": "24",
        "max_pos_seq_len": "1024",
        "vocab_size": "50257",
        "start_id": "50256",
        "end_id": "50256",
        "layernorm_eps": "1e-5",
    }
    model = model_from_ini(section)
    assert (model.n_embd, model.n_head, model.n_layer, model.n_positions) == (1024, 16, 24, 1024)
    assert (model.inter_size, model.eos_token_id, model.activation.function) == (4096, 50256, "gelu_tanh")


def test_a_damaged_ini_is_told_everything_at_once() -> None:
    section = {**model_to_ini(MODEL), "n_layer": "two", "bias": "perhaps"}
    del section["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        model_from_ini(section)
    text = str(caught.value)
    assert "vocab_size: missing" in text
    assert "n_layer: found 'two', allowed: int" in text
    assert "bias: found 'perhaps', allowed: bool" in text


def test_a_saved_record_with_other_keys_is_refused() -> None:
    values = {**MODEL.to_json(), "n_expert": 8}
    del values["n_head"]
    with pytest.raises(ConfigError, match=r"n_expert: unknown key[\s\S]*n_head: missing"):
        ModelConfig.from_json(values)


# The build.


def test_a_build_survives_its_file() -> None:
    build = BuildConfig(dtype="bfloat16", backend="tensorrt", targets=("ada", "ampere"), gemm_plugin="bfloat16", seed=3)
    assert BuildConfig.from_json(json.loads(json.dumps(build.to_json()))) == build


@pytest.mark.parametrize("name", ["world_size", "max_batch_size", "max_input_len", "max_output_len", "max_beam_width"])
def test_limits_have_bounds(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found 0"):
        BuildConfig(**{name: 0})  # type: ignore[arg-type]


def test_config_json_says_what_the_original_says() -> None:
    build = BuildConfig(dtype="float16", gpt_attention_plugin="float16", context_fmha=2, remove_input_padding=True)
    builder, plugins = builder_config(MULTI_QUERY, build), plugin_config(build)
    assert (builder["name"], builder["precision"], builder["tensor_parallel"]) == ("gpt", "float16", 1)
    assert (builder["num_heads"], builder["num_kv_heads"], builder["multi_query_mode"]) == (6, 1, True)
    assert plugins["gpt_attention_plugin"] == "float16"
    assert plugins["gemm_plugin"] is False
    assert (plugins["context_fmha_type"], plugins["remove_input_padding"]) == (2, True)
    assert (plugins["paged_kv_cache"], plugins["in_flight_batching"]) == (False, False)


def test_config_json_tells_of_the_paged_cache() -> None:
    build = BuildConfig(paged_kv_cache=True, tokens_per_block=16, use_inflight_batching=True, max_num_tokens=512)
    builder, plugins = builder_config(MULTI_QUERY, build), plugin_config(build)
    assert (builder["paged_kv_cache"], builder["tokens_per_block"], builder["max_num_tokens"]) == (True, 16, 512)
    assert (plugins["paged_kv_cache"], plugins["in_flight_batching"]) == (True, True)


def test_a_paged_cache_has_its_conditions() -> None:
    with pytest.raises(ConfigError, match=r"use_inflight_batching: needs paged_kv_cache"):
        BuildConfig(use_inflight_batching=True)
    with pytest.raises(ConfigError, match=r"paged_kv_cache: a TensorRT network"):
        BuildConfig(backend="tensorrt", paged_kv_cache=True)


def test_cache_bytes() -> None:
    build = BuildConfig(dtype="float16")
    assert build.kv_cache_bytes(MODEL, batch_size=3, num_slots=10) == 2 * 2 * 3 * 6 * 10 * 8 * 2
    assert build.kv_cache_bytes(MULTI_QUERY, batch_size=3, num_slots=10) == 2 * 2 * 3 * 1 * 10 * 8 * 2


def test_limits_beyond_learned_positions_are_refused_with_a_way_out() -> None:
    build = BuildConfig(max_input_len=40, max_output_len=30)
    with pytest.raises(
        ConfigError, match=r"40 \+ max_output_len 30 = 70[\s\S]*n_positions = 64[\s\S]*--max_input_len 34"
    ):
        check_against_positions(MODEL, build)
    check_against_positions(MODEL, dataclasses.replace(build, max_input_len=34))
    check_against_positions(dataclasses.replace(MODEL, rotary_pct=0.5), build)


# The ranks.


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_lies_within_its_world(rank: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 0 to 1"):
        Mapping(2, rank)


def test_an_uneven_split_names_every_dimension_and_what_works() -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(MODEL, 4)
    assert caught.value.found == ["n_head 6 is not divisible by 4", "num_kv_heads 6 is not divisible by 4"]
    assert caught.value.allowed == "tensor parallelism of 1, 2, 3, 6"
    check_divides(MULTI_QUERY, 3)


@pytest.mark.parametrize(
    "model", [MODEL, MULTI_QUERY, dataclasses.replace(MODEL, hidden_act="swiglu", tied_head=False)]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_tensor_is_cut_to_its_declared_shape_and_nothing_is_lost(model: ModelConfig, ranks: int) -> None:
    for tensor in tensors(model):
        whole = torch.arange(float(torch.Size(tensor.shape).numel())).view(tensor.shape)
        parts = [Mapping(ranks, rank).shard(tensor.split, whole, model) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            assert tuple(part.shape) == tensor.file_shape(Mapping(ranks, rank), model), tensor.name
        assert torch.equal(torch.cat([part.flatten() for part in parts]).unique(), whole.flatten()), tensor.name


@pytest.mark.parametrize("model", [MODEL, MULTI_QUERY])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_the_heads_of_the_whole(model: ModelConfig, ranks: int) -> None:
    """What each rank projects is the Q, K and V of its own heads, in the order Q, K, V."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, model.n_embd, generator=generator, dtype=torch.float64)
    weight = torch.randn(model.n_embd, model.qkv_size, generator=generator, dtype=torch.float64)
    sizes = [model.n_head * model.head_size, model.n_kv_head * model.head_size, model.n_kv_head * model.head_size]
    whole = (x @ weight).split(sizes, dim=-1)
    for rank in range(ranks):
        mapping = Mapping(ranks, rank)
        heads = mapping.local_heads(model) * model.head_size
        kv_heads = mapping.local_kv_heads(model) * model.head_size
        q, k, v = (x @ mapping.shard(Split.QKV, weight, model)).split([heads, kv_heads, kv_heads], dim=-1)
        kv_start = 0 if model.multi_query else rank * kv_heads
        torch.testing.assert_close(q, whole[0][:, rank * heads : (rank + 1) * heads])
        torch.testing.assert_close(k, whole[1][:, kv_start : kv_start + kv_heads])
        torch.testing.assert_close(v, whole[2][:, kv_start : kv_start + kv_heads])


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_sum_over_ranks_is_the_whole_mlp(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, MODEL.n_embd, generator=generator, dtype=torch.float64)
    up = torch.randn(MODEL.n_embd, MODEL.inter_size, generator=generator, dtype=torch.float64)
    up_bias = torch.randn(MODEL.inter_size, generator=generator, dtype=torch.float64)
    down = torch.randn(MODEL.inter_size, MODEL.n_embd, generator=generator, dtype=torch.float64)
    total = torch.zeros(5, MODEL.n_embd, dtype=torch.float64)
    for rank in range(ranks):
        mapping = Mapping(ranks, rank)
        inner = x @ mapping.shard(Split.COLUMN, up, MODEL) + mapping.shard(Split.COLUMN, up_bias, MODEL)
        total += torch.relu(inner) @ mapping.shard(Split.ROW, down, MODEL)
    torch.testing.assert_close(total, torch.relu(x @ up + up_bias) @ down)


@pytest.mark.parametrize("ranks", [1, 3])
def test_file_names_carry_a_rank_only_where_ranks_differ(ranks: int) -> None:
    for tensor in tensors(MODEL):
        name = Path(tensor.file_name(ranks - 1))
        assert name.suffix == ".bin"
        assert name.stem.endswith(f".{ranks - 1}") == (tensor.split is not Split.NONE)
