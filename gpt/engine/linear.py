"""x @ weight.T + bias, by the fastest call PyTorch has for the shape, dtype and device.

Measured for the 48 products of a 12 x 768 model in bfloat16.  With AMX (2 cores, torch 2.13.0) 2 to 16 rows take 10 ms
with the weight as the left operand and 15 ms as the right one, which oneDNN reorders at each call, and a single row is
fastest as a matrix-vector product.  Without AMX that takes a third longer than with the weight as the right operand,
the fastest way for up to 8 rows.  benchmarks/bench_linear.py measures the alternatives again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpt.engine.cpu import cpu_has
from gpt.kernels.product import ACTIVATION_FUNCTIONS

_FEW_ROWS = 8


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, in], weight [out, in], bias [out] or None, one dtype -> contiguous [N, out]."""
    if x.is_cuda or x.dtype == torch.float16:
        return F.linear(x, weight, bias)
    amx = x.dtype == torch.bfloat16 and cpu_has("amx_bf16")
    if x.shape[0] == 1 and (amx or x.dtype == torch.float32):
        y = torch.mv(weight, x[0])[None]
    elif x.dtype == torch.float32 or (x.shape[0] <= _FEW_ROWS and not amx):
        y = x @ weight.t()
    else:
        y = (weight @ x.t()).t().contiguous()
    return y if bias is None else y.add_(bias)


def library_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(x @ weight.T + bias) as `linear` has it, with cuBLASLt's own GELU behind a product."""
    if activation == "gelu_tanh" and bias is not None and x.is_cuda and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return ACTIVATION_FUNCTIONS[activation](linear(x, weight, bias))


NUM_REFINED = 16


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [N, in] @ weight [out, in].T as float32 [N, out], for logits.

    A bfloat16 product rounds a logit of 20 to a multiple of 1/8, and ties decide a greedy text.  A GPU adds and stores
    in float32.  PyTorch has no such product on a CPU: there, in rows whose largest value has others within the
    rounding, the largest few are computed again in float32 from the weights as they are.
    """
    if x.dtype == torch.float32:
        return linear(x, weight, None)
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = linear(x, weight, None).float()
    rounding = torch.finfo(x.dtype).eps
    best_two = y.topk(min(2, y.shape[1]), dim=-1).values.tolist()
    unsure = [row for row, (best, *next_) in enumerate(best_two) if next_ and best - next_[0] <= rounding * abs(best)]
    if unsure:
        _refine(y, x, weight, torch.tensor(unsure))
    return y


def _refine(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> None:
    """Replaces the NUM_REFINED largest values of these rows of y [N, out] by x @ weight.T in float32."""
    columns = y[rows].topk(min(NUM_REFINED, y.shape[1]), dim=-1, sorted=False).indices  # [rows, refined]
    exact = weight[columns].float() @ x[rows].float()[:, :, None]  # [rows, refined, 1]
    y[rows[:, None], columns] = exact.squeeze(-1)
