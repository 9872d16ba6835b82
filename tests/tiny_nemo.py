"""Tiny seeded NeMo models: state dicts, their division among training ranks, archives, and NeMo's own arithmetic."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

State = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_layers": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 24,
    "activation": "gelu",
    "bias": True,
    "normalization": "layernorm",
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-5,
}
GPT_NEXT: dict[str, Any] = {
    "activation": "fast-swiglu",
    "bias": False,
    "normalization": "layernorm1p",
    "position_embedding_type": "rope",
    "rotary_percentage": 0.5,
    "share_embeddings_and_output_weights": False,
}
VOCAB_SIZE = 304
_PREFIX = "model.language_model."


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {**SIZES, **changes}


def tiny_state(config: Mapping[str, Any], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> State:
    """Every parameter of one training rank, random, so that a mix-up changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    e, f = config["hidden_size"], config["ffn_hidden_size"]
    state: State = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        state[_PREFIX + name] = torch.randn(*shape, generator=generator) * 0.1 + around

    def norm(name: str) -> None:
        add(f"{name}.weight", e, around=0.0 if config["normalization"] == "layernorm1p" else 1.0)
        if config["normalization"] != "rmsnorm":
            add(f"{name}.bias", e)

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        if config["bias"]:
            add(f"{name}.bias", outputs)

    add("embedding.word_embeddings.weight", vocab_size, e)
    if config["position_embedding_type"] == "learned_absolute":
        add("embedding.position_embeddings.weight", config["max_position_embeddings"], e)
    for layer in range(config["num_layers"]):
        prefix = f"encoder.layers.{layer}."
        norm(prefix + "input_layernorm")
        linear(prefix + "self_attention.query_key_value", 3 * e, e)
        linear(prefix + "self_attention.dense", e, e)
        norm(prefix + "post_attention_layernorm")
        fused = config["activation"].startswith("fast-")
        linear(prefix + "mlp.dense_h_to_4h", 2 * f if fused else f, e)
        if config["activation"].endswith("glu") and not fused:
            linear(prefix + "mlp.dense_h_to_4h_2", f, e)
        linear(prefix + "mlp.dense_4h_to_h", e, f)
    norm("encoder.final_layernorm")
    if not config["share_embeddings_and_output_weights"]:
        add("output_layer.weight", vocab_size, e)
    return state


def divide(state: State, config: Mapping[str, Any], tp: int, pp: int) -> dict[tuple[int, int], State]:
    """{(tp rank, pp rank): its part}, cut as Megatron cuts a model that is trained on tp x pp ranks."""
    per_stage = config["num_layers"] // pp
    ranks: dict[tuple[int, int], State] = {(rank, stage): {} for rank in range(tp) for stage in range(pp)}
    for name, value in state.items():
        stage = 0 if ".embedding." in name else pp - 1
        local = name
        if ".layers." in name:
            number = int(name.split(".layers.")[1].split(".")[0])
            stage, own = divmod(number, per_stage)
            local = name.replace(f".layers.{number}.", f".layers.{own}.")
        for rank in range(tp):
            ranks[rank, stage][local] = _cut(name, value, config, tp, rank).clone()
    return ranks


def _cut(name: str, value: torch.Tensor, config: Mapping[str, Any], tp: int, rank: int) -> torch.Tensor:
    if "word_embeddings" in name or "output_layer" in name or "dense_h_to_4h_2" in name:
        return value.chunk(tp)[rank]
    if "query_key_value" in name:
        if not config.get("megatron_legacy"):
            return value.chunk(tp)[rank]  # heads one after the other, each with its q, k and v
        return torch.cat([part.chunk(tp)[rank] for part in value.chunk(3)])
    if "dense_h_to_4h" in name:
        matrices = 2 if config["activation"].startswith("fast-") else 1
        return torch.cat([part.chunk(tp)[rank] for part in value.chunk(matrices)])
    if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
        return value.chunk(tp, dim=1)[rank]
    return value


_CORE_NAMES = {
    "language_model.encoder": "decoder",
    "language_model.": "",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def core_names(state: State) -> State:
    """The same parameters as Megatron Core's modules call them."""
    result: State = {}
    for name, value in state.items():
        for old, new in _CORE_NAMES.items():
            name = name.replace(old, new)
        result[name] = value
    return result


def stacked(state: State, num_layers: int) -> State:
    """`decoder.layers.<name>` [L, ...] in place of the layers' own tensors."""
    result = {name: value for name, value in state.items() if ".layers." not in name}
    for name in (name for name in state if ".layers.0." in name):
        layers = [state[name.replace(".layers.0.", f".layers.{layer}.")] for layer in range(num_layers)]
        result[name.replace(".layers.0.", ".layers.")] = torch.stack(layers)
    return result


def save_model(
    path: Path,
    config: Mapping[str, Any],
    state: State,
    *,
    tp: int = 1,
    pp: int = 1,
    mode: str | None = "w",
    extra: Mapping[str, bytes] | None = None,
    edit: Callable[[dict[tuple[int, int], State]], None] | None = None,
) -> Path:
    """Writes an archive (`mode` "w" plain, "w:gz" compressed) or, with mode None, a folder; returns `path`.

    `extra`: more files by name.  `edit` changes the ranks' parts before they are saved.
    """
    ranks = divide(state, config, tp, pp)
    if edit:
        edit(ranks)
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    files = {"model_config.yaml": yaml.safe_dump({**config, **sizes}).encode(), **(extra or {})}
    for (rank, stage), part in ranks.items():
        folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/" if pp > 1 else f"mp_rank_{rank:02d}/" if tp > 1 else ""
        files[f"{folder}model_weights.ckpt"] = torch_bytes(part)
    return save_files(path, files, mode)


def save_prompts(path: Path, tasks: Mapping[str, torch.Tensor], *, mode: str | None = "w", **changes: Any) -> Path:
    """A prompt-learning archive: {task name: [virtual tokens, E]}; `changes` replace keys of its yaml."""
    config = {
        "hidden_size": next(iter(tasks.values())).shape[1],
        "virtual_prompt_style": "p-tuning",
        "task_templates": [{"taskname": name, "total_virtual_tokens": len(table)} for name, table in tasks.items()],
    }
    tables = {f"prompt_table.{name}.prompt_embeddings.weight": table for name, table in tasks.items()}
    files = {
        "model_config.yaml": yaml.safe_dump({**config, **changes}).encode(),
        "model_weights.ckpt": torch_bytes({"prompt_table": tables}),
    }
    return save_files(path, files, mode)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def save_files(path: Path, files: Mapping[str, bytes], mode: str | None = "w") -> Path:
    if mode is None:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sentencepiece_model(vocab_size: int = VOCAB_SIZE) -> bytes:
    """A byte-fallback sentencepiece model; ids 1 and 2 begin and end a text."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a model of a model"] * 20),
        model_writer=buffer,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return buffer.getvalue()


def bpe_files(end: str | None = "<|endoftext|>") -> tuple[bytes, bytes]:
    """vocab.json and merges.txt of a byte-level vocabulary without merges."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *([end] if end else [])]
    return json.dumps({token: index for index, token in enumerate(tokens)}).encode(), b"#version: 0.2\n"


def nemo_logits(config: Mapping[str, Any], state: State, ids: list[int]) -> torch.Tensor:
    """Logits [S, V] in float64, computed from one rank's state dict the way NeMo's modules do it."""
    w = {name.removeprefix(_PREFIX): value.double() for name, value in state.items()}
    heads, epsilon = config["num_attention_heads"], float(config["layernorm_epsilon"])
    size = config["hidden_size"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config["normalization"] == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * w[name + ".weight"]
        weight = w[name + ".weight"] + (1.0 if config["normalization"] == "layernorm1p" else 0.0)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, w[name + ".bias"], epsilon)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        mixed = linear(x, name + ".query_key_value")
        if config.get("megatron_legacy"):
            mixed = mixed.view(len(ids), 3, heads, size).transpose(1, 2)
        q, k, v = mixed.reshape(len(ids), heads, 3 * size).transpose(0, 1).chunk(3, -1)  # [H, S, D]
        if config["position_embedding_type"] == "rope":
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(1, 2)
        if config.get("normalize_attention_scores", True):
            scores = scores / size**0.5
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        return linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1), name + ".dense")

    def rotate(x: torch.Tensor) -> torch.Tensor:
        dim = int(size * config.get("rotary_percentage", 1.0))
        frequencies = config.get("rotary_base", 10000.0) ** -(torch.arange(0, dim, 2).double() / dim)
        positions = torch.arange(len(ids)).double() / (config.get("seq_len_interpolation_factor") or 1.0)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        turned, rest = x[..., :dim], x[..., dim:]
        half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], -1)
        return torch.cat([turned * angles.cos() + half * angles.sin(), rest], -1)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        inner = linear(x, name + ".dense_h_to_4h")
        kind = config["activation"].removeprefix("fast-")
        if config["activation"].startswith("fast-"):
            inner, gate = inner.chunk(2, -1)
        elif kind.endswith("glu"):
            gate = linear(x, name + ".dense_h_to_4h_2")
        fused = config.get("bias_activation_fusion", True) and config["bias"]
        gelu = "tanh" if fused or config.get("openai_gelu") else "none"
        if kind in ("gelu", "geglu"):
            inner = torch.nn.functional.gelu(inner, approximate=gelu)
        elif kind == "swiglu":
            inner = torch.nn.functional.silu(inner)
        else:
            inner = inner.relu().square() if kind == "squared-relu" else inner.relu()
        return linear(inner * gate if kind.endswith("glu") else inner, name + ".dense_4h_to_h")

    x = w["embedding.word_embeddings.weight"][ids]
    if config["position_embedding_type"] == "learned_absolute":
        x = x + w["embedding.position_embeddings.weight"][: len(ids)]
    for layer in range(config["num_layers"]):
        prefix = f"encoder.layers.{layer}."
        x = x + attention(norm(x, prefix + "input_layernorm"), prefix + "self_attention")
        x = x + mlp(norm(x, prefix + "post_attention_layernorm"), prefix + "mlp")
    head = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])
    return norm(x, "encoder.final_layernorm") @ head.t()
