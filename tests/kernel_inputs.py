"""Random inputs for kernels' tests, and how far a kernel's result may be from its reference in float64."""

from __future__ import annotations

import torch

# The stored result is rounded once: half a unit in the last place, 2^-11 and 2^-8 relative at most, and as much again
# for values whose exact sum lies beside the middle.  float32 results differ by the order of their sums.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def wait_for(device: torch.device) -> None:
    """Until all that was launched has ended: a kernel may read what is settled before the launch before it has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def int8_weight(num_rows: int, num_columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps [N, K] and the value of a step for each row [N], float16."""
    steps = torch.randint(-128, 128, (num_rows, num_columns), device=device, dtype=torch.int8)
    return steps, (torch.rand(num_rows, device=device) * 0.01 + 0.001).half()


def operands(
    num_tokens: int, num_rows: int, num_columns: int, device: torch.device, steps: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], row_scale [M], weight [N, K] and col_scale [N] of a product of `steps`."""
    x, weight = (
        torch.randint(-128, 128, (size, num_columns), device=device).float().to(steps)
        for size in (num_tokens, num_rows)
    )
    return x, torch.rand(num_tokens, device=device) + 0.1, weight, torch.rand(num_rows, device=device) + 0.1


def tiles_of(num_rows: int, block_n: int, *shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    size = (*shape, -(-num_rows // block_n))
    return torch.zeros(size, device=device), torch.full(size, -1, dtype=torch.int32, device=device)
