"""gpt/kernels/paged_attention.py beside the same written plainly."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from engines import relative_error
from kernel_inputs import normal

from gpt.kernels.launch import INTERPRETED
from gpt.kernels.paged_attention import default_config, paged_attention, query_tiles, reference

# As in test_kernel_cached_attention: heads, key/value heads, head size.
HEADS = {"multi-head": (3, 3, 64), "odd size": (2, 2, 40), "multi-query": (8, 1, 64), "grouped": (6, 2, 32)}
BOUND = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# (new tokens, past) of the sequences of a step: prompts alone, and what comes behind a past.
STEPS = {"prompts": ((37, 0), (1, 0), (70, 0)), "parts": ((5, 0), (19, 33), (40, 8), (2, 101))}


def check(
    heads: tuple[int, int, int],
    step: tuple[tuple[int, int], ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    per_block: int = 16,
    stored: torch.dtype | None = None,
) -> None:
    num_heads, num_kv_heads, size = heads
    num_new, num_past = zip(*step, strict=True)
    needed = [-(-(new + past) // per_block) for new, past in step]
    num_blocks = sum(needed) + 1
    free = torch.randperm(num_blocks).tolist()
    table = torch.zeros(len(step), max(needed), dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    qkv = normal(sum(num_new), num_heads + 2 * num_kv_heads, size, device=device, dtype=dtype)
    shape = (num_blocks, num_kv_heads, per_block, size)
    keys, values = (normal(*shape, device=device, dtype=dtype) for _ in range(2))
    kv_scale = None
    if stored is not None:
        kv_scale = torch.tensor([0.02, 0.03], device=device)
        keys, values = ((t.float() * 50).clamp(-127, 127).round().to(stored) for t in (keys, values))
    starts = accumulate(num_new[:-1], initial=0)
    sequences = torch.tensor(list(zip(starts, num_new, num_past, strict=True)), dtype=torch.int32, device=device)
    places = (sequences, table.to(device), keys, values)
    config = default_config(size, dtype.itemsize)
    tiles = query_tiles(num_new, num_past, num_heads // num_kv_heads, config.block_m)
    out = torch.full((sum(num_new), num_heads, size), torch.nan, device=device, dtype=dtype)
    on_device = torch.tensor(tiles, dtype=torch.int32, device=device)
    paged_attention(qkv, on_device, *places, out, scale=0.3, config=config, kv_scale=kv_scale)
    assert relative_error(out, reference(qkv, *places, scale=0.3, kv_scale=kv_scale)) < BOUND[dtype]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_heads_steps_and_caches(
    heads: tuple[int, int, int],
    step: tuple[tuple[int, int], ...],
    stored: torch.dtype | None,
    kernel_device: torch.device,
) -> None:
    check(heads, step, kernel_device, torch.float32, stored=stored)


@pytest.mark.parametrize("per_block", [4, 64, 100])
def test_blocks_smaller_and_larger_than_tiles(per_block: int, kernel_device: torch.device) -> None:
    check(HEADS["multi-head"], STEPS["parts"], kernel_device, torch.float32, per_block=per_block)


# The interpreter multiplies bfloat16 matrices bit pattern by bit pattern.
@pytest.mark.parametrize("dtype", [dtype for dtype in BOUND if dtype != torch.bfloat16 or not INTERPRETED])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_types(dtype: torch.dtype, stored: torch.dtype | None, kernel_device: torch.device) -> None:
    # Several tiles of queries; keys that all of a tile see and that some do.
    step = ((200, 0), (130, 70), (20, 257))
    check((2, 1, 64), step, kernel_device, dtype, stored=stored, per_block=64)
    if not INTERPRETED and dtype == torch.float16:
        for size in (80, 128, 256):
            check((2, 1, size), step, kernel_device, dtype, stored=stored, per_block=64)


def test_tiles_name_every_query_once_and_the_longest_first() -> None:
    tiles = query_tiles((5, 1, 9), (0, 40, 20), 2, 4)
    assert sorted(tiles) == [(0, 0), (0, 4), (0, 8), (1, 0), (2, 0), (2, 4), (2, 8), (2, 12), (2, 16)]
    assert tiles[0] == (1, 0)
    assert tiles[1] == (2, 16)
    assert tiles[-1] == (0, 0)


def test_the_reference_is_causal_attention() -> None:
    qkv = normal(7, 6, 16, device=torch.device("cpu")).double()
    keys, values = (qkv[:, part].transpose(0, 1)[None].contiguous() for part in (slice(2, 4), slice(4, 6)))
    for past in (0, 3):
        sequences = torch.tensor([[0, 7 - past, past]])
        found = reference(qkv[past:], sequences, torch.zeros(1, 1).int(), keys, values, scale=0.25)
        q, k, v = qkv.transpose(0, 1).split([2, 2, 2])
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
        torch.testing.assert_close(found, expected.transpose(0, 1)[past:])


def test_tiles_fit_what_a_card_has() -> None:
    for itemsize in (2, 4):
        for size in (16, 64, 80, 128, 256):
            config = default_config(size, itemsize)
            row_bytes = max(16, 1 << (size - 1).bit_length()) * itemsize
            assert (config.block_m + 2 * config.block_t * config.num_stages) * row_bytes <= 96 * 1024


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=kernel_device)

    qkv = normal(4, 3, 16, device=kernel_device)
    keys, out = qkv.new_zeros(2, 1, 9, 16), qkv.new_zeros(4, 1, 16)
    config = replace(default_config(16, 4), num_warps=1)
    with pytest.raises(ValueError, match="sequences: found"):
        paged_attention(qkv, ints(1, 2), ints(1, 2), ints(1, 1), keys, keys, out, scale=1.0, config=config)
    with pytest.raises(ValueError, match=r"keys: found torch.int8"):
        paged_attention(qkv, ints(1, 2), ints(1, 3), ints(1, 1), keys.char(), keys, out, scale=1.0, config=config)
