"""THE table: every tensor of an FT checkpoint, its shape, its split rule and its files.

The format is FasterTransformer's (`model.*.bin`, raw little-endian arrays in C order), as TensorRT-LLM's GPT example
extended it with gated MLPs, multi-query attention, untied heads, and the INT8 weights and scales of SmoothQuant and of
an INT8 cache.  Converters, reader, validator, random weights and executors all go through `tensors()` and
`quant_tensors()`; nothing else in the package knows a file name or a shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from gpt.config import ModelConfig
from gpt.mapping import Mapping, Split

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Tensor:
    """One tensor of one model: name without `.bin`, whole shape (linear weights [in, out]), split rule, kind.

    kind: "weight", "bias", "scale" (a layernorm's weight), "embedding"; "int8" (a quantised weight), "factor" (what a
    quantisation multiplies or divides by).  dtype: None where it is the checkpoint's storage dtype.  sliced: the file
    holds all of it, and a rank takes its part by `split` when it reads.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    kind: str
    dtype: str | None = None
    sliced: bool = False

    @property
    def place(self) -> tuple[int | None, str]:
        """Its layer and its name there, `3, "mlp.dense_4h_to_h.weight"`; None and the whole name outside the layers."""
        match = _IN_LAYER.fullmatch(self.name)
        return (int(match[1]), match[2]) if match else (None, self.name)

    @property
    def file_split(self) -> Split:
        """How the files divide it."""
        return Split.NONE if self.sliced else self.split

    def file_name(self, rank: int) -> str:
        """`model.layers.0.mlp.dense_h_to_4h.weight.1.bin`; whole tensors have no rank in the name, one file."""
        return f"{self.name}.bin" if self.file_split is Split.NONE else f"{self.name}.{rank}.bin"

    def file_shape(self, mapping: Mapping, model: ModelConfig) -> tuple[int, ...]:
        """The shape behind `file_name(mapping.rank)`.  FT writes MHA projections as [E, 3, E/R]; the bytes are the same
        as the [E, 3E/R] used here."""
        return mapping.local_shape(self.file_split, self.shape, model)

    def local_shape(self, mapping: Mapping, model: ModelConfig) -> tuple[int, ...]:
        """The shape of the rank's part: `file_shape`, but for a sliced tensor."""
        return mapping.local_shape(self.split, self.shape, model)


@dataclass(frozen=True)
class QuantFiles:
    """Which tensors a checkpoint has beside its float weights.

    smoothquant: INT8 weights and scales of every linear layer.  kv_shared, kv_separate: scales of an INT8 cache, one
    for K and V together (the original's), one for each.  smoothers: factors of the inputs of dense and proj.
    """

    smoothquant: bool = False
    kv_shared: bool = False
    kv_separate: bool = False
    smoothers: bool = False

    def __bool__(self) -> bool:
        return self != QuantFiles()

    @property
    def kv_scales(self) -> bool:
        """Scales of an INT8 cache, in either form; see `Checkpoint.read_kv_scales`."""
        return self.kv_shared or self.kv_separate


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

QKV, DENSE = "attention.query_key_value", "attention.dense"
FC, GATE, PROJ = "mlp.dense_h_to_4h", "mlp.dense_h_to_4h.gate", "mlp.dense_4h_to_h"


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "P": model.n_positions,
        "E": model.n_embd,
        "V": model.vocab_size,
        "Q": model.qkv_size,
        "A": model.n_head * model.head_size,
        "F": model.inter_size,
    }


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every float tensor of `model`: the global ones, then layer by layer."""
    sizes = _sizes(model)

    def expand(row: _Row, prefix: str) -> Tensor:
        return Tensor(prefix + row.name, tuple(sizes[letter] for letter in row.shape.split()), row.split, row.kind)

    for row in _GLOBAL:
        if row.when(model):
            yield expand(row, "")
    for layer in range(model.n_layer):
        for row in _LAYER:
            if row.when(model):
                yield expand(row, f"model.layers.{layer}.")


def gemms(model: ModelConfig) -> tuple[str, ...]:
    """The linear layers of a layer, which SmoothQuant runs in INT8, in the order in which they run; a gated MLP has a
    fifth."""
    return tuple(row.name.removesuffix(".weight") for row in _linear_rows(model))


def _linear_rows(model: ModelConfig) -> list[_Row]:
    return [row for row in _LAYER if row.kind == "weight" and row.when(model)]


def quant_tensors(model: ModelConfig, files: QuantFiles) -> Iterator[Tensor]:
    """What `files` says that there is beside `tensors(model)`, layer by layer."""
    sizes = _sizes(model)
    for layer in range(model.n_layer):
        for row in _linear_rows(model):
            rows, columns = (sizes[letter] for letter in row.shape.split())
            prefix = f"model.layers.{layer}.{row.name.removesuffix('weight')}"
            yield from _quant_tensors(row.split, prefix, rows, columns, files)


def _quant_tensors(split: Split, prefix: str, rows: int, columns: int, files: QuantFiles) -> Iterator[Tensor]:
    """Of one linear layer [rows, columns], cut by `split`.  Scales of the fused projection are a column vector in
    either form, of three plateaus Q, K, V in the per-tensor one, which is written whole."""

    def factor(name: str, size: int, cut: Split = Split.NONE, sliced: bool = False) -> Tensor:
        return Tensor(prefix + name, (size,), cut, "factor", "float32", sliced)

    fused = split is Split.QKV
    if files.smoothquant:
        for name in ("weight.int8", "weight.int8.col"):
            yield Tensor(prefix + name, (rows, columns), split, "int8", "int8")
        yield factor("scale_x_orig_quant", 1)
    if files.smoothquant or (fused and files.kv_shared):
        yield factor("scale_y_quant_orig", 1)
    if files.smoothquant:
        of_columns = Split.NONE if split is Split.ROW else split
        for name in ("scale_w_quant_orig", "scale_y_accum_quant"):
            yield factor(name, columns, Split.QKV, sliced=True) if fused else factor(name, 1)
            yield factor(f"{name}.col", columns, of_columns)
    if files.smoothers and split is Split.ROW:
        yield factor("smoother", rows, Split.COLUMN)
    if fused and files.kv_separate:
        yield factor("scale_kv_quant_orig", 2)


def quant_files(names: Collection[str]) -> QuantFiles:
    """What is there, or should be, told from file names: any file of a kind stands for all of them.

    scale_y_quant_orig of the fused projection belongs to the cache; the others' to SmoothQuant.
    """
    return QuantFiles(
        smoothquant=any(".weight.int8." in name or ".scale_x_orig_quant." in name for name in names),
        kv_shared=any(name.endswith(f".{QKV}.scale_y_quant_orig.bin") for name in names),
        kv_separate=any(name.endswith(".scale_kv_quant_orig.bin") for name in names),
        smoothers=any(".smoother." in name for name in names),
    )


def describe_architecture(model: ModelConfig) -> str:
    """One line: sizes, heads, MLP, positions and what else distinguishes the network."""
    heads = f"{model.n_head} heads of {model.head_size}"
    if model.n_kv_head != model.n_head:
        heads += f" sharing {model.n_kv_head} key/value head{'s' * (model.n_kv_head != 1)}"
    positions = f"{model.n_positions} learned positions"
    if not model.learned_positions:
        positions = (
            f"rotary positions on {model.rotary_dim} of {model.head_size} values, trained to {model.n_positions}"
        )
    parts = [f"{model.n_layer} layers of {model.n_embd}", heads, f"MLP {model.inter_size} {model.hidden_act}"]
    parts += [model.normalization, positions, "biases" if model.bias else "no biases"]
    return ", ".join([*parts, "head tied to the embedding" if model.tied_head else "head of its own"])
