"""The weights of a NeMo model: names, the ranks they are spread over, how the parts become a tensor of the layout.

Megatron keeps a linear weight as [out, in].  Column-parallel weights (fused projection, first MLP matrix) are cut along
out, row-parallel ones along in, embedding and head along the vocabulary; everything else is the same on every rank of a
pipeline stage.  Stage p of P holds layers p * L/P and following, counted from 0 again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.checkpoint.joined import PlusOne, Stacked, joined_inputs, joined_outputs
from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.nemo import NemoConfig, Training
from gpt.checkpoint.nemo_archive import WEIGHTS_NAME, weights_file
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.torch_file import is_named_tensor, load_torch_file, locate_tensors
from gpt.config import ModelConfig
from gpt.console import verbose
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import CheckpointError, Problems

if TYPE_CHECKING:
    import torch

Rank = dict[str, SourceTensor]
_RANK_FOLDER = re.compile(r"mp_rank_\d{2,}|tp_rank_\d{2,}_pp_rank_\d{3,}")
_PREFIX = re.compile(r"(model\.)?(module\.)?(language_model\.)?")
# Later models are made of Megatron Core's modules; the weights are the same.
_CORE_NAMES = {
    "decoder.": "encoder.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".post_attention_layernorm.",
    ".pre_mlp_layernorm.": ".post_attention_layernorm.",
    ".linear_qkv.": ".query_key_value.",
    ".linear_proj.": ".dense.",
    ".linear_fc1.": ".dense_h_to_4h.",
    ".linear_fc2.": ".dense_4h_to_h.",
}
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
    "model.wpe": ("embedding.position_embeddings.weight", _Cut.WHOLE),
    "model.wte": ("embedding.word_embeddings.weight", _Cut.VOCABULARY),
    "model.final_layernorm.weight": ("encoder.final_layernorm.weight", _Cut.WHOLE),
    "model.final_layernorm.bias": ("encoder.final_layernorm.bias", _Cut.WHOLE),
    "model.lm_head.weight": ("output_layer.weight", _Cut.VOCABULARY),
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


@dataclass(frozen=True)
class Weights:
    """Every rank's tensors by name, `ranks[stage][tensor-parallel rank]`, without the prefixes of NeMo's wrappers."""

    training: Training
    ranks: Sequence[Sequence[Rank]]

    @property
    def vocab_size(self) -> int:
        """Rows of the merged embedding.  Raises CheckpointError where the first stage has none."""
        return sum(self._table("model.wte", rank).shape[0] for rank in self.ranks[0])

    @property
    def n_positions(self) -> int:
        """Rows of the table of learned positions.  Raises CheckpointError where there is none."""
        return self._table("model.wpe", self.ranks[0][0]).shape[0]

    @property
    def tied_head(self) -> bool:
        """As the yaml says; where it says nothing, whether the last stage has no head."""
        if self.training.head is not None:
            return not self.training.head
        return _GLOBAL["model.lm_head.weight"][0] not in self.ranks[-1][0]

    def _table(self, target: str, rank: Rank) -> SourceTensor:
        name = _GLOBAL[target][0]
        if name not in rank or len(rank[name].shape) != 2:
            shown = [f"{key} {list(rank[key].shape)}" for key in sorted(rank)[:6]]
            raise CheckpointError(f"no table {name} in the weights", found=shown or "no tensors", allowed="two axes")
        return rank[name]


def open_weights(folder: Path, training: Training) -> Weights:
    """Opens the files of all ranks below `folder`, the one with model_config.yaml.

    Raises CheckpointError for ranks that are missing or too many, and for files that cannot be read or hold code.
    """
    _refuse_distributed(folder)
    sizes = training.pipeline_parallel, training.tensor_parallel
    found: dict[tuple[int, int], Path] = {}
    problems = Problems()
    for stage in range(sizes[0]):
        for rank in range(sizes[1]):
            names = _rank_folders(training, stage, rank)
            path = next((path for name in names if (path := weights_file(folder / name))), None)
            if path is None:
                problems.add(f"{Path(names[0], WEIGHTS_NAME)}: missing")
            else:
                found[stage, rank] = path
    expected = {name for s in range(sizes[0]) for r in range(sizes[1]) for name in _rank_folders(training, s, r)}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _RANK_FOLDER.fullmatch(path.name) and path.name not in expected:
            problems.add(f"{path.name}: a rank that model_config.yaml does not know")
    problems.raise_if_any(
        CheckpointError,
        f"the files do not fit tensor_model_parallel_size {sizes[1]}, pipeline_model_parallel_size {sizes[0]}",
        hint="take all ranks' files and the model_config.yaml from the same model",
    )
    return Weights(
        training,
        [[_read_rank(found[stage, rank]) for rank in range(sizes[1])] for stage in range(sizes[0])],
    )


def model_config(config: NemoConfig, weights: Weights, **token_ids: int | None) -> ModelConfig:
    """What the yaml and the sizes of the tables say together.  Raises CheckpointError where that is not valid."""
    fields = dict(token_ids) if "n_positions" in config.fields else {**token_ids, "n_positions": weights.n_positions}
    return config.model(vocab_size=weights.vocab_size, tied_head=weights.tied_head, **fields)


def match_tensors(model: ModelConfig, weights: Weights) -> list[tuple[Tensor, SourceTensor]]:
    """Pairs every tensor of the layout with its source, made of the parts of all ranks.

    Raises CheckpointError listing every missing, misshapen or unknown tensor of every rank.
    """
    merge = _Merge(model, weights)
    pairs = [(tensor, source) for tensor in tensors(model) if (source := merge.source(tensor)) is not None]
    merge.report_unknown()
    merge.problems.raise_if_any(
        CheckpointError, "the weights do not fit model_config.yaml", hint="use both from the same model"
    )
    return pairs


def _rank_folders(training: Training, stage: int, rank: int) -> list[str]:
    names = [] if training.tensor_parallel * training.pipeline_parallel > 1 else ["."]
    if training.pipeline_parallel == 1:
        names.append(f"mp_rank_{rank:02d}")
    return [*names, f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"]


def _read_rank(path: Path) -> Rank:
    content = load_torch_file(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise CheckpointError(f"no dictionary of tensors: {path}", found=type(state).__name__, allowed="a state dict")
    named = {name: value for name, value in state.items() if is_named_tensor(name, value)}
    result: Rank = {}
    for name, tensor in locate_tensors(path, named).items():
        short = name[len(_PREFIX.match(name)[0]) :]  # type: ignore[index]  # it matches an empty string too
        for core, ours in _CORE_NAMES.items():
            short = short.replace(core, ours, 1)
        result[short] = tensor
    return result


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

    def _place(self, tensor: Tensor) -> tuple[int, str, _Cut]:
        """Pipeline stage, source name there, and how it is cut."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", tensor.name)
        if not match:
            name, cut = _GLOBAL[tensor.name]
            return (0 if name.startswith("embedding.") else len(self.ranks) - 1), name, cut
        name, cut = _LAYER[match[2]]
        stage, layer = divmod(int(match[1]), self.model.n_layer // len(self.ranks))
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


def _refuse_distributed(folder: Path) -> None:
    """Raises CheckpointError for a folder of shards in place of the ranks' files."""
    shards = folder / "model_weights"
    if not shards.is_dir():
        return
    raise CheckpointError(
        "a distributed checkpoint",
        found="model_weights/ with "
        + ("torch_dist shards" if (shards / ".metadata").is_file() or any(shards.glob("*.distcp")) else "zarr arrays"),
        allowed=f"{WEIGHTS_NAME}, whole or one for each rank",
    )
