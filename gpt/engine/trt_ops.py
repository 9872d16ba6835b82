"""The operations of gpt.network.ops as TensorRT layers.

Activations are ITensors [B, S, E], or [N, E] when the input is packed; attention always works on [B, heads, S, D],
because TensorRT-RTX has no packed attention.  Shape letters: gpt.engine.trt_io.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Any

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine import trt_io
from gpt.engine.torch_executor import rotary_tables
from gpt.engine.trt_layers import Layers
from gpt.engine.trt_quantized import QuantizedCache, QuantizedProducts
from gpt.mapping import Mapping, Split

_ACTIVATION_LAYERS = {
    "gelu_erf": "GELU_ERF",
    "gelu_tanh": "GELU_TANH",
    "relu": "RELU",
    "tanh": "TANH",
    "sigmoid": "SIGMOID",
}
_SIGMOID_FACTORS = {"silu": 1.0, "quick_gelu": 1.702}  # x * sigmoid(factor * x)


@dataclass(frozen=True)
class Heads:
    """One layer's projections apart: q [B, H, S, D], k and v [B, G, S, D]."""

    q: Any
    k: Any
    v: Any


class TrtOps:
    """Ops over `layers`; the step is the network's own inputs, the cache its past_* inputs and present_* outputs."""

    def __init__(
        self,
        layers: Layers,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
    ):
        self.layers = layers
        self.model = model
        self.build = build
        self.mapping = mapping
        self.weights = weights
        self.dtype = torch_dtype(build.dtype)
        self.num_heads = mapping.local_heads(model)
        self.num_kv_heads = mapping.local_kv_heads(model)
        self.num_slots = build.max_seq_len
        self.packed = build.remove_input_padding
        self.prompt_tuning = build.max_prompt_embedding_table_size > 0
        self.fused = build.fused_attention
        self.products = QuantizedProducts(layers, weights, self.dtype, build.quant)
        self.cache = QuantizedCache(layers, weights, self.dtype, self.num_slots) if build.quant.kv_cache else None
        ports = trt_io.step_inputs(model, build) + trt_io.cache_inputs(model, build, mapping)
        self.inputs = {port.name: layers.input(port.name, port.dtype, port.network_shape) for port in ports}
        self.positions = self._padded_positions()  # [B, S]
        self.mask = self._causal_mask()  # [B, 1, S, T]
        self._head_sizes = self._qkv_slices()
        self._rotary_tables: tuple[Any, Any] | None = None

    # Prepared once per step, used by every layer.

    def _padded_positions(self) -> Any:
        positions = self.inputs["position_ids"]
        return self.layers.gather(positions, self.inputs["padded_from_packed"], 0) if self.packed else positions

    def _causal_mask(self) -> Any:
        """True where a token may look: at the slots up to its own position.

        Covers context, generation and rows of different lengths alike, and hides the slots that padding wrote.
        """
        slots = torch.arange(self.num_slots, dtype=torch.int32)
        positions = self.layers.shuffle(self.positions, (0, 1, -1, 1))  # [B, 1, S, 1]
        # position > slot - 1 is position >= slot, which has no layer of its own.
        before = self.layers.constant(slots - 1, (1, 1, 1, self.num_slots))
        return self.layers.name(self.layers.elementwise(positions, before, "GREATER"), "attention_mask")

    def _qkv_slices(self) -> list[tuple[int, Any]]:
        """Where Q, K and V start in the last axis of qkv [B, S, (H+2G)*D], and their whole shapes as shape tensors."""
        batch_and_slots = self.layers.shape_of(self.positions)
        result = []
        start = 0
        for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads):
            width = heads * self.model.head_size
            size = [batch_and_slots, self.layers.constant(torch.tensor([width]))]
            result.append((start, self.layers.concatenate(size, 0)))
            start += width
        return result

    # gpt.network.ops.Ops

    def embedding(self, table: str) -> Any:
        words = self.layers.constant(self.weights[table])
        ids = self.inputs["input_ids"]
        return self._words_or_prompts(words, ids) if self.prompt_tuning else self._words(words, ids)

    def _words(self, words: Any, ids: Any) -> Any:
        """words[ids]; of a table that is cut by vocabulary zeros for the tokens of other ranks."""
        layers, rank = self.layers, len(ids.shape)
        if self.mapping.embedding is not Split.ROW:
            return layers.gather(words, ids, 0)
        num_rows = words.shape[0]
        first, zero, last = (
            layers.scalar(n, torch.int32, rank) for n in (self.mapping.rank * num_rows, 0, num_rows - 1)
        )
        own = layers.elementwise(ids, first, "SUB")
        inside = layers.elementwise(layers.elementwise(own, zero, "MAX"), last, "MIN")
        is_own = layers.shuffle(layers.elementwise(own, inside, "EQUAL"), (0,) * rank + (1,))
        nothing = layers.scalar(0, self.dtype, rank + 1)
        return layers.select(is_own, layers.gather(words, inside, 0), nothing)

    def _own_part(self, rows: Any, ids: Any) -> Any:
        """What this rank contributes of prompt embeddings [..., E], which every rank has whole."""
        layers, mapping = self.layers, self.mapping
        if mapping.embedding is Split.ROW and mapping.rank > 0:
            return layers.scalar(0, self.dtype, len(rows.shape))
        if mapping.embedding is Split.COLUMN:
            width = self.model.n_embd // mapping.world_size
            size = layers.concatenate([layers.shape_of(ids), layers.constant(torch.tensor([width]))], 0)
            return layers.slice(rows, (0,) * len(ids.shape) + (mapping.rank * width,), size)
        return rows

    def _words_or_prompts(self, words: Any, ids: Any) -> Any:
        """id < V ? words[id] : prompt_embedding_table[id - V + task * prompt_vocab_size].

        Both tables are read for every token: an id that stands for a row of one of them is moved to some row of the
        other, for the prompts one of the token's own task.
        """
        layers, rank = self.layers, len(ids.shape)
        zero, one, last_word = (layers.scalar(n, torch.int32, rank) for n in (0, 1, self.model.vocab_size - 1))
        word = self._words(words, layers.elementwise(ids, last_word, "MIN"))
        beyond = layers.elementwise(ids, last_word, "SUB")  # of a virtual token, 1 to prompt_vocab_size
        per_task = layers.shuffle(self.inputs["prompt_vocab_size"], (1,) * rank)
        offset = layers.elementwise(layers.elementwise(beyond, one, "MAX"), per_task, "MIN")
        first = layers.elementwise(self.multiply(self.inputs["tasks"], per_task), one, "SUB")
        prompt = layers.gather(self.inputs["prompt_embedding_table"], self.add(first, offset), 0)
        is_virtual = layers.shuffle(layers.elementwise(beyond, zero, "GREATER"), (0,) * rank + (1,))
        return layers.select(is_virtual, self._own_part(prompt, ids), word)

    def position_embedding(self, table: str) -> Any:
        return self.layers.gather(self.layers.constant(self.weights[table]), self.inputs["position_ids"], 0)

    def add(self, a: Any, b: Any) -> Any:
        return self.layers.elementwise(a, b, "SUM")

    def multiply(self, a: Any, b: Any) -> Any:
        return self.layers.elementwise(a, b, "PROD")

    def layer_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        # TensorRT does not say what it sums in: the casts make it float32, which trained models in float16 need.
        wide = self.layers.cast(x, torch.float32)
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return self._hand_over(self.layers.layer_norm(wide, weight, bias, epsilon, name), feeds)

    def rms_norm(self, x: Any, name: str, epsilon: float, feeds: str | None = None) -> Any:
        wide = self.layers.cast(x, torch.float32)
        return self._hand_over(self.layers.rms_norm(wide, self.weights[name + ".weight"], epsilon), feeds)

    def _hand_over(self, y: Any, feeds: str | None) -> Any:
        """Normalised values in the engine's dtype, or as they are for a product that rounds them to integers."""
        return y if self.products.rounds_inputs_of(feeds) else self.layers.cast(y, self.dtype)

    def linear(
        self, x: Any, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> Any:
        quantized = self.products.has(name)
        y = self.products(x, name) if quantized else self._product(x, self.weights[name + ".weight"], name)
        if bias:
            y = self.add_bias(y, name)
        return y if activation is None else self._activation(y, activation)

    def add_bias(self, x: Any, name: str) -> Any:
        bias = self.weights.get(name + ".bias")
        if bias is None:
            return x
        return self.add(x, self.layers.constant(bias, (1,) * (len(x.shape) - 1) + tuple(bias.shape)))

    def _product(self, x: Any, weight: torch.Tensor, name: str) -> Any:
        shape = (1,) * (len(x.shape) - 2) + tuple(weight.shape)
        return self.layers.matmul(x, self.layers.constant(weight, shape), transpose_b=True, name=name)

    def _activation(self, x: Any, function: str) -> Any:
        layers = self.layers
        if function in _ACTIVATION_LAYERS:
            return layers.activation(x, _ACTIVATION_LAYERS[function])
        if function == "squared_relu":
            positive = layers.activation(x, "RELU")
            return self.multiply(positive, positive)
        factor = _SIGMOID_FACTORS[function]
        inner = x if factor == 1.0 else self._scaled(x, factor)
        return self.multiply(x, layers.activation(inner, "SIGMOID"))

    def _scaled(self, x: Any, factor: float) -> Any:
        return self.multiply(x, self.layers.scalar(factor, self.dtype, len(x.shape)))

    def rotary(self, qkv: Any, rotary_dim: int, base: float, scaling: float) -> Heads:
        if self._rotary_tables is None:
            cos, sin = rotary_tables(torch.arange(self.num_slots), rotary_dim, base, scaling)
            self._rotary_tables = self.layers.constant(cos.to(self.dtype)), self.layers.constant(sin.to(self.dtype))
        heads = self._split(qkv)
        q, k = (self.layers.rotary(x, *self._rotary_tables, self.positions, rotary_dim) for x in (heads.q, heads.k))
        return Heads(q, k, heads.v)

    def attention(self, qkv: Any, layer: int, scale: float) -> Any:
        heads = qkv if isinstance(qkv, Heads) else self._split(qkv)
        keys = self._cached("key", heads.k, layer)
        values = self._cached("value", heads.v, layer)
        # Scaling the queries rather than the scores keeps float16 scores in range.
        queries = self._scaled(heads.q, scale)
        attend = self.layers.attention if self.fused else self._plain_attention
        return self._join(attend(queries, keys, values, self.mask))

    def _plain_attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """The same as `Layers.attention` in separate layers, softmax in float32."""
        layers = self.layers
        shape = (0, self.num_heads, -1, self.num_slots)
        scores = layers.shuffle(
            layers.matmul(self._grouped(q, self.model.head_size), k, transpose_b=True), shape
        )  # [B, H, S, T]
        scores = layers.cast(scores, torch.float32)
        hidden = layers.scalar(torch.finfo(torch.float32).min, torch.float32, 4)
        weights = layers.cast(layers.softmax(layers.select(mask, scores, hidden)), self.dtype)
        mixed = layers.matmul(self._grouped(weights, self.num_slots), v)  # [B, G, (H/G)*S, D]
        return layers.shuffle(mixed, (0, self.num_heads, -1, self.model.head_size))

    def _grouped(self, x: Any, width: int) -> Any:
        """[B, H, S, width] -> [B, G, (H/G)*S, width]: the queries that share a key head form one product."""
        return self.layers.shuffle(x, (0, self.num_kv_heads, -1, width))

    def _split(self, qkv: Any) -> Heads:
        layers = self.layers
        if self.packed:
            qkv = layers.gather(qkv, self.inputs["padded_from_packed"], 0)  # [B, S, (H+2G)*D]
        parts = [layers.slice(qkv, (0, 0, start), size) for start, size in self._head_sizes]
        shape = (0, 0, -1, self.model.head_size)
        return Heads(*(layers.shuffle(part, shape, after=(0, 2, 1, 3)) for part in parts))

    def _join(self, x: Any) -> Any:
        """[B, H, S, D] -> [B, S, H*D], or [N, H*D] when packed."""
        width = self.num_heads * self.model.head_size
        if not self.packed:
            return self.layers.shuffle(x, (0, 0, width), before=(0, 2, 1, 3))
        rows = self.layers.shuffle(x, (-1, width), before=(0, 2, 1, 3))  # [B*S, H*D]
        return self.layers.gather(rows, self.inputs["packed_from_padded"], 0)

    def _cached(self, kind: str, update: Any, layer: int) -> Any:
        past = self.inputs[f"past_{kind}_{layer}"]
        index, name = self.inputs["cache_write_index"], f"present_{kind}_{layer}"
        if self.cache is not None:
            steps, present = self.cache.update(past, update, index, layer, kind)
            self.layers.output(steps, name)
            return present
        present = self.layers.cache_update(past, update, index)
        self.layers.output(present, name)
        return present

    def all_reduce(self, x: Any) -> Any:
        return self.layers.all_reduce(x, self.mapping.world_size)

    def all_gather(self, x: Any) -> Any:
        return self.layers.all_gather(x, self.mapping.world_size)

    def gather_last(self, x: Any) -> Any:
        last = self.inputs["last_token_ids"]
        return self.layers.gather(x, last, 0) if self.packed else self.layers.gather(x, last, 1, num_elementwise_dims=1)

    def logits(self, x: Any, name: str) -> Any:
        head, num_rows = self.weights[name], self.mapping.local_vocab_size(self.model)
        if head.shape[0] > num_rows:  # a tied head whose table is whole for the embedding's sake
            head = head.narrow(0, self.mapping.rank * num_rows, num_rows)
        return self.layers.cast(self._product(x, head, name), torch.float32)

    def name(self, x: Any, name: str) -> Any:
        return self.layers.name(x, name)
