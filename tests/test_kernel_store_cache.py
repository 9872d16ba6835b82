"""gpt/kernels/store_cache.py beside indexing and the formulas of gpt.quant."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import normal

from gpt.kernels.store_cache import CacheSlots, store_cache
from gpt.quant import to_fp8, to_int8

FORMULAS = {None: lambda x, _: x, torch.int8: to_int8, torch.float8_e4m3fn: to_fp8}
# Heads, key/value heads, head size: a size that is no power of two; two blocks of columns; all heads sharing.
HEADS = ((2, 2, 40), (10, 10, 64), (4, 1, 16))
SLOTS, BLOCKS = 8, 3


@pytest.mark.parametrize("stored", FORMULAS)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_token_goes_to_its_place(
    shape: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype | None, kernel_device: torch.device
) -> None:
    num_heads, groups, size = shape
    heads = normal(5, num_heads + 2 * groups, size, device=kernel_device, dtype=dtype)
    places = [0, 1, 2 * SLOTS + 7, SLOTS, SLOTS + 5]
    scales = torch.tensor([0.01, 0.02])
    blocks = torch.zeros(2, BLOCKS, groups, SLOTS, size).to(stored or dtype)
    expected = blocks.float()
    for token, place in enumerate(places):
        for part in range(2):
            first = num_heads + part * groups
            values = heads[token, first : first + groups].cpu()
            steps = FORMULAS[stored](values, scales[part])
            expected[part, place // SLOTS, :, place % SLOTS] = steps.float()
    whole = torch.zeros(2, BLOCKS + 2, *blocks.shape[2:]).to(device=kernel_device, dtype=blocks.dtype)
    found = whole[:, 1:-1]
    on_device = torch.tensor(places, dtype=torch.int32, device=kernel_device)
    store_cache(heads, CacheSlots(on_device, found, scales.to(kernel_device) if stored else None))
    assert torch.equal(found.float().cpu(), expected)
    assert not whole[:, [0, -1]].float().any()


@pytest.mark.parametrize("change", ["places", "blocks", "scales"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    slots = CacheSlots(
        zeros(1 if change == "places" else 2, dtype=torch.int32),
        zeros(2, 1, 1, 4, 8 if change == "blocks" else 16),
        zeros(1 if change == "scales" else 2, dtype=torch.float32),
    )
    with pytest.raises(ValueError, match="expected"):
        store_cache(zeros(2, 3, 16, dtype=torch.float32), slots)
