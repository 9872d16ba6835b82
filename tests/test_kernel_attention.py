"""gpt/kernels/attention.py beside the same written plainly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.attention import (
    AttentionConfig,
    decode_attention,
    default_config,
    reference,
    scratch_size,
)
from gpt.kernels.attention_blocks import Rotary
from gpt.kernels.launch import INTERPRETED

# Heads, key/value heads, head size: one of each per head, a size that is no power of two, all heads sharing, pairs.
HEADS = {"multi-head": (3, 3, 64), "odd size": (2, 2, 40), "multi-query": (8, 1, 64), "grouped": (6, 2, 32)}
# The first token, a place within a block of the cache, the last place.
POSITIONS = (0, 37, 95)
TOKENS_PER_BLOCK, BLOCKS = 16, 6
# float16 K and V go to the matrix units rounded to half precision softmax weights: 2^-11 of each term.
BOUND = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Step:
    qkv: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rotary: Rotary | None
    kv_scale: torch.Tensor | None


def make_step(
    heads: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rotary_dim: int,
    stored: torch.dtype | None,
) -> Step:
    """stored: the type of a quantised cache."""
    num_heads, num_kv_heads, size = heads
    batch = len(POSITIONS)
    blocks = torch.randperm(batch * BLOCKS, device=device).to(torch.int32)
    shape = (batch * BLOCKS, num_kv_heads, TOKENS_PER_BLOCK, size)
    keys, values = (normal(*shape, device=device, dtype=dtype) for _ in range(2))
    if stored:
        keys, values = (torch.randint(-127, 128, shape, device=device).float().to(stored) for _ in range(2))
    angles = torch.rand((BLOCKS * TOKENS_PER_BLOCK, rotary_dim // 2), device=device) * 6
    return Step(
        normal(batch, num_heads + 2 * num_kv_heads, size, device=device, dtype=dtype),
        torch.tensor(POSITIONS, dtype=torch.int32, device=device),
        blocks.view(batch, BLOCKS),
        keys,
        values,
        Rotary(angles.cos(), angles.sin()) if rotary_dim else None,
        torch.tensor([0.01, 0.02], device=device) if stored else None,
    )


def check(step: Step, num_heads: int, config: AttentionConfig, bound: float) -> None:
    batch, _, size = step.qkv.shape
    out = torch.empty((batch, num_heads, size), device=step.qkv.device, dtype=step.qkv.dtype)
    parts = torch.empty(max(1, scratch_size(batch, num_heads, size, config)), device=out.device)
    places = (step.qkv, step.positions, step.table, step.keys, step.values)
    expected, keys, values = reference(*places, scale=0.3, rotary=step.rotary, kv_scale=step.kv_scale)
    options = {"scale": 0.3, "config": config, "rotary": step.rotary, "kv_scale": step.kv_scale, "parts": parts}
    decode_attention(*places, out, **options)  # type: ignore[arg-type]
    assert relative_error(out, expected) < bound
    # The rotation is computed in float32: a value beside a rounding boundary may go to the other side.
    for found, wanted in ((step.keys, keys), (step.values, values)):
        if step.kv_scale is not None:
            differs = found.view(torch.int8) - wanted.view(torch.int8)  # neighbours in FP8 differ by one bit pattern
            assert int(differs.abs().max()) <= 1
            assert int(differs.count_nonzero()) <= 1
        else:
            assert relative_error(found, wanted) < TOLERANCE[step.qkv.dtype] / 4


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("rotary_dim", "stored"), [(0, None), (16, None), (16, torch.int8), (16, torch.float8_e4m3fn)])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_one_token_of_three_sequences(
    heads: tuple[int, int, int],
    rotary_dim: int,
    stored: torch.dtype | None,
    num_splits: int,
    kernel_device: torch.device,
) -> None:
    step = make_step(heads, kernel_device, torch.float16, rotary_dim=rotary_dim, stored=stored)
    check(step, heads[0], AttentionConfig(32, num_splits, 4), BOUND[torch.float16])


# Parts of several blocks of the past, and of one at most.
@pytest.mark.parametrize("config", [AttentionConfig(16, 1, 2), AttentionConfig(32, 3, 1)])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_one_block_of_the_cache_per_sequence(
    heads: tuple[int, int, int], config: AttentionConfig, kernel_device: torch.device
) -> None:
    step = make_step(heads, kernel_device, torch.float16, rotary_dim=8, stored=None)
    shape = (len(POSITIONS), heads[1], BLOCKS * TOKENS_PER_BLOCK, heads[2])
    step.keys, step.values = step.keys.view(shape), step.values.view(shape)
    step.table = torch.tensor([[2], [0], [1]], dtype=torch.int32, device=kernel_device)
    check(step, heads[0], config, BOUND[torch.float16])


# The interpreter multiplies bfloat16 matrices bit pattern by bit pattern; one head at a time goes without.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ("multi-head", "multi-query") for dtype in (torch.float32, torch.bfloat16)][
        : 3 if INTERPRETED else 4
    ],
)
def test_other_dtypes(kind: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    step = make_step(HEADS[kind], kernel_device, dtype, rotary_dim=8, stored=None)
    check(step, HEADS[kind][0], AttentionConfig(16, 2, 4), BOUND[dtype])


@pytest.mark.parametrize("change", ["out", "keys", "scale", "strides", "parts"])
def test_what_does_not_fit_is_refused(change: str, kernel_device: torch.device) -> None:
    step = make_step((2, 2, 32), kernel_device, torch.float16, rotary_dim=0, stored=None)
    out = torch.empty((3, 2, 33 if change == "out" else 32), device=kernel_device)
    keys = step.keys[:, :, :8] if change == "keys" else step.keys
    values = step.values.transpose(2, 3).contiguous().transpose(2, 3) if change == "strides" else step.values
    with pytest.raises(ValueError, match=r"found|expected"):
        decode_attention(
            step.qkv,
            step.positions,
            step.table,
            keys,
            values,
            out,
            scale=1.0,
            config=AttentionConfig(16, 2 if change == "parts" else 1, 4),
            kv_scale=torch.ones(2, device=kernel_device) if change == "scale" else None,
        )


def test_default_config_is_one_the_kernel_takes(kernel_device: torch.device) -> None:
    step = make_step((6, 2, 32), kernel_device, torch.float16, rotary_dim=16, stored=None)
    check(step, 6, default_config(3, 6, 2, BLOCKS * TOKENS_PER_BLOCK, kernel_device), BOUND[torch.float16])
