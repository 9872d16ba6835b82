"""The operations of one decode step as few kernels: what follows what is known, so little is done on its own.

`gpt.network.gpt.forward` runs once per captured graph.  Operations that a kernel can take along (norms, biases,
activations, gates, residual sums, rotation) return a description instead of a result; the operation that needs the
value launches the kernel for all of it.  For one sequence a layer is five launches: norm and QKV, attention, dense and
residual, norm and FC1, FC2 and residual.  For several, norms and residual sums share a launch of their own.  Among
GPUs that share memory, the sum over the ranks takes bias and residual sum along.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from gpt.comm import Communicator, NullCommunicator
from gpt.config import ModelConfig
from gpt.engine.cuda_w8a8 import W8a8Linear
from gpt.engine.decode_values import Normed, Parts, Places, Product, Rotated, Stream, Sum, Value, Words
from gpt.engine.kv_cache import KvCache
from gpt.engine.linear import library_linear, wide_linear
from gpt.engine.quant_linear import QuantizedRows
from gpt.engine.torch_executor import rotary_tables
from gpt.engine.tuning import Tuning
from gpt.kernels import integer_gemv
from gpt.kernels.attention import decode_attention, scratch_size
from gpt.kernels.attention_blocks import Rotary
from gpt.kernels.gemv import config_for_parts, gemv, takes_parts
from gpt.kernels.int4_skinny import int4_skinny
from gpt.kernels.norm import add_norm, embed
from gpt.kernels.product import Gate, Norm
from gpt.kernels.skinny import skinny
from gpt.mapping import Mapping, Split

# From so many rows on, products belong to the libraries: the kernels would fetch each weight once per 64 rows.
LIBRARY_ROWS = 128


@dataclass(frozen=True)
class DecodeInputs:
    """What a step reads and where it leaves its choice, at fixed addresses.

    ids, positions: [B] int32.  table: [B, blocks] int32, the cache's blocks of each sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    cache: KvCache


@dataclass
class _Scratch:
    """Grown to the largest attention's need; layers follow each other, so one is enough."""

    tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def get(self, size: int, device: torch.device) -> torch.Tensor | None:
        if size == 0:
            return None
        if self.tensor.numel() < size:
            self.tensor = torch.empty(size, dtype=torch.float32, device=device)
        return self.tensor


class DecodeOps:
    """Ops for one token of each of B sequences; see gpt.network.ops.

    weights: as the engine holds them, on one CUDA device (on a CPU with Triton's interpreter).  `tiles` is what the
    head found: the largest logit of each of its tiles, [B, tiles] float32, and its token id, int32.  products: those
    that quantise their inputs, by name.
    """

    def __init__(
        self,
        model: ModelConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
        tuning: Tuning,
        *,
        max_seq_len: int,
        comm: Communicator | None = None,
        products: Dict[str, W8a8Linear] | None = None,
    ):
        self.products = products or {}
        self.model = model
        self.mapping = mapping
        self.weights = weights
        self.tuning = tuning
        self.comm = comm or NullCommunicator()
        self.dtype = weights["model.wte"].dtype
        self.device = weights["model.wte"].device
        self.num_heads = mapping.local_heads(model)
        self.num_kv_heads = mapping.local_kv_heads(model)
        self._has_integers = not self.products and any(name.endswith(".weight_scale") for name in weights)
        self.tiles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.inputs: DecodeInputs
        self._launches = 0  # products and attentions of this step so far
        self._scratch = _Scratch()
        self._rotary: Rotary | None = None
        if not model.learned_positions:
            positions = torch.arange(max_seq_len, device=self.device)
            tables = rotary_tables(positions, model.rotary_dim, model.rotary_base, model.rotary_scaling)
            self._rotary = Rotary(*(table.contiguous() for table in tables))

    def begin(self, inputs: DecodeInputs) -> None:
        """Takes the buffers the next `forward` works on."""
        self.inputs = inputs
        self.tiles = None
        self._launches = 0

    @property
    def _batch_size(self) -> int:
        return self.inputs.ids.shape[0]

    @property
    def _starts_early(self) -> bool:
        """Whether kernels start before the one two before them has ended, as they do behind `integer_gemv`."""
        return self._batch_size == 1 and self._has_integers

    def embedding(self, table: str) -> Value:
        if self.mapping.embedding is Split.NONE:
            return Words(table)
        ids = self.inputs.ids
        weights = self.weights[table]
        if self.mapping.embedding is Split.COLUMN:
            return F.embedding(ids, weights).float()
        own = ids - self.mapping.rank * weights.shape[0]
        elsewhere = (own < 0) | (own >= weights.shape[0])
        return F.embedding(own.masked_fill(elsewhere, 0), weights).masked_fill(elsewhere[:, None], 0).float()

    def position_embedding(self, table: str) -> Value:
        return Places(table)

    def add(self, a: Value, b: Value) -> Value:
        if isinstance(b, Places):
            return self._embedded(a, b)
        stream = self._stream(a)
        if isinstance(b, Product):
            self._add_product(stream, b)
        elif isinstance(b, Sum):
            self._add_sum(stream, b)
        else:
            raise TypeError(f"nothing adds {type(b).__name__} to the residual stream")
        return stream

    def _embedded(self, words: Value, places: Places | None) -> Stream:
        table = self.weights[places.table] if places else None
        if isinstance(words, torch.Tensor):
            return Stream(words if table is None else words.add_(F.embedding(self.inputs.positions, table)))
        if not isinstance(words, Words):
            raise TypeError(f"no embedding: {type(words).__name__}")
        x = self._empty(self.model.n_embd, torch.float32)
        embed(self.inputs.ids, self.inputs.positions, self.weights[words.table], table, x)
        return Stream(x)

    def _stream(self, x: Value) -> Stream:
        if isinstance(x, Stream):
            if x.parts is not None:  # two sums without a norm between them
                add_norm(x.x, None, None, parts=x.parts, bias=x.bias)
                self._finish(x)
            return x
        return self._embedded(x, None)

    def _add_product(self, stream: Stream, product: Product) -> None:
        if product.name in self.products:
            quantized = self.products[product.name]
            rows = self._rows(product.input, quantized)
            stream.parts, stream.bias = quantized.parts(rows), self._bias(product)
            return
        weight, scale, bias = self._weight(product.name, product.bias)
        num_rows, num_columns = _shape(weight)
        if self._batch_size == 1:
            self._gemv(product.input, weight, stream.x, bias=bias, scale=scale, stream=stream)
            stream.written = self._launches
            return
        h = self._input(product.input, weight)
        if self._takes_library(weight):
            stream.parts, stream.bias = wide_linear(h, weight)[None], bias
            return
        skinny_config = self.tuning.skinny(
            self._batch_size, num_rows, num_columns, splits=True, itemsize=weight.itemsize
        )
        parts = torch.empty(
            (skinny_config.split_k, self._batch_size, num_rows), dtype=torch.float32, device=self.device
        )
        multiply: Any = int4_skinny if weight.dtype == torch.uint8 else skinny
        multiply(h, weight, parts, config=skinny_config, scale=scale)
        stream.parts, stream.bias = parts, bias

    def _add_sum(self, stream: Stream, part: Sum) -> None:
        """In one kernel where the GPUs share memory."""
        if self.comm.small_sum is not None and self.comm.small_sum(part.value, stream.x, part.bias):
            stream.written = self._launches
            return
        self.comm.all_reduce(part.value)
        stream.parts, stream.bias = part.value[None], part.bias

    def layer_norm(self, x: Value, name: str, epsilon: float, feeds: str | None = None) -> Value:
        return self._normed(x, Norm(self.weights[name + ".weight"], self.weights[name + ".bias"], epsilon))

    def rms_norm(self, x: Value, name: str, epsilon: float, feeds: str | None = None) -> Value:
        return self._normed(x, Norm(self.weights[name + ".weight"], None, epsilon))

    def _normed(self, x: Value, norm: Norm) -> Normed:
        return Normed(x if isinstance(x, Stream) else self._stream(x), norm)

    def linear(
        self, x: Value, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> Value:
        if isinstance(x, Product) and x.name in self.products and x.gate is None:
            quantized = self.products[x.name]
            rows = self._rows(x.input, quantized)
            x = quantized.multiply_for(self.products[name], rows, self._bias(x), x.activation)
        elif not isinstance(x, (Normed, Parts, torch.Tensor)):
            x = self.value(x)
        return Product(x, name, activation or "none", bias)

    def multiply(self, a: Value, b: Value) -> Value:
        if not (isinstance(a, Product) and isinstance(b, Product)):
            raise TypeError(f"nothing multiplies {type(a).__name__} and {type(b).__name__}")
        return Product(a.input, a.name, a.activation, a.bias, gate=b.name)

    def rotary(self, qkv: Value, rotary_dim: int, base: float, scaling: float) -> Value:
        if not isinstance(qkv, Product) or self._rotary is None:
            raise TypeError(f"nothing rotates {type(qkv).__name__}")
        return Rotated(qkv, self._rotary)

    def attention(self, qkv: Value, layer: int, scale: float) -> Value:
        qkv, rotary = (qkv.qkv, qkv.rotary) if isinstance(qkv, Rotated) else (qkv, None)
        cache = self.inputs.cache
        head_size = self.model.head_size
        num_slots = self.inputs.table.shape[1] * cache.tokens_per_block
        config = self.tuning.attention(self._batch_size, self.num_heads, self.num_kv_heads, num_slots)
        parts = self._scratch.get(scratch_size(self._batch_size, self.num_heads, head_size, config), self.device)
        in_parts = self._batch_size == 1 and not self.products
        in_parts = in_parts and takes_parts(self.num_heads, head_size, config.num_splits)
        out = self._empty(self.num_heads * head_size, self.dtype)
        next_weight = self.weights.get(f"model.layers.{layer}.mlp.dense_h_to_4h.weight")
        decode_attention(
            self.value(qkv).view(self._batch_size, -1, head_size),
            self.inputs.positions,
            self.inputs.table,
            cache.blocks[layer, 0],
            cache.blocks[layer, 1],
            out.view(self._batch_size, self.num_heads, head_size),
            scale=scale,
            config=config,
            rotary=rotary,
            kv_scale=None if cache.scales is None else cache.scales[layer],
            parts=parts,
            join=not in_parts,
            next_weight=None if self._starts_early else next_weight,  # its own kernel asks for it in time
            early=self._starts_early,
        )
        self._launches += 1
        if in_parts and parts is not None:
            return Parts(parts, config.num_splits)
        return out

    def all_reduce(self, x: Value) -> Value:
        value = self.value(x)
        if isinstance(x, Product):
            return Sum(value)  # with what it is added to
        self.comm.all_reduce(value)
        return value

    def all_gather(self, x: Value) -> Value:
        return self.comm.all_gather(self.value(x), -1)

    def add_bias(self, x: Value, name: str) -> Value:
        if not isinstance(x, Sum):
            raise TypeError(f"nothing adds a bias to {type(x).__name__}")
        return Sum(x.value, self.weights.get(name + ".bias"))

    def gather_last(self, x: Value) -> Value:
        return x

    def logits(self, x: Value, name: str) -> Value:
        head, rows = self.weights[name], self.mapping.local_vocab_size(self.model)
        if head.shape[0] > rows:  # a tied head whose table is whole for the embedding's sake
            head = head.narrow(0, self.mapping.rank * rows, rows)
        first = self.mapping.rank * rows
        num_valid = min(max(self.model.vocab_size - first, 0), rows)
        out = self._empty(rows, torch.float32)
        self._multiply(x, head, out, num_valid=num_valid)
        return out

    def name(self, x: Value, name: str) -> Value:
        return x

    def value(self, x: Value) -> torch.Tensor:
        """The tensor a description stands for."""
        if isinstance(x, torch.Tensor):
            return x
        if not isinstance(x, Product):
            raise TypeError(f"{type(x).__name__} has no value of its own")
        if x.name in self.products:
            return self._quantized_value(x)
        weight, scale, bias = self._weight(x.name, x.bias)
        gate = None
        if x.gate is not None:
            gate_weight, gate_scale, gate_bias = self._weight(x.gate, x.bias)
            gate = Gate(gate_weight, gate_bias, gate_scale)
        out = self._empty(weight.shape[0], self.dtype)
        self._multiply(x.input, weight, out, bias=bias, scale=scale, activation=x.activation, gate=gate)
        return out

    def _quantized_value(self, x: Product) -> torch.Tensor:
        quantized = self.products[x.name]
        rows = self._rows(x.input, quantized)
        y = quantized.multiply(rows, self._bias(x), x.activation)
        if x.gate is not None:
            y.mul_(self.products[x.gate].multiply(rows, self.weights.get(x.gate + ".bias") if x.bias else None))
        return y

    def _rows(self, x: Value, product: W8a8Linear) -> QuantizedRows:
        """What a product that quantises its input multiplies; a pending sum enters the residual stream first."""
        if isinstance(x, QuantizedRows):
            return x
        if not isinstance(x, Normed):
            return product.prepare(self.value(x))
        if x.value is None:
            x.value = product.prepare(x.stream.x, x.norm, x.stream.parts, x.stream.bias)
            self._finish(x.stream)
        if not isinstance(x.value, QuantizedRows):
            raise TypeError("one norm feeds float and quantised products")
        return x.value

    def _bias(self, product: Product) -> torch.Tensor | None:
        return self.weights.get(product.name + ".bias") if product.bias else None

    def _multiply(
        self,
        x: Value,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        activation: str = "none",
        gate: Gate | None = None,
        num_valid: int | None = None,
    ) -> None:
        """num_valid: rows of a head that are tokens; `tiles` is set for it."""
        num_rows, num_columns = _shape(weight)
        if self._batch_size == 1:
            self._gemv(x, weight, out, bias=bias, scale=scale, activation=activation, gate=gate, num_valid=num_valid)
        elif self._takes_library(weight):
            h = self._input(x, weight)
            if num_valid is not None:
                out.copy_(wide_linear(h, weight))
                return
            y = library_linear(h, weight, bias, activation)
            if gate is not None:
                y.mul_(library_linear(h, gate.weight, gate.bias, "none"))
            out.copy_(y)
        else:
            skinny_config = self.tuning.skinny(
                self._batch_size, num_rows, num_columns, splits=False, itemsize=weight.itemsize
            )
            options: dict[str, Any] = {"bias": bias, "scale": scale, "activation": activation, "gate": gate}
            if num_valid is not None:
                options |= {"tiles": self._make_tiles(num_rows, skinny_config.block_n), "num_valid": num_valid}
            multiply: Any = int4_skinny if weight.dtype == torch.uint8 else skinny
            multiply(self._input(x, weight), weight, out, config=skinny_config, **options)

    def _takes_library(self, weight: torch.Tensor) -> bool:
        """Libraries choose by the number of rows how they add."""
        return self._batch_size >= LIBRARY_ROWS and weight.dtype == self.dtype and not self.tuning.batch_invariant

    def _gemv(
        self,
        x: Value,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        activation: str = "none",
        gate: Gate | None = None,
        stream: Stream | None = None,
        num_valid: int | None = None,
    ) -> None:
        """One row's product, which takes the norm before it along, or the joining of an attention's parts.  stream:
        what `out` belongs to, if the result is added there."""
        num_rows, num_columns = _shape(weight)
        norm, splits = None, 1
        if isinstance(x, Parts):
            h, splits = x.parts, x.num_splits
        elif isinstance(x, Normed) and x.value is None and x.stream.parts is None:
            h, norm = x.stream.x, x.norm
        else:
            h = self._input(x, weight)
        options: dict[str, Any] = {
            "bias": bias,
            "scale": scale,
            "norm": norm,
            "activation": activation,
            "gate": gate,
            "add_to_out": stream is not None,
            "splits": splits,
            "head_size": self.model.head_size,
        }
        # Whole words of weights; a head has float weights.
        if scale is not None and num_columns % 4 == 0:
            bits = 4 if weight.dtype == torch.uint8 else 8
            integer_config = integer_gemv.default_config(
                num_rows, num_columns, bits, self.device, gated=gate is not None
            )
            integer_gemv.integer_gemv(h, weight, out, config=integer_config, **options)
        else:
            config = self.tuning.gemv(num_rows, num_columns, itemsize=weight.itemsize)
            if splits > 1:
                config = config_for_parts(config, splits, self.model.head_size)
            if num_valid is not None:
                options |= {"tiles": self._make_tiles(num_rows, config.block_n), "num_valid": num_valid}
            if stream is not None:
                options["settled"] = stream.written < self._launches and not self._starts_early
            gemv(h, weight, out, config=config, **options)
        self._launches += 1

    def _finish(self, stream: Stream) -> None:
        """What was to be added to the stream has been."""
        stream.parts = stream.bias = None
        stream.written = self._launches

    def _input(self, x: Value, weight: torch.Tensor) -> torch.Tensor:
        """What a product with `weight` multiplies, [B, E] in the engine's dtype; a pending sum enters the residual
        stream first."""
        if not isinstance(x, Normed):
            return self.value(x)
        if x.value is None:
            x.value = self._empty(x.norm.weight.shape[0], self.dtype)
            # A wider product keeps the memory busy for longer than its input is awaited.
            ahead = weight if self._batch_size <= 32 and _shape(weight)[1] <= 1024 else None
            add_norm(x.stream.x, x.value, x.norm, parts=x.stream.parts, bias=x.stream.bias, next_weight=ahead)
            self._finish(x.stream)
        if isinstance(x.value, QuantizedRows):
            raise TypeError("one norm feeds float and quantised products")
        return x.value

    def _weight(self, name: str, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        weights = self.weights
        return (
            weights[name + ".weight"],
            weights.get(name + ".weight_scale"),
            weights.get(name + ".bias") if bias else None,
        )

    def _make_tiles(self, num_rows: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self._batch_size, -(-num_rows // block_n))
        self.tiles = (
            torch.empty(shape, dtype=torch.float32, device=self.device),
            torch.empty(shape, dtype=torch.int32, device=self.device),
        )
        return self.tiles

    def _empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((self._batch_size, width), dtype=dtype, device=self.device)


def _shape(weight: torch.Tensor) -> tuple[int, int]:
    """(N, K) of a weight, two of whose values may share a byte."""
    return weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
