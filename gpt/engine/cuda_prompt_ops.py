"""The operations of a prompt step on a GPU: PyTorch's libraries for products and attention, kernels in between."""

from __future__ import annotations

from typing import Any

import torch

from gpt.engine.linear import library_linear
from gpt.engine.torch_executor import TorchOps
from gpt.kernels.norm import add_norm
from gpt.kernels.product import Norm


class PromptOps(TorchOps):
    """TorchOps with norms that write the products' dtype in one pass, and cuBLASLt's own GELU behind a product."""

    def layer_norm(self, x: torch.Tensor, name: str, epsilon: float, feeds: str | None = None) -> Any:
        if feeds in self.linears:
            return super().layer_norm(x, name, epsilon, feeds)
        return self._norm(x, Norm(self._norms[name + ".weight"], self._norms[name + ".bias"], epsilon))

    def rms_norm(self, x: torch.Tensor, name: str, epsilon: float, feeds: str | None = None) -> Any:
        if feeds in self.linears:
            return super().rms_norm(x, name, epsilon, feeds)
        return self._norm(x, Norm(self._norms[name + ".weight"], None, epsilon))

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        add_norm(x, y, norm)
        return y

    def linear(self, x: Any, name: str, *, activation: str | None = None, bias: bool = True) -> torch.Tensor:
        if name in self.linears:
            return super().linear(x, name, activation=activation, bias=bias)
        vector = self.weights.get(name + ".bias") if bias else None
        return library_linear(x, self.weights[name + ".weight"], vector, activation or "none")
