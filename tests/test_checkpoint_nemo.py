"""NeMo archives: what they mean, compared with NeMo's own arithmetic, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_gpt import plain_logits
from tiny_nemo import (
    GPT_NEXT,
    VOCAB_SIZE,
    State,
    bpe_files,
    core_names,
    nemo_logits,
    save_model,
    sentencepiece_model,
    tiny_config,
    tiny_state,
    torch_bytes,
)

from gpt.checkpoint.layout import tensors
from gpt.checkpoint.manifest import Manifest
from gpt.checkpoint.nemo import read_config
from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig
from gpt.dtypes import FLOAT_DTYPES
from gpt.engine.weights import engine_tensors
from gpt.errors import CheckpointError, ConfigError
from gpt.mapping import Mapping
from gpt.runtime.torch_session import TorchSession
from nemo_ckpt_convert import ProgArgs, run_conversion

ROPE = {"position_embedding_type": "rope"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt with biases and learned positions": {},
    "gpt-next": GPT_NEXT,
    "legacy order of the fused projection": {"megatron_legacy": True},
    "swiglu in two matrices, with biases": {"activation": "swiglu", "bias_activation_fusion": False},
    "fast-swiglu with biases": {"activation": "fast-swiglu", "bias_activation_fusion": False},
    "geglu by the fused kernel": {"activation": "geglu"},
    "exact fast-geglu": {"activation": "fast-geglu", "bias": False},
    "exact gelu": {"bias_activation_fusion": False},
    "gelu of OpenAI": {"bias_gelu_fusion": False, "openai_gelu": True, "bias_activation_fusion": False},
    "reglu": {"activation": "reglu", "bias": False},
    "fast-reglu": {"activation": "fast-reglu", "bias": False},
    "squared relu, separate head": {"activation": "squared-relu", "share_embeddings_and_output_weights": False},
    "rmsnorm, full rope": {**ROPE, "normalization": "rmsnorm", "bias": False},
    "rope with base and interpolation": {
        **ROPE,
        "rotary_percentage": 0.25,
        "rotary_base": 500.0,
        "seq_len_interpolation_factor": 2.5,
    },
    "scores that are not normalised": {"normalize_attention_scores": False},
}


def convert(source: Path, out: Path, tp: int = 1, **options: Any) -> Path:
    return run_conversion(
        ProgArgs(out_dir=str(out), in_file=str(source), tensor_parallelism=tp, processes=2, **options)
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def refusal(source: Path, tmp_path: Path) -> CheckpointError:
    """The error of a conversion that must fail, after which nothing may be left."""
    with pytest.raises(CheckpointError) as raised:
        convert(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    return raised.value


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_nemo(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    state = tiny_state(config)
    folder = convert(save_model(tmp_path / "tiny.nemo", config, state, tp=2, pp=2), tmp_path)
    checkpoint = Checkpoint.open(folder)
    build = BuildConfig(dtype="float32", max_input_len=12, max_output_len=4)
    weights = dict(engine_tensors(checkpoint.model, build, Mapping(), checkpoint))
    ids = [3, 300, 17, 4, 4, 250, 0, 99, 12, 77, 150]
    expected = nemo_logits(config, state, ids)

    plain = plain_logits(checkpoint.model, weights, ids)
    assert (plain - expected).norm() / expected.norm() < 1e-6

    session = TorchSession(checkpoint.model, build, Mapping(), weights)
    session.start(1, 16)
    logits = session.context([ids])[0].double()
    assert (logits - expected[-1]).norm() / expected[-1].norm() < 1e-5


@pytest.mark.parametrize("changes", [{}, GPT_NEXT, {"megatron_legacy": True}], ids=["gpt", "gpt-next", "legacy"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 4)])
def test_the_training_layout_leaves_no_trace(changes: dict[str, Any], tp: int, pp: int, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    state = tiny_state(config)
    one = save_model(tmp_path / "one.nemo", config, state)
    many = save_model(tmp_path / "many.nemo", config, state, tp=tp, pp=pp, mode="w:gz")
    for ranks in (1, 4):
        direct = files_of(convert(one, tmp_path / "one", ranks))
        assert files_of(convert(many, tmp_path / "many", ranks)) == direct
        assert len(direct) > 40


def test_the_ranks_of_the_output_are_parts_of_the_whole(tmp_path: Path) -> None:
    config = tiny_config(**GPT_NEXT)
    source = save_model(tmp_path / "tiny.nemo", config, tiny_state(config), tp=4)
    whole, halves = (Checkpoint.open(convert(source, tmp_path, ranks)) for ranks in (1, 2))
    for tensor in tensors(whole.model):
        values = whole.read(tensor, Mapping())
        for rank in range(2):
            part = Mapping(2, rank).shard(tensor.split, values, whole.model)
            assert torch.equal(halves.read(tensor, Mapping(2, rank)), part), tensor.name


def test_archive_and_folder_are_the_same(tmp_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    results = [
        files_of(convert(save_model(tmp_path / name, config, state, tp=2, mode=mode), tmp_path / f"out-{name}"))
        for name, mode in (("plain", "w"), ("gzip", "w:gz"), ("folder", None))
    ]
    assert results[0] == results[1] == results[2]


def test_bfloat16_stays_as_it_is_and_the_one_of_layernorm1p_is_added_in_float32(tmp_path: Path) -> None:
    config = tiny_config(**GPT_NEXT)
    state = {name: value.bfloat16() for name, value in tiny_state(config).items()}
    source = save_model(tmp_path / "tiny.nemo", config, state)
    name = "model.language_model.encoder.layers.1.{}.weight"
    whole = Checkpoint.open(convert(source, tmp_path / "float32"))
    by_name = {tensor.name: whole.read(tensor, Mapping()) for tensor in tensors(whole.model)}
    norm = state[name.format("input_layernorm")].float() + 1
    assert torch.equal(by_name["model.layers.1.input_layernorm.weight"], norm)
    assert not torch.equal(norm, norm.bfloat16().float())
    half = convert(source, tmp_path / "bfloat16", storage_type="bfloat16")
    dense = (half / "model.layers.1.attention.dense.weight.0.bin").read_bytes()
    assert dense == state[name.format("self_attention.dense")].t().contiguous().view(torch.uint8).numpy().tobytes()


def test_the_names_of_megatron_core_and_of_wrappers_are_known(tmp_path: Path) -> None:
    config = tiny_config(**GPT_NEXT)
    state = tiny_state(config)
    core = {name.replace("model.", "model.module.", 1): value for name, value in core_names(state).items()}
    assert len(core) == len(state)
    assert "model.module.decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in core
    edited = save_model(tmp_path / "core", config, state, mode=None)
    (edited / "model_weights.ckpt").write_bytes(torch_bytes({"state_dict": core, "epoch": 3}))
    plain = save_model(tmp_path / "plain", config, state, mode=None)
    assert files_of(convert(edited, tmp_path / "a")) == files_of(convert(plain, tmp_path / "b"))


def test_grouped_queries_of_megatron_core(tmp_path: Path) -> None:
    """Two query heads share a key and value head: [G, H/G + 2, D] on the way in, [Q, K, V] on the way out."""
    config = tiny_config(mcore_gpt=True, num_query_groups=2)
    state = tiny_state(config)
    grouped = torch.arange(2 * 4 * 8 * 32.0).view(2, 4, 8, 32)
    name = "model.language_model.encoder.layers.0.self_attention.query_key_value"
    for layer in range(4):
        state[name.replace("layers.0", f"layers.{layer}") + ".weight"] = grouped.flatten(0, 2)
        state[name.replace("layers.0", f"layers.{layer}") + ".bias"] = torch.zeros(64)
    checkpoint = Checkpoint.open(convert(save_model(tmp_path / "tiny.nemo", config, state, tp=2), tmp_path))
    assert checkpoint.model.n_kv_head == 2
    tensor = next(t for t in tensors(checkpoint.model) if t.name.endswith("0.attention.query_key_value.weight"))
    q, k, v = checkpoint.read(tensor, Mapping()).t().split([32, 16, 16])
    assert torch.equal(q.view(2, 2, 8, 32), grouped[:, :2])
    assert torch.equal(k.view(2, 8, 32), grouped[:, 2])
    assert torch.equal(v.view(2, 8, 32), grouped[:, 3])


def test_things_that_are_known_and_not_needed(tmp_path: Path) -> None:
    config = tiny_config(**GPT_NEXT)
    state = tiny_state(config)

    def add(ranks: dict[tuple[int, int], State]) -> None:
        ranks[0, 0]["model.language_model.embedding.position_embeddings.weight"] = torch.zeros(24, 32)
        ranks[0, 0]["model.language_model.rotary_pos_emb.inv_freq"] = torch.zeros(4)
        ranks[0, 1]["model.word_embeddings.weight"] = torch.zeros(304, 32)
        ranks[0, 1]["model.language_model.encoder.layers.0.self_attention.core_attention._extra_state"] = torch.zeros(1)

    more = save_model(tmp_path / "more.nemo", config, state, pp=2, edit=add)
    less = save_model(tmp_path / "less.nemo", config, state)
    assert files_of(convert(more, tmp_path / "more")) == files_of(convert(less, tmp_path / "less"))


def test_the_yaml_may_leave_the_head_to_the_weights(tmp_path: Path) -> None:
    config = tiny_config(share_embeddings_and_output_weights=False)
    state = tiny_state(config)
    del config["share_embeddings_and_output_weights"]
    checkpoint = Checkpoint.open(convert(save_model(tmp_path / "tiny.nemo", config, state, tp=2, pp=2), tmp_path))
    assert not checkpoint.model.tied_head


@pytest.mark.parametrize("tp", [1, 2])
def test_a_head_that_is_the_embedding_by_the_yaml_alone_is_refused(tp: int, tmp_path: Path) -> None:
    config = tiny_config(share_embeddings_and_output_weights=False)
    state = tiny_state(config)
    config["share_embeddings_and_output_weights"] = True
    with pytest.raises(CheckpointError, match=r"output_layer\.weight: not the embedding"):
        convert(save_model(tmp_path / "other.nemo", config, state, tp=tp, pp=2), tmp_path)
    head = next(name for name in state if name.endswith("output_layer.weight"))
    state[head] = state[head.replace("output_layer", "embedding.word_embeddings")].clone()
    folder = convert(save_model(tmp_path / "copy.nemo", config, state, tp=tp, pp=2), tmp_path)
    assert Checkpoint.open(folder).model.tied_head


def test_sizes_come_from_the_tables_where_the_yaml_has_none(tmp_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    del config["max_position_embeddings"]
    model = Checkpoint.open(convert(save_model(tmp_path / "tiny.nemo", config, state, tp=2), tmp_path)).model
    assert (model.n_positions, model.vocab_size) == (24, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("activation", "mish", "mish"),
        ("position_embedding_type", "alibi", "alibi"),
        ("position_embedding_type", "relative", "relative"),
        ("normalization", "batchnorm", "batchnorm"),
        ("transformer_block_type", "post_ln", "post_ln"),
        ("hidden_size", None, "hidden_size: missing"),
        ("num_layers", "4", "num_layers"),
        ("bias", "maybe", "maybe"),
        ("rotary_percentage", "half", "half"),
        ("kv_channels", 64, "kv_channels"),
        ("num_query_groups", 2, "num_query_groups"),
        ("num_moe_experts", 8, "num_moe_experts"),
        ("tokenizer", "gpt2", "tokenizer"),
    ],
)
def test_a_yaml_that_asks_for_another_network_is_refused_by_name(key: str, value: Any, word: str) -> None:
    config = tiny_config(**ROPE)
    config[key] = value
    with pytest.raises(CheckpointError, match="cannot be converted") as raised:
        read_config(config)
    assert word in str(raised.value)


def test_all_problems_of_a_yaml_are_told_at_once() -> None:
    with pytest.raises(CheckpointError) as raised:
        read_config(tiny_config(activation="mish", position_embedding_type="alibi", headscale=True, num_layers=0))
    assert len(raised.value.found) == 4  # type: ignore[arg-type]


def test_numbers_that_yaml_takes_for_words_are_read() -> None:
    assert read_config(tiny_config(layernorm_epsilon="1e-05")).fields["layer_norm_epsilon"] == 1e-5


def drop(name: str) -> Callable[[dict[tuple[int, int], State]], None]:
    return lambda ranks: ranks[1, 0].__delitem__(f"model.language_model.{name}")


def test_every_wrong_tensor_of_every_rank_is_told_at_once(tmp_path: Path) -> None:
    config = tiny_config()

    def spoil(ranks: dict[tuple[int, int], State]) -> None:
        prefix = "model.language_model.encoder.layers.1."
        del ranks[1, 0][prefix + "mlp.dense_h_to_4h.weight"]
        ranks[0, 1][prefix + "self_attention.dense.weight"] = torch.zeros(32, 8)
        ranks[1, 1][prefix + "mlp.dense_4h_to_h.weight"] = torch.zeros(32, 24, dtype=torch.int8)
        ranks[1, 1]["model.language_model.pooler.weight"] = torch.zeros(1)
        ranks[0, 0][prefix + "self_attention.dense.weight"] = torch.zeros(32, 16).half()

    error = refusal(save_model(tmp_path / "tiny.nemo", config, tiny_state(config), tp=2, pp=2, edit=spoil), tmp_path)
    floats = ", ".join(FLOAT_DTYPES)
    assert error.found == [
        "encoder.layers.1.self_attention.dense.weight: the ranks' dtypes differ: float16, float32",
        "tp rank 1 pp rank 0: encoder.layers.1.mlp.dense_h_to_4h.weight: missing",
        "tp rank 0 pp rank 1: encoder.layers.1.self_attention.dense.weight: found [32, 8], expected [32, 16]",
        f"tp rank 1 pp rank 1: encoder.layers.1.mlp.dense_4h_to_h.weight: found int8, allowed: {floats}",
        "pp rank 1: pooler.weight: unknown",
    ]


def test_an_embedding_that_one_rank_lacks(tmp_path: Path) -> None:
    config = tiny_config()
    edit = drop("embedding.word_embeddings.weight")
    error = refusal(save_model(tmp_path / "tiny.nemo", config, tiny_state(config), tp=2, edit=edit), tmp_path)
    assert "embedding.word_embeddings.weight" in error.what


def test_missing_and_superfluous_ranks(tmp_path: Path) -> None:
    config = tiny_config()
    folder = save_model(tmp_path / "tiny", config, tiny_state(config), tp=2, pp=2, mode=None)
    (folder / "tp_rank_01_pp_rank_000" / "model_weights.ckpt").unlink()
    (folder / "tp_rank_00_pp_rank_002").mkdir()
    error = refusal(folder, tmp_path)
    assert error.found == [
        "tp_rank_01_pp_rank_000/model_weights.ckpt: missing",
        "tp_rank_00_pp_rank_002: a rank that model_config.yaml does not know",
    ]


def test_a_last_checkpoint_stands_in_for_the_named_one(tmp_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    named = save_model(tmp_path / "a", config, state, mode=None)
    other = save_model(tmp_path / "b", config, state, mode=None)
    (other / "model_weights.ckpt").rename(other / "megatron--last.ckpt")
    assert files_of(convert(named, tmp_path / "out-a")) == files_of(convert(other, tmp_path / "out-b"))


def test_a_number_of_ranks_that_does_not_fit(tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(ConfigError, match="3 ranks"):
        convert(save_model(tmp_path / "tiny.nemo", config, tiny_state(config)), tmp_path / "out", tp=3)


def test_a_sentencepiece_tokenizer_travels_along(tmp_path: Path) -> None:
    config = tiny_config(tokenizer={"library": "sentencepiece", "model": "nemo:0a1b_tiny.model", "vocab_file": None})
    model = sentencepiece_model()
    extra = {"0a1b_tiny.model": model, "other.model": b"not this one"}
    source = save_model(tmp_path / "tiny.nemo", config, tiny_state(config), extra=extra)
    folder = convert(source, tmp_path)
    assert (folder / "tokenizer.model").read_bytes() == model
    assert Manifest.load(folder).tokenizer_files == ("tokenizer.model",)
    described = Checkpoint.open(folder).model
    assert (described.bos_token_id, described.eos_token_id) == (1, 2)


def test_a_byte_level_tokenizer_travels_along(tmp_path: Path) -> None:
    section = {
        "library": "megatron",
        "type": "GPT2BPETokenizer",
        "model": None,
        "vocab_file": "/artifacts/ab_gpt2-vocab.json",
        "merge_file": "/trainer/gpt2-merges.txt",
    }
    vocabulary, merges = bpe_files()
    config = tiny_config(tokenizer=section)
    extra = {"ab_gpt2-vocab.json": vocabulary, "cd_merges.txt": merges}
    folder = convert(save_model(tmp_path / "tiny.nemo", config, tiny_state(config), extra=extra), tmp_path)
    assert (folder / "vocab.json").read_bytes() == vocabulary
    assert (folder / "merges.txt").read_bytes() == merges
    assert Checkpoint.open(folder).model.eos_token_id == 256


def test_a_tokenizer_that_is_only_named_is_told_and_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.console.log.propagate", True)
    config = tiny_config(tokenizer={"library": "huggingface", "type": "some/model", "model": None})
    folder = convert(save_model(tmp_path / "tiny.nemo", config, tiny_state(config)), tmp_path)
    assert "some/model" in caplog.text
    assert "tokenizer_type = some/model" in (folder / "config.ini").read_text()


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tokenizer={"library": "sentencepiece", "model": "nemo:a.model"})
    state = tiny_state(config, vocab_size=288)
    error = refusal(
        save_model(tmp_path / "tiny.nemo", config, state, extra={"a.model": sentencepiece_model()}), tmp_path
    )
    assert "288" in str(error)


def test_an_ambiguous_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tokenizer={"library": "sentencepiece", "model": "/home/a/tokenizer.model"})
    state = tiny_state(config)
    two = save_model(tmp_path / "two.nemo", config, state, extra={"a.model": b"", "b.model": b""})
    assert "a.model, b.model" in str(refusal(two, tmp_path))
    bad = save_model(tmp_path / "bad.nemo", config, state, extra={"a.model": b"no model at all"})
    assert "a.model" in str(refusal(bad, tmp_path))
