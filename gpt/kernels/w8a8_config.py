"""How products of int8 and FP8 are launched: which kernel, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gpt.kernels.launch import (
    INTERPRETED,
    TRITON_VERSION,
    cdiv,
    next_power_of_2,
    num_multiprocessors,
    supports_dependent_launch,
)


@dataclass(frozen=True)
class W8a8Config:
    """descriptors: tiles are fetched through tensor descriptors, which need K to be a multiple of 16."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    descriptors: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """The kernel of `gpt.kernels.w8a8_hopper`, which needs K to be a multiple of 16 too.  by_tokens: programs that run
    at the same time share some tokens and take many rows of the weight, rather than all tokens and few rows."""

    by_tokens: bool
    split_k: ClassVar[int] = 1
    descriptors: ClassVar[bool] = True


def runs_hopper_kernel(device: torch.device) -> bool:
    """Its instructions are those of compute capability 9.0 alone, and its language may change with any version of
    Triton: it was compiled with these two, and has no interpreter."""
    known = TRITON_VERSION.startswith(("3.6.", "3.7."))
    return known and not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def default_config(
    num_tokens: int, num_rows: int, num_columns: int, device: torch.device, *, splits: bool
) -> W8a8Config | HopperConfig:
    """splits: whether the reader can add partial sums."""
    if num_tokens >= 1024 and num_columns % 16 == 0 and runs_hopper_kernel(device):
        # All tokens are shared as long as they stay in the L2 cache, of 50 MB, beside what else goes through it.
        return HopperConfig(by_tokens=num_tokens * num_columns > 32 << 20)
    if num_tokens > 128:
        num_warps, num_stages = (8, 4) if num_tokens < 1024 else (4, 3)
        descriptors = num_columns % 16 == 0 and (INTERPRETED or supports_dependent_launch(device))
        return W8a8Config(128, 128, 128, num_warps, num_stages, descriptors=descriptors)
    block_m = max(16, min(64, next_power_of_2(num_tokens)))
    programs = cdiv(num_rows, 32) * cdiv(num_tokens, block_m)
    split_k = 1
    while splits and programs * split_k < 2 * num_multiprocessors(device) and num_columns >= 1024 * split_k:
        split_k *= 2
    return W8a8Config(block_m, 32, 256, 4, 4, split_k)
