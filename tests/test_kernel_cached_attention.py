"""gpt/kernels/cached_attention.py beside the same written plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from engines import relative_error
from kernel_inputs import TOLERANCE, normal

from gpt.kernels.attention_blocks import Rotary
from gpt.kernels.cached_attention import cached_attention, default_config, reference
from gpt.kernels.launch import INTERPRETED
from gpt.quant import to_int8

# Heads, key/value heads, head size: one of each per head, a size that is no power of two, all heads sharing, pairs.
HEADS = {"multi-head": (3, 3, 64), "odd size": (2, 2, 40), "multi-query": (8, 1, 64), "grouped": (6, 2, 32)}
SLOTS = 90
# As in test_kernel_attention: weights of the softmax are rounded to half precision for the matrix units.
BOUND = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(
    heads: tuple[int, int, int],
    past: tuple[int, ...],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rotary_dim: int = 0,
    quantized: bool = False,
    block_m: int | None = None,
) -> None:
    num_heads, num_kv_heads, size = heads
    shape = (len(past), num_kv_heads, SLOTS, size)
    qkv = normal(len(past), num_tokens, num_heads + 2 * num_kv_heads, size, device=device, dtype=dtype)
    keys, values = (normal(*shape, device=device, dtype=dtype) for _ in range(2))
    kv_scale = None
    if quantized:
        kv_scale = torch.tensor([0.0107, 0.0193], device=device)  # no step is half a float16
        keys, values = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for _ in range(2))
    angles = torch.rand((SLOTS, rotary_dim // 2), device=device) * 6
    rotary = Rotary(angles.cos(), angles.sin()) if rotary_dim else None
    places = (qkv, torch.tensor(past, dtype=torch.int32, device=device), keys, values)
    expected, new_keys, new_values = reference(*places, scale=0.3, rotary=rotary, kv_scale=kv_scale)
    config = default_config(size, dtype.itemsize, prompts=num_tokens > 1)
    config = config if block_m is None else replace(config, block_m=block_m)
    out = torch.full((len(past), num_tokens, num_heads, size), torch.nan, device=device, dtype=dtype)
    cached_attention(*places, out, scale=0.3, config=config, rotary=rotary, kv_scale=kv_scale)
    assert relative_error(out, expected) < BOUND[dtype]
    # The rotation is computed in float32: a value beside a rounding boundary may go to the other side.
    for found, wanted in ((keys, new_keys), (values, new_values)):
        if quantized:
            assert int((found.int() - wanted.int()).abs().max()) <= 1
            assert int((found != wanted).sum()) <= 2
        else:
            assert relative_error(found, wanted) < TOLERANCE[dtype] / 4


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_heads_and_caches(heads: tuple[int, int, int], quantized: bool, kernel_device: torch.device) -> None:
    # A prompt, a step, and tokens behind a past that ends within a block.
    for past, num_tokens in (((0, 0), 21), ((37, 5), 1), ((70, 0), 19)):
        check(heads, past, num_tokens, kernel_device, torch.float32, quantized=quantized, block_m=16)


# The interpreter multiplies bfloat16 matrices bit pattern by bit pattern.
@pytest.mark.parametrize("dtype", [dtype for dtype in BOUND if dtype != torch.bfloat16 or not INTERPRETED])
@pytest.mark.parametrize("rotary_dim", [0, 24])
def test_types_and_rotation(dtype: torch.dtype, rotary_dim: int, kernel_device: torch.device) -> None:
    for past, num_tokens in (((0,), 67), ((89,), 1)):
        check(HEADS["grouped"], past, num_tokens, kernel_device, dtype, rotary_dim=rotary_dim)
        check(HEADS["grouped"], past, num_tokens, kernel_device, dtype, rotary_dim=rotary_dim, quantized=True)


def test_the_reference_is_causal_attention() -> None:
    qkv = normal(2, 7, 6, 16, device=torch.device("cpu")).double()
    keys = torch.zeros(2, 2, 9, 16, dtype=torch.float64)
    out, _, _ = reference(qkv, torch.zeros(2, dtype=torch.int32), keys, keys.clone(), scale=0.25)
    q, k, v = qkv.transpose(1, 2).split([2, 2, 2], 1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_prompts_see_themselves_unquantised_and_steps_what_is_stored() -> None:
    qkv = normal(1, 1, 3, 16, device=torch.device("cpu"))
    scale = torch.tensor([0.5, 0.5])
    keys = torch.zeros(1, 1, 9, 16, dtype=torch.int8)
    first, _, _ = reference(qkv, torch.tensor([0]), keys, keys, scale=1.0, kv_scale=scale)
    torch.testing.assert_close(first[0, 0, 0], qkv[0, 0, 2].double())
    keys[:, :, 0] = -100  # so far away that nothing of the past is seen
    qkv[:, :, :2] = qkv[:, :, :2].abs() + 1
    later, _, _ = reference(qkv, torch.tensor([1]), keys, keys, scale=1.0, kv_scale=scale)
    torch.testing.assert_close(later[0, 0, 0], (to_int8(qkv[0, 0, 2], scale[1]).double() * 0.5))


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    config = default_config(16, 4, prompts=False)
    qkv = normal(2, 1, 3, 16, device=kernel_device)
    past = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    keys, out = qkv.new_zeros(2, 1, 9, 16), qkv.new_zeros(2, 1, 1, 16)
    with pytest.raises(ValueError, match="past: found"):
        cached_attention(qkv, past[:1], keys, keys, out, scale=1.0, config=config)
    with pytest.raises(ValueError, match=r"keys: found torch.int8 and no scale"):
        cached_attention(qkv, past, keys.to(torch.int8), keys.to(torch.int8), out, scale=1.0, config=config)
