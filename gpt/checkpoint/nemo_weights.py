"""How the tensors of NeMo's training ranks become those of the layout: names, cuts, orders.

Megatron keeps a linear weight as [out, in].  Column-parallel weights (fused projection, first MLP matrix) are cut along
out, row-parallel ones along in, embedding and head along the vocabulary; everything else is the same on every rank of a
pipeline stage.  Stage p of P holds layers p * L/P and following, counted from 0 again.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

from gpt.checkpoint.joined import PlusOne, Stacked, joined_inputs, joined_outputs
from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.nemo_ranks import HEAD, POSITIONS, TOKENS, Weights
from gpt.checkpoint.source import SourceTensor, equal_values
from gpt.config import ModelConfig
from gpt.console import verbose
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import CheckpointError, Problems

if TYPE_CHECKING:
    import torch

# Frequencies and kernel states that are computed again, tables that another kind of position needs, and the copy of a
# tied embedding that the last pipeline stage keeps.
_NOT_NEEDED = re.compile(
    r".*\b_extra_state\b.*|(.*\.)?inv_freq|embedding\.position_embeddings\.weight|word_embeddings(_for_head)?\.weight"
    r"|output_layer\.weight"
)


class _Cut(Enum):
    """What a training rank holds of a tensor."""

    WHOLE = "all of it"
    VOCABULARY = "rows of a table"
    QKV = "heads of the fused projection"
    COLUMN = "outputs"
    ROW = "inputs"


_GLOBAL = {
    "model.wpe": (POSITIONS, _Cut.WHOLE),
    "model.wte": (TOKENS, _Cut.VOCABULARY),
    "model.final_layernorm.weight": ("encoder.final_layernorm.weight", _Cut.WHOLE),
    "model.final_layernorm.bias": ("encoder.final_layernorm.bias", _Cut.WHOLE),
    "model.lm_head.weight": (HEAD, _Cut.VOCABULARY),
}
_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight", _Cut.WHOLE),
    "input_layernorm.bias": ("input_layernorm.bias", _Cut.WHOLE),
    "attention.query_key_value.weight": ("self_attention.query_key_value.weight", _Cut.QKV),
    "attention.query_key_value.bias": ("self_attention.query_key_value.bias", _Cut.QKV),
    "attention.dense.weight": ("self_attention.dense.weight", _Cut.ROW),
    "attention.dense.bias": ("self_attention.dense.bias", _Cut.WHOLE),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight", _Cut.WHOLE),
    "post_attention_layernorm.bias": ("post_attention_layernorm.bias", _Cut.WHOLE),
    "mlp.dense_h_to_4h.weight": ("mlp.dense_h_to_4h.weight", _Cut.COLUMN),
    "mlp.dense_h_to_4h.bias": ("mlp.dense_h_to_4h.bias", _Cut.COLUMN),
    "mlp.dense_h_to_4h.gate.weight": ("mlp.dense_h_to_4h_2.weight", _Cut.COLUMN),
    "mlp.dense_h_to_4h.gate.bias": ("mlp.dense_h_to_4h_2.bias", _Cut.COLUMN),
    "mlp.dense_4h_to_h.weight": ("mlp.dense_4h_to_h.weight", _Cut.ROW),
    "mlp.dense_4h_to_h.bias": ("mlp.dense_4h_to_h.bias", _Cut.WHOLE),
}


def match_tensors(model: ModelConfig, weights: Weights) -> list[tuple[Tensor, SourceTensor]]:
    """Pairs every tensor of the layout with its source, made of the parts of all ranks.

    Raises CheckpointError listing every missing, misshapen or unknown tensor of every rank.
    """
    merge = _Merge(model, weights)
    pairs = [(tensor, source) for tensor in tensors(model) if (source := merge.source(tensor)) is not None]
    merge.report_unknown()
    merge.report_other_head()
    merge.problems.raise_if_any(
        CheckpointError, "the weights do not fit model_config.yaml", hint="use both from the same model"
    )
    return pairs


class _Merge:
    """One pass over the layout's tensors, with what went wrong and which source tensors were used."""

    def __init__(self, model: ModelConfig, weights: Weights):
        self.model = model
        self.training = weights.training
        self.ranks = weights.ranks
        self.problems = Problems()
        self.used: list[set[str]] = [set() for _ in weights.ranks]

    def source(self, tensor: Tensor) -> SourceTensor | None:
        """The merged source of `tensor`; None where parts are missing or wrong, which is then a problem."""
        stage, name, cut = self._place(tensor)
        second = ".gate." in tensor.name
        fused = cut is _Cut.COLUMN and self.model.activation.gated and self.training.fused_gate
        if fused:
            name = name.replace("dense_h_to_4h_2", "dense_h_to_4h")
        self.used[stage].add(name)
        shape = self._part_shape(tensor, cut, 2 if fused else 1)
        parts = [self._part(stage, rank, name, shape) for rank in range(self.training.tensor_parallel)]
        if cut is _Cut.WHOLE:
            del parts[1:]
        good = [part for part in parts if part is not None]
        if len(good) < len(parts):
            return None
        if len({part.dtype for part in good}) > 1:
            self.problems.add(f"{name}: the ranks' dtypes differ: {', '.join(part.dtype for part in good)}")
            return None
        if cut is _Cut.WHOLE:
            return PlusOne(good[0]) if self.training.one_plus and tensor.kind == "scale" else good[0]
        if cut is _Cut.VOCABULARY:
            return Stacked(good)
        if cut is _Cut.ROW:
            return joined_inputs(tensor.shape, good)
        rows = shape[0] // 2 if fused else shape[0]
        first = rows if fused and second else 0
        columns = self._qkv_columns() if cut is _Cut.QKV else None
        return joined_outputs(tensor.shape, good, first, first + rows, columns)

    def report_unknown(self) -> None:
        """Adds every tensor of every stage that was neither used nor is known as not needed."""
        for stage, ranks in enumerate(self.ranks):
            for name in dict.fromkeys(name for rank in ranks for name in rank):
                if name in self.used[stage]:
                    continue
                if _NOT_NEEDED.fullmatch(name):
                    verbose(f"{name} is not needed")
                else:
                    self.problems.add(f"{self._label(stage)}{name}: unknown")

    def report_other_head(self) -> None:
        """Adds a head that is there although the yaml says that it is the embedding, and is not."""
        pairs = zip(self.ranks[0], self.ranks[-1], strict=True)
        tables = [(last[HEAD], first[TOKENS]) for first, last in pairs if HEAD in last and TOKENS in first]
        if self.model.tied_head and not all(equal_values(*pair) for pair in tables):
            self.problems.add(f"{HEAD}: not the embedding, which share_embeddings_and_output_weights says it is")

    def _place(self, tensor: Tensor) -> tuple[int, str, _Cut]:
        """Pipeline stage, source name there, and how it is cut."""
        layer, local_name = tensor.place
        if layer is None:
            name, cut = _GLOBAL[local_name]
            return (0 if name.startswith("embedding.") else len(self.ranks) - 1), name, cut
        name, cut = _LAYER[local_name]
        stage, layer = divmod(layer, self.model.n_layer // len(self.ranks))
        return stage, f"encoder.layers.{layer}.{name}", cut

    def _part_shape(self, tensor: Tensor, cut: _Cut, matrices: int) -> tuple[int, ...]:
        """What each rank should hold, [out, in] for linear weights."""
        shape = tensor.shape[::-1] if tensor.kind == "weight" else tensor.shape
        if cut is _Cut.WHOLE:
            return shape
        ranks = self.training.tensor_parallel
        if cut is _Cut.ROW:
            return (shape[0], shape[1] // ranks)
        return (matrices * shape[0] // ranks, *shape[1:])

    def _part(self, stage: int, rank: int, name: str, shape: tuple[int, ...]) -> SourceTensor | None:
        part = self.ranks[stage][rank].get(name)
        if part is None:
            problem = "missing"
        elif part.shape != shape:
            problem = f"found {list(part.shape)}, expected {list(shape)}"
        elif part.dtype not in FLOAT_DTYPES:
            problem = f"found {part.dtype}, allowed: {', '.join(FLOAT_DTYPES)}"
        else:
            return part
        problem = f"{self._label(stage, rank)}{name}: {problem}"
        if problem not in self.problems.items:  # a fused matrix is asked for twice
            self.problems.add(problem)
        return None

    def _label(self, stage: int, rank: int | None = None) -> str:
        words = [f"tp rank {rank}"] if rank is not None and self.training.tensor_parallel > 1 else []
        words += [f"pp rank {stage}"] if len(self.ranks) > 1 else []
        return " ".join(words) + ": " if words else ""

    def _qkv_columns(self) -> torch.Tensor:
        """For each row of the ranks' parts below one another, its column in [all of Q, all of K, all of V]."""
        import torch

        groups, size = self.model.n_kv_head, self.model.head_size
        rows = torch.arange(self.model.qkv_size)
        if self.training.legacy_qkv:  # [R, 3, H/R, D]
            order = rows.view(self.training.tensor_parallel, 3, -1, size).transpose(0, 1).flatten()
        else:  # [G, H/G + 2, D]
            parts = rows.view(groups, -1, size).split([self.model.n_head // groups, 1, 1], dim=1)
            order = torch.cat([part.flatten() for part in parts])
        return order.argsort()
