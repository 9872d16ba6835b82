"""SmoothQuant and FP8 products on a GPU by kernels: rows turned into integers or FP8, and what multiplies them."""

from __future__ import annotations

from collections.abc import Mapping as Dict

import torch

from gpt.engine.quant_linear import LinearWeights, QuantizedRows, prepared_rows, quantized_names
from gpt.kernels.product import Norm
from gpt.kernels.quantize_rows import quantize_rows
from gpt.kernels.store_cache import CacheSlots
from gpt.kernels.w8a8 import w8a8
from gpt.kernels.w8a8_config import HopperConfig, W8a8Config, default_config
from gpt.kernels.w8a8_epilogue import NextInput


class W8a8Linear:
    """One weight's way of multiplying, a `gpt.engine.quant_linear.QuantLinear` that takes along what stands around it.

    The rows' scale is [N] here.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype):
        """dtype: of the results."""
        self.weight, self.scale, self.dtype = weights.weight, weights.scale, dtype
        self.input_scale, self.smoother = weights.input_scale, weights.smoother

    def prepare(
        self,
        x: torch.Tensor,
        norm: Norm | None = None,
        parts: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> QuantizedRows:
        """x [N, in] += sum of parts [P, N, in] (+ bias); steps of norm(x)."""
        rows = self._empty_rows(len(x), x.shape[1])
        quantize_rows(
            x,
            rows.values,
            rows.scale,
            norm=norm,
            input_scale=self.input_scale,
            smoother=self.smoother,
            parts=parts,
            bias=bias,
        )
        return rows

    def multiply(
        self, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
    ) -> torch.Tensor:
        """activation(x @ weight.T + bias): [N, out]."""
        rows = prepared_rows(x)
        out = torch.empty((len(rows.values), len(self.weight)), dtype=self.dtype, device=self.weight.device)
        self._launch(rows, out, bias=bias, activation=activation)
        return out

    def multiply_into(self, stream: torch.Tensor, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None) -> None:
        """stream [N, out] float32 += x @ weight.T + bias."""
        self._launch(prepared_rows(x), stream, bias=bias, add_to_out=True)

    def multiply_into_cache(
        self, cache: CacheSlots, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None, *, queries_alone: bool
    ) -> torch.Tensor:
        """x @ weight.T + bias, of which K and V, the last columns, go to the cache: the queries [N, H * D], or with the
        other columns beside them [N, out]."""
        rows = prepared_rows(x)
        width = len(self.weight) - (cache.num_columns if queries_alone else 0)
        out = torch.empty((len(rows.values), width), dtype=self.dtype, device=self.weight.device)
        self._launch(rows, out, bias=bias, cache=cache)
        return out

    def multiply_for(
        self, following: W8a8Linear, x: QuantizedRows | torch.Tensor, bias: torch.Tensor | None, activation: str
    ) -> QuantizedRows | torch.Tensor:
        """`multiply` for another product: what that one multiplies, where its scale is known before."""
        if following.input_scale is None:
            return self.multiply(x, bias, activation)
        rows = prepared_rows(x)
        result = following._empty_rows(len(rows.values), len(self.weight))
        next_input = NextInput(following.input_scale, result.scale, following.smoother)
        self._launch(rows, result.values, bias=bias, activation=activation, next_input=next_input)
        return result

    def parts(self, x: QuantizedRows | torch.Tensor) -> torch.Tensor:
        """x @ weight.T as partial sums float32 [P, N, out], for a reader that adds them anyway."""
        rows = prepared_rows(x)
        config = self._config(len(rows.values), splits=True)
        out = torch.empty((config.split_k, len(rows.values), len(self.weight)), device=self.weight.device)
        w8a8(rows.values, rows.scale, self.weight, self.scale, out, config=config)
        return out

    def _launch(
        self,
        rows: QuantizedRows,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        activation: str = "none",
        next_input: NextInput | None = None,
        add_to_out: bool = False,
        cache: CacheSlots | None = None,
    ) -> None:
        w8a8(
            rows.values,
            rows.scale,
            self.weight,
            self.scale,
            out,
            config=self._config(len(out), splits=False),
            bias=bias,
            activation=activation,
            next_input=next_input,
            add_to_out=add_to_out,
            cache=cache,
        )

    def _empty_rows(self, num_rows: int, width: int) -> QuantizedRows:
        device = self.weight.device
        values = torch.empty((num_rows, width), dtype=self.weight.dtype, device=device)
        return QuantizedRows(values, torch.empty(num_rows, device=device))

    def _config(self, num_tokens: int, *, splits: bool) -> W8a8Config | HopperConfig:
        num_rows, num_columns = self.weight.shape
        return default_config(num_tokens, num_rows, num_columns, self.weight.device, splits=splits)


def w8a8_linears(weights: Dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, W8a8Linear]:
    """The products of a SmoothQuant or FP8 engine's weights, by the name of the linear layer."""
    return {name: W8a8Linear(LinearWeights.of(weights, name), dtype) for name in quantized_names(weights)}
