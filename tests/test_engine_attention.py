"""Attention in half precision: in which type it is computed, and that this changes no more than rounding."""

from __future__ import annotations

import pytest
import torch

from gpt.engine.attention_math import attention_dtype, fused_attention, plain_attention

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("instructions", [{"amx_bf16", "amx_fp16"}, set()], ids=["multiplied", "widened"])
def test_attention_in_half_precision(
    dtype: torch.dtype, instructions: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of 6 heads, 2 heads of keys and values, one token after 11."""
    monkeypatch.setattr("gpt.engine.attention_math.cpu_has", instructions.__contains__)
    assert attention_dtype(dtype, torch.device("cpu")) == (dtype if instructions else torch.float32)
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 6, 1, 16), (3, 2, 11, 16), (3, 2, 11, 16))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    wide = [t.double() for t in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
    expected = torch.softmax(wide[0] @ wide[1].transpose(-1, -2) * 0.3, dim=-1) @ wide[2]
    for attend in (fused_attention, plain_attention):
        y = attend(q, k, v, 0.3, None, causal=False)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


def test_other_types_and_devices_stay_as_they_are() -> None:
    assert attention_dtype(torch.float32, torch.device("cpu")) == torch.float32
    assert attention_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
