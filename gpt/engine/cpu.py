"""What the processor can do, for the choices that depend on it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def cpu_has(instructions: str) -> bool:
    """Whether the processor has `instructions`, one of PyTorch's names: avx512_vnni, amx_int8, amx_bf16, ..."""
    return bool(torch.cpu.get_capabilities().get(instructions))
