"""The floating-point types of weights and activations by their command-line names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt.errors import ConfigError

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "int32": 4}
# FasterTransformer writes fp32/fp16; PyTorch users type the short names.
_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "half": "float16"}


def canonical_dtype(name: str) -> str:
    """'fp16' -> 'float16'.  Raises ConfigError for anything that is not a float type of a model."""
    result = _ALIASES.get(name, name)
    if result not in FLOAT_DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", found=name, allowed=", ".join((*FLOAT_DTYPES, *_ALIASES)))
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> 'float16'."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)
