"""What goes into and comes out of the TensorRT network: one table for the network, its profiles and the session.

The network is one for both phases; a phase is an optimization profile of it.  Letters: B sequences, S slots per
sequence in this step (1 when generating), N packed tokens of this step, P rows of the prompt table, T slots of the
cache, G key/value heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass

from gpt.config import BuildConfig, ModelConfig
from gpt.mapping import Mapping

CONTEXT = 0  # the first optimization profile; those after it are for generation


@dataclass(frozen=True)
class Port:
    """A network input or output; a dimension is a size, or the letter of one that changes from step to step."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    alias: str | None = None  # an output that lives in the memory of this input

    def shape_for(self, sizes: Dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    @property
    def network_shape(self) -> tuple[int, ...]:
        """-1 for every dimension that changes, as TensorRT writes it."""
        return tuple(-1 if isinstance(size, str) else size for size in self.shape)


def step_inputs(model: ModelConfig, build: BuildConfig) -> list[Port]:
    """The inputs that change from step to step: those below, all int32, and `prompt_inputs`.

    last_token_ids: where each sequence ends, an index into S, or into N when packed.  cache_write_index: the slot of
    each sequence's first token of this step.  padded_from_packed: for every slot of the padded form the packed token it
    shows (padding shows some token of its own sequence).  packed_from_padded: for every packed token its place b * S +
    s.
    """
    tokens = ("N",) if build.remove_input_padding else ("B", "S")
    ports = [
        Port("input_ids", "int32", tokens),
        Port("position_ids", "int32", tokens),
        Port("last_token_ids", "int32", ("B",)),
        Port("cache_write_index", "int32", ("B",)),
    ]
    if build.remove_input_padding:
        ports += [Port("padded_from_packed", "int32", ("B", "S")), Port("packed_from_padded", "int32", ("N",))]
    return ports + prompt_inputs(model, build)


def prompt_inputs(model: ModelConfig, build: BuildConfig) -> list[Port]:
    """What engines for prompt tuning take besides, none without it.

    prompt_embedding_table: the virtual tokens of all tasks, one task after the other, in the engine's dtype.
    prompt_vocab_size: virtual tokens per task.  tasks: of each sequence, or of each token when packed.
    """
    if build.max_prompt_embedding_table_size == 0:
        return []
    return [
        Port("prompt_embedding_table", build.dtype, ("P", model.n_embd)),
        Port("tasks", "int32", ("N",) if build.remove_input_padding else ("B", 1)),
        Port("prompt_vocab_size", "int32", (1,)),
    ]


def cache_inputs(model: ModelConfig, build: BuildConfig, mapping: Mapping) -> list[Port]:
    """past_key_<l> and past_value_<l> [B, G/R, T, D], in the order of the layers; int8 where the cache is
    quantised."""
    shape = ("B", mapping.local_kv_heads(model), build.max_seq_len, model.head_size)
    return [
        Port(f"past_{kind}_{layer}", build.quant.kv_cache or build.dtype, shape)
        for layer in range(model.n_layer)
        for kind in ("key", "value")
    ]


def outputs(model: ModelConfig, build: BuildConfig, mapping: Mapping) -> list[Port]:
    """logits [B, V padded] float32 and present_<kind>_<l>, each in the memory of its past_<kind>_<l> where the library
    says so: its own update does, which takes no quantised cache."""
    logits = Port("logits", "float32", ("B", model.padded_vocab_size(mapping.world_size)))
    caches = cache_inputs(model, build, mapping)
    said = build.quant.kv_cache is None and "attention" not in build.plugins
    presents = [Port(present_name(p.name), p.dtype, p.shape, alias=p.name if said else None) for p in caches]
    return [logits, *presents]


def present_name(past_name: str) -> str:
    return past_name.replace("past", "present")


def num_profiles(build: BuildConfig) -> int:
    """One for the context phase, and one for generation, or one for each size of `generation_batches`."""
    return 1 + len(build.generation_batches)


def profile_name(build: BuildConfig, profile: int) -> str:
    if profile == CONTEXT:
        return "context"
    return f"generation of {build.generation_batches[profile - 1]}" if build.batch_buckets else "generation"


def generation_profile(build: BuildConfig, batch_size: int) -> tuple[int, int]:
    """The profile that generates for `batch_size` sequences, and the rows of its steps: with buckets, as many as the
    smallest one that holds them."""
    fitting = [(1 + i, size) for i, size in enumerate(build.generation_batches) if size >= batch_size]
    profile, size = fitting[0]
    return profile, size if build.batch_buckets else batch_size


def profile_sizes(build: BuildConfig, profile: int) -> list[dict[str, int]]:
    """The letters' values in a profile: smallest, the one to optimise for, largest."""
    if profile != CONTEXT and build.batch_buckets:
        batch, rows = build.generation_batches[profile - 1], build.max_prompt_embedding_table_size
        fixed = {"B": batch, "S": 1, "N": batch}
        return [fixed | {"P": 1}, fixed | {"P": 1}, fixed | {"P": max(rows, 1)}]
    batch, tokens = build.max_batch_size, build.max_input_len
    if profile != CONTEXT:
        batch, tokens = build.generation_batches[-1], 1  # a prompt is computed once for all its beams
    rows = build.max_prompt_embedding_table_size
    middle_batch, middle_tokens = (batch + 1) // 2, (tokens + 1) // 2
    return [
        {"B": 1, "S": 1, "N": 1, "P": 1},
        {"B": middle_batch, "S": middle_tokens, "N": middle_batch * middle_tokens, "P": (rows + 1) // 2},
        {"B": batch, "S": tokens, "N": batch * tokens, "P": rows},
    ]


def profile_shapes(
    model: ModelConfig, build: BuildConfig, mapping: Mapping, profile: int
) -> dict[str, list[tuple[int, ...]]]:
    """Per network input its smallest, optimal and largest shape in `profile`."""
    sizes = profile_sizes(build, profile)
    ports = step_inputs(model, build) + cache_inputs(model, build, mapping)
    return {port.name: [port.shape_for(values) for values in sizes] for port in ports}
