"""Where gpt/kernels/w8a8.py stores what: beside the same product stored plainly, and what others then did with it."""

from __future__ import annotations

import pytest
import torch
from w8a8_checks import check_cache, check_stream

from gpt.kernels.quantize_rows import LARGEST
from gpt.kernels.store_cache import CacheSlots
from gpt.kernels.w8a8 import w8a8
from gpt.kernels.w8a8_config import W8a8Config
from gpt.kernels.w8a8_epilogue import NextInput

# The last tiles beyond both edges.
CONFIGS = {
    "narrow": W8a8Config(16, 32, 64, 4, 2),
    "wide": W8a8Config(32, 128, 64, 4, 2),
    "descriptors": W8a8Config(64, 64, 32, 4, 2, descriptors=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", LARGEST)
def test_result_added_to_the_stream(config: W8a8Config, steps: torch.dtype, kernel_device: torch.device) -> None:
    check_stream((75, 170, 144), config, steps, kernel_device)


# Heads, key/value heads, head size: tiles with queries and keys, with keys and values; odd sizes; one tile with all.
HEADS = {"multi-head": (3, 3, 64), "odd size": (2, 2, 40), "multi-query": (5, 1, 16), "grouped": (6, 2, 32)}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("queries_alone", [False, True])
def test_keys_and_values_go_to_the_cache(
    heads: tuple[int, int, int], stored: torch.dtype | None, queries_alone: bool, kernel_device: torch.device
) -> None:
    check_cache(37, heads, W8a8Config(16, 64, 32, 4, 2), stored, queries_alone, kernel_device)


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
