"""What belongs to a product with a weight matrix, and the whole of it written plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATION_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Norm:
    """(x - mean) / sqrt(var + epsilon) * weight + bias, or without `bias` x / sqrt(mean(x^2) + epsilon) * weight;
    weight and bias [K], of any float type."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Gate:
    """A second product of the same input, [N, K], [N] and, for int8, [N]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor of another shape or type, or with strides."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: found {found}, expected {dtype} {shape}, contiguous")


def check_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """Raises ValueError naming what does not fit: x [M, K], weight [N, K], out [M, N], bias and scale [N]."""
    num_rows, num_columns = weight.shape
    expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "x": (x, (x.shape[0], num_columns)),
        "out": (out, (x.shape[0], num_rows)),
    }
    if bias is not None:
        expected["bias"] = (bias, (num_rows,))
    if scale is not None:
        expected["scale"] = (scale, (num_rows,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: found {tuple(tensor.shape)}, expected {shape}, contiguous")
    if not weight.is_contiguous():
        raise ValueError("weight: found strides, expected contiguous rows")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"weight: found {weight.dtype} and {'a' if scale is not None else 'no'} scale")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm: Norm | None = None,
    activation: str = "none",
    gate: Gate | None = None,
) -> torch.Tensor:
    """activation(norm(x) @ weight.T + bias) [* (norm(x) @ gate.T + gate bias)] in float64: x [M, K] -> [M, N]."""
    h = x.double()
    if norm is not None:
        if norm.bias is None:
            h = F.rms_norm(h, h.shape[-1:], norm.weight.double(), norm.epsilon)
        else:
            h = F.layer_norm(h, h.shape[-1:], norm.weight.double(), norm.bias.double(), norm.epsilon)
    y = ACTIVATION_FUNCTIONS[activation](_linear(h, weight, bias, scale))
    return y if gate is None else y * _linear(h, gate.weight, gate.bias, gate.scale)


def _linear(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    y = h @ weight.double().t()
    if scale is not None:
        y = y * scale.double()
    return y if bias is None else y + bias.double()
