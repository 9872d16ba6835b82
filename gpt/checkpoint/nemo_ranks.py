"""The files of a NeMo model's training ranks, and what the tables in them tell about the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.nemo import NemoConfig, Training
from gpt.checkpoint.nemo_archive import WEIGHTS_NAME, weights_file
from gpt.checkpoint.nemo_distributed import is_distributed, read_distributed
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.torch_file import is_named_tensor, load_torch_file, locate_tensors
from gpt.config import ModelConfig
from gpt.errors import CheckpointError, Problems

Rank = dict[str, SourceTensor]
TOKENS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
HEAD = "output_layer.weight"
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


@dataclass(frozen=True)
class Weights:
    """Every rank's tensors by name, `ranks[stage][tensor-parallel rank]`, without the prefixes of NeMo's wrappers."""

    training: Training
    ranks: Sequence[Sequence[Rank]]

    @property
    def vocab_size(self) -> int:
        """Rows of the merged embedding.  Raises CheckpointError where the first stage has none."""
        return sum(_rows_of(TOKENS, rank) for rank in self.ranks[0])

    @property
    def n_positions(self) -> int:
        """Rows of the table of learned positions.  Raises CheckpointError where there is none."""
        return _rows_of(POSITIONS, self.ranks[0][0])

    @property
    def tied_head(self) -> bool:
        """As the yaml says; where it says nothing, whether the last stage has no head."""
        if self.training.head is not None:
            return not self.training.head
        return HEAD not in self.ranks[-1][0]


def open_weights(folder: Path, training: Training) -> Weights:
    """Opens the files of all ranks below `folder`, the one with model_config.yaml.

    Raises CheckpointError for ranks that are missing or too many, and for files that cannot be read or hold code.
    """
    if is_distributed(folder):
        whole = dataclasses.replace(training, tensor_parallel=1, pipeline_parallel=1)
        return Weights(whole, [[_short_names(read_distributed(folder))]])
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
    return _short_names(locate_tensors(path, named))


def _short_names(tensors: Rank) -> Rank:
    result: Rank = {}
    for name, tensor in tensors.items():
        short = name[len(_PREFIX.match(name)[0]) :]  # type: ignore[index]  # it matches an empty string too
        for core, ours in _CORE_NAMES.items():
            short = short.replace(core, ours, 1)
        result[short] = tensor
    return result


def _rows_of(table: str, rank: Rank) -> int:
    if table in rank and len(rank[table].shape) == 2:
        return rank[table].shape[0]
    shown = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(rank.items())[:6]]
    raise CheckpointError(f"no table {table} in the weights", found=shown or "no tensors", allowed="two axes")
