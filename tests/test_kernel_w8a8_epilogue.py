"""Where gpt/kernels/w8a8.py stores what: beside the same product stored plainly, and what others then did with it."""

from __future__ import annotations

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, normal, operands

from gpt.kernels.quantize_rows import LARGEST
from gpt.kernels.store_cache import CacheSlots, store_cache
from gpt.kernels.w8a8 import W8a8Config, reference, w8a8
from gpt.kernels.w8a8_epilogue import NextInput

# Tiles that are one piece, and several pieces; the last ones beyond both edges.
CONFIGS = {
    "narrow": W8a8Config(16, 32, 64, 4, 2),
    "wide": W8a8Config(32, 128, 64, 4, 2),
    "descriptors": W8a8Config(64, 64, 32, 4, 2, descriptors=True),
    "fetched": W8a8Config(32, 64, 64, 4, 2, fetches=True),
    "reduced": W8a8Config(32, 64, 64, 4, 2, reduces=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", LARGEST)
def test_result_added_to_the_stream(config: W8a8Config, steps: torch.dtype, kernel_device: torch.device) -> None:
    x, row_scale, weight, col_scale = operands(75, 170, 144, kernel_device, steps)
    col_scale *= 1e-5
    bias = normal(170, device=kernel_device, dtype=torch.float16)
    whole = normal(77, 170, device=kernel_device)
    before = whole.clone()
    w8a8(x, row_scale, weight, col_scale, whole[1:-1], config=config, bias=bias, add_to_out=True)
    expected = before[1:-1] + reference(x, row_scale, weight, col_scale, bias=bias)
    assert relative_error(whole[1:-1], expected) < (TOLERANCE[torch.float32] if steps == torch.int8 else 1e-3)
    assert torch.equal(whole[[0, -1]], before[[0, -1]])


# Heads, key/value heads, head size: tiles with queries and keys, with keys and values; odd sizes; one tile with all.
HEADS = {"multi-head": (3, 3, 64), "odd size": (2, 2, 40), "multi-query": (5, 1, 16), "grouped": (6, 2, 32)}
SLOTS, BLOCKS = 8, 12


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("queries_alone", [False, True])
def test_keys_and_values_go_to_the_cache(
    heads: tuple[int, int, int], stored: torch.dtype | None, queries_alone: bool, kernel_device: torch.device
) -> None:
    """The same bits as those of a product that is stored and then read by the kernel that fills caches."""
    num_heads, groups, size = heads
    num_tokens, num_rows = 37, (num_heads + 2 * groups) * size
    config = W8a8Config(16, 64, 32, 4, 2)
    x, row_scale, weight, col_scale = operands(num_tokens, num_rows, 96, kernel_device)
    col_scale *= 1e-5
    bias = normal(num_rows, device=kernel_device, dtype=torch.float16)
    plain = torch.empty((num_tokens, num_rows), device=kernel_device, dtype=torch.float16)
    w8a8(x, row_scale, weight, col_scale, plain, config=config, bias=bias)
    places = torch.randperm(BLOCKS * SLOTS, device=kernel_device)[:num_tokens].int()
    scales = None if stored is None else torch.tensor([0.01, 0.02], device=kernel_device)
    caches = []
    for _ in range(2):
        # Blocks of a larger cache, whose K and V stand apart.
        shape = (2, BLOCKS + 1, groups, SLOTS, size)
        caches.append(torch.zeros(shape).to(stored or torch.float16).to(kernel_device))
    store_cache(plain.view(num_tokens, -1, size), CacheSlots(places, caches[0][:, 1:], scales))
    out = torch.zeros((num_tokens, num_heads * size if queries_alone else num_rows), device=kernel_device).half()
    w8a8(
        x,
        row_scale,
        weight,
        col_scale,
        out,
        config=config,
        bias=bias,
        cache=CacheSlots(places, caches[1][:, 1:], scales),
    )
    assert torch.equal(out, plain[:, : out.shape[1]])
    assert torch.equal(caches[1].float(), caches[0].float())
    assert caches[1].float().any()


@pytest.mark.parametrize("change", ["dtype", "out", "places", "blocks", "scales", "several"])
def test_targets_that_do_not_fit_are_refused(change: str, kernel_device: torch.device) -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=kernel_device)

    slots = CacheSlots(
        zeros(3 if change == "places" else 2, dtype=torch.int32),
        zeros(2, 4, 1, 8, 16, dtype=torch.float16 if change == "blocks" else torch.float32),
        zeros(1) if change == "scales" else None,
    )
    types = {"dtype": torch.float16, "several": torch.int8}
    with pytest.raises(ValueError, match="expected"):
        w8a8(
            zeros(2, 32, dtype=torch.int8),
            zeros(2),
            zeros(64, 32, dtype=torch.int8),
            zeros(64),
            zeros(2, 31 if change == "out" else 64, dtype=types.get(change, torch.float32)),
            config=W8a8Config(16, 32, 32, 4, 2),
            next_input=NextInput(zeros(), zeros(2)) if change == "several" else None,
            add_to_out=change in ("dtype", "several"),
            cache=None if change == "dtype" else slots,
        )
