"""THE table: every tensor of an FT checkpoint, its shape, its split rule and its files.

The format is FasterTransformer's (`model.*.bin`, raw little-endian arrays in C order), as TensorRT-LLM's GPT example
extended it with gated MLPs, multi-query attention and untied heads.  Converters, reader, validator, random weights and
executors all go through `tensors()`; nothing else in the package knows a file name or a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpt.config import ModelConfig
from gpt.mapping import Mapping, Split


@dataclass(frozen=True)
class Tensor:
    """One tensor of one model: name without `.bin`, whole shape (linear weights [in, out]), split rule, kind."""

    name: str
    shape: tuple[int, ...]
    split: Split
    kind: str  # "weight", "bias", "scale" (a layernorm's weight) or "embedding": what random weights look like

    def file_name(self, rank: int) -> str:
        """`model.layers.0.mlp.dense_h_to_4h.weight.1.bin`; whole tensors have no rank in the name, one file."""
        return f"{self.name}.bin" if self.split is Split.NONE else f"{self.name}.{rank}.bin"

    def file_shape(self, mapping: Mapping, model: ModelConfig) -> tuple[int, ...]:
        """The shape behind `file_name(mapping.rank)`.  FT writes MHA projections as [E, 3, E/R]; the bytes are the same
        as the [E, 3E/R] used here."""
        return mapping.local_shape(self.split, self.shape, model)


@dataclass(frozen=True)
class _Row:
    name: str
    shape: str  # letters of gpt.config; P positions, Q the fused projection (H+2G)*D, A = H*D
    split: Split
    kind: str
    when: Callable[[ModelConfig], bool] = lambda model: True


def _has_bias(model: ModelConfig) -> bool:
    return model.bias


def _centred(model: ModelConfig) -> bool:
    return model.normalization == "layernorm"


def _gated(model: ModelConfig) -> bool:
    return model.activation.gated


_GLOBAL = (
    _Row("model.wpe", "P E", Split.NONE, "embedding", lambda model: model.learned_positions),
    _Row("model.wte", "V E", Split.NONE, "embedding"),
    _Row("model.final_layernorm.weight", "E", Split.NONE, "scale"),
    _Row("model.final_layernorm.bias", "E", Split.NONE, "bias", _centred),
    _Row("model.lm_head.weight", "V E", Split.NONE, "embedding", lambda model: not model.tied_head),
)

_LAYER = (
    _Row("input_layernorm.weight", "E", Split.NONE, "scale"),
    _Row("input_layernorm.bias", "E", Split.NONE, "bias", _centred),
    _Row("attention.query_key_value.weight", "E Q", Split.QKV, "weight"),
    _Row("attention.query_key_value.bias", "Q", Split.QKV, "bias", _has_bias),
    _Row("attention.dense.weight", "A E", Split.ROW, "weight"),
    _Row("attention.dense.bias", "E", Split.NONE, "bias", _has_bias),
    _Row("post_attention_layernorm.weight", "E", Split.NONE, "scale"),
    _Row("post_attention_layernorm.bias", "E", Split.NONE, "bias", _centred),
    _Row("mlp.dense_h_to_4h.weight", "E F", Split.COLUMN, "weight"),
    _Row("mlp.dense_h_to_4h.bias", "F", Split.COLUMN, "bias", _has_bias),
    _Row("mlp.dense_h_to_4h.gate.weight", "E F", Split.COLUMN, "weight", _gated),
    _Row("mlp.dense_h_to_4h.gate.bias", "F", Split.COLUMN, "bias", lambda model: _gated(model) and model.bias),
    _Row("mlp.dense_4h_to_h.weight", "F E", Split.ROW, "weight"),
    _Row("mlp.dense_4h_to_h.bias", "E", Split.NONE, "bias", _has_bias),
)


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of `model`: the global ones, then layer by layer."""
    sizes = {
        "P": model.n_positions,
        "E": model.n_embd,
        "V": model.vocab_size,
        "Q": model.qkv_size,
        "A": model.n_head * model.head_size,
        "F": model.inter_size,
    }

    def expand(row: _Row, prefix: str) -> Tensor:
        return Tensor(prefix + row.name, tuple(sizes[letter] for letter in row.shape.split()), row.split, row.kind)

    for row in _GLOBAL:
        if row.when(model):
            yield expand(row, "")
    for layer in range(model.n_layer):
        for row in _LAYER:
            if row.when(model):
                yield expand(row, f"model.layers.{layer}.")
