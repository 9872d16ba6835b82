"""From Hugging Face files to FT binaries, against the format written out in plain numpy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint import hf, hf_files
from gpt.checkpoint.store import Checkpoint
from gpt.errors import CheckpointError, ConfigError
from hf_gpt_convert import ProgArgs, run_conversion

MakeGpt2 = Callable[..., Path]


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The safetensors of a folder as float32, names without prefix."""
    result: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        result.update({name.removeprefix("transformer."): t.float() for name, t in load_file(path).items()})
    return result


def stored(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "bfloat16":
        return values.astype(dtype).tobytes()
    bits = values.astype(np.float32).view(np.uint32)
    # The upper half of a float32, rounded to nearest, ties to even.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def plain_conversion(folder: Path, tp: int, dtype: str) -> dict[str, bytes]:
    """Every file of the checkpoint by name, one numpy line per kind of tensor."""
    source = {name: tensor.numpy() for name, tensor in source_tensors(folder).items()}
    files: dict[str, np.ndarray] = {
        "model.wte.bin": source["wte.weight"],
        "model.wpe.bin": source["wpe.weight"],
        "model.final_layernorm.weight.bin": source["ln_f.weight"],
        "model.final_layernorm.bias.bin": source["ln_f.bias"],
    }
    if "lm_head.weight" in source:
        files["model.lm_head.weight.bin"] = source["lm_head.weight"]
    for layer in range(sum(name.endswith("ln_1.weight") for name in source)):
        h, ft = f"h.{layer}.", f"model.layers.{layer}."
        hidden = source[h + "ln_1.bias"].size
        for kind in ("weight", "bias"):
            files[f"{ft}input_layernorm.{kind}.bin"] = source[f"{h}ln_1.{kind}"]
            files[f"{ft}post_attention_layernorm.{kind}.bin"] = source[f"{h}ln_2.{kind}"]
        files[f"{ft}attention.dense.bias.bin"] = source[f"{h}attn.c_proj.bias"]
        files[f"{ft}mlp.dense_4h_to_h.bias.bin"] = source[f"{h}mlp.c_proj.bias"]
        split = {
            "attention.query_key_value.weight": np.split(
                source[f"{h}attn.c_attn.weight"].reshape(hidden, 3, hidden), tp, -1
            ),
            "attention.query_key_value.bias": np.split(source[f"{h}attn.c_attn.bias"].reshape(3, hidden), tp, -1),
            "attention.dense.weight": np.split(source[f"{h}attn.c_proj.weight"], tp, 0),
            "mlp.dense_h_to_4h.weight": np.split(source[f"{h}mlp.c_fc.weight"], tp, -1),
            "mlp.dense_h_to_4h.bias": np.split(source[f"{h}mlp.c_fc.bias"], tp, -1),
            "mlp.dense_4h_to_h.weight": np.split(source[f"{h}mlp.c_proj.weight"], tp, 0),
        }
        for name, parts in split.items():
            files.update({f"{ft}{name}.{rank}.bin": part for rank, part in enumerate(parts)})
    return {name: stored(values, dtype) for name, values in files.items()}


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def convert(source: Path, tp: int = 1, dtype: str = "float32", processes: int = 2) -> Path:
    return run_conversion(ProgArgs(str(source.parent / "out"), str(source), tp, processes, storage_type=dtype))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_are_those_of_the_plain_conversion(make_gpt2: MakeGpt2, tp: int, dtype: str) -> None:
    source = make_gpt2(n_inner=72, n_layer=3)
    assert written(convert(source, tp, dtype)) == plain_conversion(source, tp, dtype)


def test_tensors_of_many_blocks_and_an_odd_number_of_heads(
    make_gpt2: MakeGpt2, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of 2 rows: cuts fall inside tensors and at the borders of ranks.
    monkeypatch.setattr("gpt.checkpoint.writer.BLOCK_ELEMENTS", 100)
    source = make_gpt2(n_embd=36, n_head=3, n_inner=33, vocab_size=307)
    assert written(convert(source, 3, "float16", processes=1)) == plain_conversion(source, 3, "float16")


@pytest.mark.parametrize("source_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_half_precision_sources(make_gpt2: MakeGpt2, source_dtype: str, dtype: str) -> None:
    source = make_gpt2(dtype=source_dtype)
    assert written(convert(source, 2, dtype)) == plain_conversion(source, 2, dtype)


def test_an_untied_head_is_written_and_a_tied_one_in_the_file_is_not(make_gpt2: MakeGpt2) -> None:
    untied = make_gpt2("untied", tie_word_embeddings=False)
    folder = convert(untied)
    assert written(folder) == plain_conversion(untied, 1, "float32")
    assert not Checkpoint.open(folder).model.tied_head

    tied = make_gpt2("more/tied")
    weights = load_file(tied / "model.safetensors")
    expected = plain_conversion(tied, 1, "float32")
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}, tied / "model.safetensors")
    folder = convert(tied)
    assert written(folder) == expected
    assert Checkpoint.open(folder).model.tied_head


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(
    make_gpt2: MakeGpt2, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel

    source = make_gpt2(tie_word_embeddings=False)
    edit_config(source, tie_word_embeddings=True)
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
    folder = convert(source)
    assert "lm_head.weight differs from wte.weight: the head is kept apart" in caplog.text
    assert written(folder) == plain_conversion(source, 1, "float32")
    assert not Checkpoint.open(folder).model.tied_head
    head = GPT2LMHeadModel.from_pretrained(source).lm_head.weight  # Hugging Face reads the model so
    assert torch.equal(head, load_file(source / "model.safetensors")["lm_head.weight"])


def test_names_without_prefix_and_the_buffers_of_old_versions(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2()
    expected = plain_conversion(source, 2, "float32")
    weights = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, source / "model.safetensors")
    assert written(convert(source, 2)) == expected


def test_sharded_safetensors(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2(max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert written(convert(source)) == plain_conversion(source, 1, "float32")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_pytorch_files(make_gpt2: MakeGpt2, zipped: bool, num_shards: int) -> None:
    source = make_gpt2(dtype="float16")
    expected = plain_conversion(source, 2, "float16")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # shares its storage, as state_dict() does
    # One tensor that is no plain block of memory.
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].t().contiguous().t()
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"pytorch_model-{i:05}-of-{num_shards:05}.bin": names[i::num_shards] for i in range(num_shards)}
    if num_shards == 1:
        files = {"pytorch_model.bin": names}
    else:
        weight_map = {name: file for file, inside in files.items() for name in inside}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    for file, inside in files.items():
        torch.save({n: weights[n] for n in inside}, source / file, _use_new_zipfile_serialization=zipped)
    assert written(convert(source, 2, "float16")) == expected


def test_config_becomes_what_the_model_computes(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2(
        n_inner=40,
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=1e-3,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        pad_token_id=7,
    )
    model = Checkpoint.open(convert(source)).model
    assert (model.inter_size, model.hidden_act, model.layer_norm_epsilon) == (40, "gelu_pytorch_tanh", 1e-3)
    assert (model.scale_attn_weights, model.scale_attn_by_inverse_layer_idx) == (False, True)
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (263, 263, 7)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Changes config.json; None removes a key.  The generation settings go, so that config.json alone decides."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return folder


def test_a_minimal_config_has_the_defaults_of_gpt2(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2()
    sizes = {"vocab_size": 301, "max_position_embeddings": 64, "hidden_size": 32, "n_head": 4, "num_hidden_layers": 2}
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **sizes}), encoding="utf-8")
    _, _, model = hf.read_model(source)
    assert (model.n_positions, model.n_embd, model.n_layer, model.inter_size) == (64, 32, 2, 128)
    assert (model.hidden_act, model.layer_norm_epsilon, model.tied_head) == ("gelu_new", 1e-5, True)
    assert (model.bos_token_id, model.eos_token_id) == (None, None)  # never a number out of the air


def test_token_ids_out_of_the_vocabulary_are_left_out_and_the_first_of_several_is_kept(make_gpt2: MakeGpt2) -> None:
    source = edit_config(make_gpt2(), bos_token_id=50256, eos_token_id=[5, 6], pad_token_id=-1)
    _, _, model = hf.read_model(source)
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (None, 5, None)
    (source / "generation_config.json").write_text('{"eos_token_id": 9}', encoding="utf-8")
    assert hf.read_model(source)[2].eos_token_id == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": None, "n_layer": None}, "n_embd or hidden_size: missing"),
        ({"n_layer": "two"}, "n_layer: found 'two', allowed: an integer"),
        ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
        ({"vocab_size": -1}, "vocab_size: found -1"),
        ({"n_embd": 10**30}, "n_embd: found 1000000000000000000000000000000"),
        ({"n_layer": True}, "n_layer: found True, allowed: an integer"),
        ({"n_inner": 0.5}, "n_inner: found 0.5"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon: found 'small', allowed: float"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: found nan"),
        ({"activation_function": "mish"}, "hidden_act: found 'mish', allowed: gelu,"),
        ({"activation_function": "swiglu"}, "activation_function: found 'swiglu'"),
        ({"add_cross_attention": True}, "add_cross_attention: found True, not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: found {'bits': 4}, not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes', allowed: bool"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": None, "architectures": ["OPTForCausalLM"]}, "architectures ['OPTForCausalLM']"),
    ],
)
def test_configs_that_are_refused(make_gpt2: MakeGpt2, changes: dict[str, Any], message: str) -> None:
    source = edit_config(make_gpt2(), **changes)
    with pytest.raises(CheckpointError) as caught:
        hf.read_model(source)
    assert message in str(caught.value)


def test_missing_keys_are_reported_together(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2()
    (source / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        hf.read_model(source)
    assert str(caught.value).count(": missing") == 5


def test_an_unknown_architecture_names_the_supported_ones(make_gpt2: MakeGpt2) -> None:
    source = edit_config(make_gpt2(), model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError) as caught:
        hf.read_model(source)
    assert "model_type 'gpt2'" in str(caught.value.allowed)
    assert "LlamaForCausalLM" in str(caught.value)


def test_a_chosen_family_must_be_the_one_of_the_files(make_gpt2: MakeGpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_gpt2()
    assert hf.read_model(source, "gpt2")[0].name == "gpt2"
    with pytest.raises(ConfigError, match="--model contradicts"):
        hf.read_model(source, "another")


def test_every_tensor_that_does_not_fit_is_in_one_report(make_gpt2: MakeGpt2) -> None:
    source = make_gpt2()
    weights = load_file(source / "model.safetensors")
    del weights["transformer.h.0.ln_1.weight"]
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(32, 100)
    weights["transformer.h.1.ln_2.bias"] = torch.zeros(32, dtype=torch.int32)
    weights["score.weight"] = torch.zeros(2, 32)
    weights["wte.weight"] = torch.zeros(301, 32)
    save_file(weights, source / "model.safetensors")
    family, _, model = hf.read_model(source)
    with pytest.raises(CheckpointError) as caught:
        hf.match_tensors(family, model, hf_files.open_weights(source))
    assert isinstance(caught.value.found, list)
    assert sorted(caught.value.found) == [
        "h.0.ln_1.weight: missing",
        "h.1.ln_2.bias: found i32, allowed: float32, float16, bfloat16",
        "h.1.mlp.c_fc.weight: found [32, 100], config.json wants [32, 128]",
        "score.weight: unknown",
        "wte.weight: there with and without the prefix 'transformer.'",
    ]


@pytest.mark.parametrize("n_layer", [1, 3, 2**31 - 1])
def test_a_wrong_number_of_layers_is_one_line(make_gpt2: MakeGpt2, n_layer: int) -> None:
    source = edit_config(make_gpt2(), n_layer=n_layer)
    family, _, model = hf.read_model(source)
    with pytest.raises(CheckpointError) as caught:
        hf.match_tensors(family, model, hf_files.open_weights(source))
    assert caught.value.found == [f"n_layer: config.json says {n_layer}, the weights have 2 layers"]
