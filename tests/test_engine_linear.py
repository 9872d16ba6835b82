"""Products in every type: near float64's, and logits whose order rounding does not decide."""

from __future__ import annotations

import pytest
import torch

from gpt.engine.linear import linear, wide_linear

# One rounding of the result, and sums of 96 rounded terms in float32 inside.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("instructions", [{"amx_bf16"}, set()], ids=["amx", "no amx"])
def test_product(
    dtype: torch.dtype, num_rows: int, with_bias: bool, instructions: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.engine.linear.cpu_has", instructions.__contains__)
    x, weight = random(num_rows, 96, dtype=dtype, seed=0), random(51, 96, dtype=dtype, seed=1)
    bias = random(51, dtype=dtype, seed=2) if with_bias else None
    y = linear(x, weight, bias)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert (y.double() - expected).norm() / expected.norm() < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_near_ties_are_decided_exactly(dtype: torch.dtype) -> None:
    """Twelve rows of a table differ from one another by less than the rounding of their product with x."""
    x = random(5, 96, dtype=dtype, seed=0)
    weight = random(300, 96, dtype=dtype, seed=1) * 0.1
    near = x.float().mean(0) * 4
    for row in range(12):
        weight[row] = (near + 0.004 * random(96, dtype=torch.float32, seed=row + 2)).to(dtype)
    exact = x.double() @ weight.double().t()
    rounded = linear(x, weight, None)
    assert (rounded.argmax(-1) != exact.argmax(-1)).any()  # otherwise this test would show nothing
    assert torch.equal(wide_linear(x, weight).argmax(-1), exact.argmax(-1))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = random(9, 96, dtype=torch.bfloat16, seed=0), random(64, 96, dtype=torch.bfloat16, seed=1)
    weight[1] = weight[0]  # ties in some rows
    both = wide_linear(x, weight)
    for row in range(2, 9):
        torch.testing.assert_close(wide_linear(x[row - 2 : row], weight), both[row - 2 : row])
