"""The models and shapes of bench_gpu.py, and what each of them must at least move and compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt.config import BuildConfig, ModelConfig
from gpt.engine.weights import engine_layout
from gpt.mapping import Mapping


@dataclass(frozen=True)
class Case:
    """A published model's shape, to be filled with random weights; the batch sizes it is measured at."""

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    n_positions: int
    batch_sizes: tuple[int, ...]
    multi_query: bool = False


# From the models' own config.json.  The order is that of measuring.
CASES = {
    case.name: case
    for case in (
        Case("gpt2-medium", 24, 1024, 16, 50257, 1024, (1, 8, 64)),
        Case("gpt2-xl", 48, 1600, 25, 50257, 1024, (1, 8, 64)),
        Case("gpt2", 12, 768, 12, 50257, 1024, (1,)),
        Case("santacoder", 24, 2048, 16, 49280, 2048, (1, 64), multi_query=True),
        Case("starcoder", 40, 6144, 48, 49152, 8192, (1, 16), multi_query=True),
        Case("tiny", 2, 64, 4, 301, 64, (1, 3)),
        Case("tiny-mq", 2, 64, 4, 301, 64, (1, 3), multi_query=True),
    )
}
PUBLISHED = tuple(name for name in CASES if not name.startswith("tiny"))


@dataclass(frozen=True)
class Shape:
    """A batch of prompts of one length, and how many tokens follow each."""

    batch_size: int
    input_len: int
    output_len: int

    @property
    def num_slots(self) -> int:
        """Cache slots per sequence."""
        return self.input_len + self.output_len

    def __str__(self) -> str:
        return f"{self.batch_size} x ({self.input_len} + {self.output_len})"


def build_flags(case: Case, dtype: str, seed: int, shapes: list[Shape]) -> list[str]:
    """Arguments of build.py for an engine that takes all of `shapes`.  Where a shape is longer than the model's
    positions, the table of positions grows: a step reads a row of it per sequence, so its length costs no time."""
    longest = max(shape.num_slots for shape in shapes)
    sizes = {
        "n_layer": case.n_layer,
        "n_embd": case.n_embd,
        "n_head": case.n_head,
        "vocab_size": case.vocab_size,
        "n_positions": max(case.n_positions, longest),
        "hidden_act": "gelu_pytorch_tanh" if case.multi_query else "gelu_new",
        "dtype": dtype,
        "random_seed": seed,
        **limits(shapes),
    }
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return [*flags, "--use_gpt_attention_plugin", *(["--multi_query_mode"] if case.multi_query else [])]


def limits(shapes: list[Shape]) -> dict[str, int]:
    """The limits of an engine, by the names of build.py's flags."""
    return {
        "max_batch_size": max(shape.batch_size for shape in shapes),
        "max_input_len": max(shape.input_len for shape in shapes),
        "max_output_len": max(shape.output_len for shape in shapes),
    }


def step_bytes(model: ModelConfig, build: BuildConfig, shape: Shape) -> int:
    """What one generation step cannot avoid reading, on average over the steps of `shape`: every weight once but the
    rows of the embeddings that no token asks for, and the filled slots of the cache.

    Step i of the N - 1 steps behind the prompt's reads input_len + i slots: input_len + N / 2 on average.
    """
    tables = {"model.wpe"} if model.tied_head else {"model.wpe", "model.wte"}
    weights = engine_layout(model, Mapping(), build.dtype, build.quant)
    num_bytes = sum(tensor.num_bytes for tensor in weights if tensor.name not in tables)
    slots = shape.input_len + shape.output_len // 2
    return num_bytes + build.kv_cache_bytes(model, shape.batch_size, slots)


def prefill_flops(model: ModelConfig, shape: Shape) -> int:
    """Multiplications and additions, two per pair, that the prompts' step cannot avoid: the linear layers on every
    token, the head on the last one of each sequence, and the lower triangle of Q K^T and P V."""
    linear = sum(math.prod(t.shape) for t in engine_layout(model, Mapping()) if t.source.kind == "weight")
    num_tokens = shape.batch_size * shape.input_len
    head = shape.batch_size * model.vocab_size * model.n_embd
    pairs = shape.batch_size * shape.input_len * (shape.input_len + 1) // 2
    return 2 * (linear * num_tokens + head + 2 * pairs * model.n_embd * model.n_layer)
