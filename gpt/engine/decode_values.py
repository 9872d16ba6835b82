"""What the operations of a decode step hand to each other in place of results: see gpt.engine.cuda_ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt.engine.quant_linear import QuantizedRows
from gpt.kernels.attention_blocks import Rotary
from gpt.kernels.product import Norm


@dataclass
class Words:
    """An embedding nobody has looked up yet."""

    table: str


@dataclass
class Places:
    table: str


@dataclass
class Stream:
    """The residual stream x [B, E] float32; `parts` [P, B, E] and `bias` [E] still have to be added to it.

    written: how many products and attentions the step had launched when x was last written.
    """

    x: torch.Tensor
    written: int = 0
    parts: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass
class Normed:
    stream: Stream
    norm: Norm
    value: torch.Tensor | QuantizedRows | None = None


@dataclass
class Product:
    """activation(input @ weight.T + bias) * (input @ gate.T + its bias)."""

    input: Normed | Parts | QuantizedRows | torch.Tensor
    name: str
    activation: str
    bias: bool
    gate: str | None = None


@dataclass
class Rotated:
    qkv: Product
    rotary: Rotary


@dataclass
class Sum:
    """A finished product, of which every rank has a part, and the bias that is still to be added to the ranks' sum."""

    value: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class Parts:
    """An attention's output in parts, as `decode_attention` leaves them: a product of one row joins them itself."""

    parts: torch.Tensor
    num_splits: int


Value = Words | Places | Stream | Normed | Product | Rotated | Sum | Parts | QuantizedRows | torch.Tensor
