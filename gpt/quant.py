"""What is quantised in an engine, and the formulas, written plainly: every kernel is compared with these.

Weights are [out, in] here, activations [N, in].  A scale is always the value of one integer step (or of 1.0 in FP8), so
that a number is `integer * scale`.  Rounding is to the nearest, ties to even, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.errors import ConfigError, Problems

if TYPE_CHECKING:
    import torch

WEIGHT_TYPES = ("int8", "int4", "fp8")
ACTIVATION_SCALES = ("per_tensor", "per_token")
CACHE_TYPES = ("int8", "fp8")
GROUP_SIZES = (32, 64, 128, 256)
# Bits of the original's QuantMode, the later numbering, which has a bit for groups.
_BITS = {
    "int4_weights": 1,
    "int8_weights": 2,
    "activations": 4,
    "per_channel": 8,
    "per_token": 16,
    "per_group": 32,
    "int8_kv_cache": 64,
    "fp8_kv_cache": 128,
    "fp8_qdq": 256,
}
INT8_MAX = 127
FP8_MAX = 448.0  # the largest float8_e4m3fn
SMALLEST_ROW_MAX = 1e-6  # rows of zeros have a scale too
# From the largest weight clipped by a quarter to no clipping at all, also of a positive one.
_INT4_FACTORS = (0.8, 0.86, 0.92, 1.0, 1.07, 8 / 7)


@dataclass(frozen=True)
class QuantConfig:
    """How the products of the layers and the cache are quantised; head, embeddings, norms and biases stay float.

    weights: None for float.  activations: None where only weights are quantised; else the inputs of the products are
    too, by one calibrated scale (per_tensor) or one per row found at run time (per_token).  int8 weights with
    activations are SmoothQuant, from the checkpoint's int8 files; per_channel chooses those with one scale per output.
    group_size: inputs that share a scale in int4, 0 for all of them.  smoothers: the checkpoint divides the inputs of
    dense and proj by a vector.
    """

    weights: str | None = None
    activations: str | None = None
    per_channel: bool = False
    group_size: int = 0
    kv_cache: str | None = None
    smoothers: bool = False

    def __post_init__(self) -> None:
        problems = Problems()
        for name, allowed in (("weights", WEIGHT_TYPES), ("activations", ACTIVATION_SCALES), ("kv_cache", CACHE_TYPES)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                problems.add(f"{name}: found {value!r}, allowed: none, {', '.join(allowed)}")
        if self.activations and self.weights not in ("int8", "fp8"):
            problems.add(f"activations {self.activations} with {self.weights or 'float'} weights, allowed: int8, fp8")
        if self.weights == "fp8" and not self.activations:
            problems.add("fp8 weights without a scale for activations, allowed: " + ", ".join(ACTIVATION_SCALES))
        if self.per_channel and not self.smooth_quant:
            problems.add("per_channel: belongs to SmoothQuant; other weights always have a scale per output")
        if self.smoothers and not self.smooth_quant:
            problems.add("smoothers: belong to SmoothQuant")
        if self.group_size and self.weights != "int4":
            problems.add(f"group_size {self.group_size} with {self.weights or 'float'} weights, allowed: int4")
        if self.group_size not in (0, *GROUP_SIZES):
            problems.add(f"group_size: found {self.group_size}, allowed: 0, {', '.join(map(str, GROUP_SIZES))}")
        problems.raise_if_any(ConfigError, "the quantisation is not valid")

    @property
    def smooth_quant(self) -> bool:
        return self.weights == "int8" and self.activations is not None

    @property
    def weight_only(self) -> bool:
        return self.weights in ("int8", "int4") and self.activations is None

    @property
    def quant_mode(self) -> int:
        """The original's bits, for config.json."""
        present = {
            "int4_weights": self.weights == "int4",
            "int8_weights": self.weights == "int8",
            "activations": self.smooth_quant,
            "per_channel": self.per_channel,
            "per_token": self.smooth_quant and self.activations == "per_token",
            "per_group": self.group_size > 0,
            "int8_kv_cache": self.kv_cache == "int8",
            "fp8_kv_cache": self.kv_cache == "fp8",
            "fp8_qdq": self.weights == "fp8",
        }
        return sum(_BITS[name] for name, here in present.items() if here)

    def describe(self) -> str:
        """'int4 weights in groups of 64, int8 cache'; '' for a float engine."""
        parts = []
        if self.smooth_quant:
            channel = "per-channel" if self.per_channel else "per-tensor"
            parts.append(f"SmoothQuant {channel} weights, {_spoken(self.activations)} activations")
        elif self.weights == "fp8":
            parts.append(f"fp8 weights and {_spoken(self.activations)} activations")
        elif self.weights:
            parts.append(f"{self.weights} weights" + (f" in groups of {self.group_size}" if self.group_size else ""))
        if self.kv_cache:
            parts.append(f"{self.kv_cache} cache")
        return ", ".join(parts)


FLOAT = QuantConfig()


def _spoken(scale: str | None) -> str:
    return (scale or "").replace("_", "-")


def quantize_weight_int8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> int8 [out, in] and scale [out] of `dtype`: the largest of a row over 128, clipped at 127."""
    import torch

    scale = _nonzero((weight.float().abs().amax(1) / 128).to(dtype))
    steps = (weight.float() / scale.float()[:, None]).round_().clamp_(-128, 127)
    return steps.to(torch.int8), scale


def quantize_weight_int4(
    weight: torch.Tensor, dtype: torch.dtype, group_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> packed uint8 [out, in / 2] and scale of `dtype`, [out] or [out, in / group_size].

    A whole row's scale is its largest over 8, clipped at 7.  A group's is that times whichever of `_INT4_FACTORS` has
    the least squared error.  The low four bits of a byte are the even input.
    """
    import torch

    groups = weight.float().unflatten(1, (-1, group_size or weight.shape[1]))  # [out, groups, group]
    scale = _nonzero((groups.abs().amax(2, keepdim=True) / 8).to(dtype))
    if group_size:
        candidates = torch.stack([(scale.float() * factor).to(dtype) for factor in _INT4_FACTORS])
        errors = torch.stack([(_int4_steps(groups, each) * each - groups).square().sum(2) for each in candidates])
        scale = candidates.gather(0, errors.argmin(0)[None, :, :, None])[0]
    steps = _int4_steps(groups, scale).flatten(1).to(torch.int8)
    packed = (steps[:, 0::2] & 15) | (steps[:, 1::2] << 4)
    return packed.view(torch.uint8), scale[:, :, 0] if group_size else scale[:, 0, 0]


def _int4_steps(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / scale.float()).round_().clamp_(-8, 7)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2] -> int8 [out, in], -8 to 7."""
    import torch

    both = packed.view(torch.int8)
    return torch.stack([(both << 4) >> 4, both >> 4], dim=2).flatten(1)


def dequantize_weight(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """steps [out, in] (int8 or FP8; int4 unpacked), scale [out] or [out, groups] -> float32 [out, in]."""
    groups = steps.float().unflatten(1, (scale.shape[1] if scale.dim() == 2 else 1, -1))
    return (groups * scale.float().view(len(scale), -1, 1)).flatten(1)


def quantize_weight_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> float8_e4m3fn [out, in] and float32 scale [out], the largest of a row over 448."""
    scale = _nonzero(weight.float().abs().amax(1) / FP8_MAX)
    return to_fp8(weight, scale[:, None]), scale


def row_scales(x: torch.Tensor, largest: float) -> torch.Tensor:
    """x [N, in] -> float32 [N, 1]: each row's largest magnitude over `largest`, which is 127 or 448."""
    return x.float().abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ROW_MAX) / largest


def to_int8(x: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """round(x / scale), saturated at -128 and 127: int8, or the same integers in `dtype`."""
    import torch

    return (x.float() * (1 / scale)).round_().clamp_(-128, 127).to(dtype or torch.int8)


def to_fp8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x / scale as float8_e4m3fn, saturated at 448, since the format would make NaN of more."""
    import torch

    return (x.float() * (1 / scale)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Rows of zeros, and those whose scale the dtype rounds to zero, get the dtype's smallest normal number."""
    import torch

    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
