"""The operations of gpt.network.ops run by PyTorch, on a CPU or a GPU.  Also the oracle for every other executor."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from typing import Any

import torch
import torch.nn.functional as F

from gpt.comm import Communicator, NullCommunicator
from gpt.config import ModelConfig
from gpt.engine.kv_cache import KvCache
from gpt.engine.linear import linear, wide_linear
from gpt.engine.quant_linear import QuantLinear, quantized_linears
from gpt.engine.step import ContextStep, GenerationStep, Step
from gpt.engine.torch_attention import TorchAttention
from gpt.kernels.product import ACTIVATION_FUNCTIONS
from gpt.mapping import Mapping, Split
from gpt.quant import FLOAT, QuantConfig


class TorchOps:
    """Ops over packed activations [N, E], for the step in `step`; the session calls `begin` before each run.

    weights: as `gpt.engine.weights.engine_tensors` makes them, on one device; quant: what of them is quantised.  fused:
    scaled_dot_product_attention, else scores and softmax written out in float32.  comm: carries tensors of the weights'
    device between the ranks of `mapping`.  trace: where named intermediate results are kept, when given.
    """

    _attention_class = TorchAttention

    def __init__(
        self,
        model: ModelConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
        *,
        fused: bool = True,
        comm: Communicator | None = None,
        quant: QuantConfig = FLOAT,
    ):
        self.comm = comm or NullCommunicator()
        self.model = model
        self.mapping = mapping
        self.weights = weights
        self.num_heads = mapping.local_heads(model)
        self.num_kv_heads = mapping.local_kv_heads(model)
        self.dtype = weights["model.wte"].dtype
        # A few vectors, kept wide because what they scale is wide: see `embedding`.
        self._norms = {name: tensor.float() for name, tensor in weights.items() if "layernorm." in name}
        self.linears = self._make_linears(weights, quant)
        # Beside quantised weights, whose products are wide.
        self._biases = {n: weights[n + ".bias"].float() for n in self.linears if n + ".bias" in weights}
        self.attend = self._attention_class(self.num_heads, self.num_kv_heads, fused=fused)
        self.trace: dict[str, torch.Tensor] | None = None
        self.step: Step
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def _make_linears(self, weights: Dict[str, torch.Tensor], quant: QuantConfig) -> Dict[str, QuantLinear]:
        return quantized_linears(weights, quant, self.dtype)

    def begin(self, step: Step, cache: KvCache) -> None:
        """Takes the inputs of the next `forward`."""
        self.step = step
        self._rotary = None
        self.attend.begin(step, cache)

    def embedding(self, table: str) -> torch.Tensor:
        """float32, and with it the whole residual stream: sums of half-precision terms stay exact between the products,
        which keeps greedy text near float32's.  Layernorms hand the engine's dtype to the products."""
        return self._rows(table).float()

    def _rows(self, table: str) -> torch.Tensor:
        step = self.step
        if isinstance(step, GenerationStep) or step.prompt_table is None or step.first_row is None:
            return self._words(step.ids, table)
        virtual = step.ids >= self.model.vocab_size
        words = self._words(step.ids.masked_fill(virtual, 0), table)
        rows = (step.ids - self.model.vocab_size + step.first_row).masked_fill(~virtual, 0)
        return torch.where(virtual[:, None], self._own_part(F.embedding(rows, step.prompt_table)), words)

    def _words(self, ids: torch.Tensor, table: str) -> torch.Tensor:
        weights = self.weights[table]
        if self.mapping.embedding is not Split.ROW:
            return F.embedding(ids, weights)
        own = ids - self.mapping.rank * weights.shape[0]
        elsewhere = (own < 0) | (own >= weights.shape[0])
        return F.embedding(own.masked_fill(elsewhere, 0), weights).masked_fill(elsewhere[:, None], 0)

    def _own_part(self, rows: torch.Tensor) -> torch.Tensor:
        """What this rank contributes of embeddings [N, E] that every rank has whole."""
        if self.mapping.embedding is Split.ROW and self.mapping.rank > 0:
            return torch.zeros_like(rows)
        if self.mapping.embedding is Split.COLUMN:
            return self.mapping.shard(Split.COLUMN, rows, self.model)
        return rows

    def position_embedding(self, table: str) -> torch.Tensor:
        return F.embedding(self.step.positions, self.weights[table])

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.add_(b)

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.mul_(b)

    def layer_norm(self, x: torch.Tensor, name: str, epsilon: float, feeds: str | None = None) -> Any:
        weight, bias = self._norms[name + ".weight"], self._norms[name + ".bias"]
        return self._hand_over(torch.layer_norm(x, weight.shape, weight, bias, epsilon), feeds)

    def rms_norm(self, x: torch.Tensor, name: str, epsilon: float, feeds: str | None = None) -> Any:
        return self._hand_over(F.rms_norm(x, x.shape[-1:], self._norms[name + ".weight"], epsilon), feeds)

    def _hand_over(self, y: torch.Tensor, feeds: str | None) -> Any:
        """Normalised values in the engine's dtype, or as the quantised product `feeds` takes them."""
        quantized = self.linears.get(feeds) if feeds else None
        return y.to(self.dtype) if quantized is None else quantized.prepare(y)

    def linear(
        self, x: Any, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> torch.Tensor:
        quantized = self.linears.get(name)
        if quantized is None:
            y = linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias") if bias else None)
        else:
            rows = quantized.prepare(x) if isinstance(x, torch.Tensor) else x
            y = quantized.multiply(rows, self._biases.get(name) if bias else None)
        return y if activation is None else ACTIVATION_FUNCTIONS[activation](y)

    def add_bias(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(name + ".bias")
        return x if bias is None else x.add_(bias)

    def rotary(self, qkv: torch.Tensor, rotary_dim: int, base: float, scaling: float) -> torch.Tensor:
        if self._rotary is None:
            self._rotary = rotary_tables(self.step.positions, rotary_dim, base, scaling)
        cos, sin = (table.to(qkv.dtype)[:, None] for table in self._rotary)  # [N, 1, rotary_dim / 2]
        num_rotated = self.num_heads + self.num_kv_heads
        heads = qkv.view(qkv.shape[0], -1, self.model.head_size)[:, :num_rotated, :rotary_dim]
        first, second = heads.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        heads.copy_(rotated)
        return qkv

    def attention(self, qkv: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
        return self.attend(qkv.to(self.dtype).view(qkv.shape[0], -1, self.model.head_size), layer, scale)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.comm.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.comm.all_gather(x, -1)

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.step, GenerationStep):
            return x
        return x[self.step.last if isinstance(self.step, ContextStep) else self.step.wanted]

    def logits(self, x: torch.Tensor, name: str) -> torch.Tensor:
        head, rows = self.weights[name], self.mapping.local_vocab_size(self.model)
        if head.shape[0] > rows:  # a tied head whose table is whole for the embedding's sake
            head = head.narrow(0, self.mapping.rank * rows, rows)
        return wide_linear(x, head)

    def name(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.trace is not None:
            self.trace[name] = x.clone()
        return x


def rotary_tables(
    positions: torch.Tensor, rotary_dim: int, base: float, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position / scaling * base^(-2i/rotary_dim), each [N, rotary_dim / 2] float32, from positions
    [N]."""
    steps = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angles = torch.outer(positions.float() / scaling, base ** (-steps / rotary_dim))
    return angles.cos(), angles.sin()
