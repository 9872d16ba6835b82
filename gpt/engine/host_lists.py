"""Numbers that the host made, on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of them on `device`.  The host does not wait for what a GPU is doing, as it would in `torch.tensor`."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
