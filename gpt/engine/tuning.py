"""Which launch parameters each kernel gets: measured ones where there are any, good defaults else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpt.console import log
from gpt.files import write_text
from gpt.kernels import attention, gemv, skinny
from gpt.kernels.launch import TRITON_VERSION


@dataclass
class Tuning:
    """Launch parameters by shape, for one device; see `gpt.engine.autotune` for how they are found.

    gemvs: by (N, K).  skinnies: by (tokens, N, K, 1 where the reader adds partial sums).  attentions: by (B, H, G,
    slots of the cache).  batch_invariant: each row's sums have one order, whatever the number of rows and slots.
    """

    device: torch.device
    gemvs: dict[tuple[int, ...], gemv.GemvConfig] = field(default_factory=dict)
    skinnies: dict[tuple[int, ...], skinny.SkinnyConfig] = field(default_factory=dict)
    attentions: dict[tuple[int, ...], attention.AttentionConfig] = field(default_factory=dict)
    batch_invariant: bool = False

    def gemv(self, num_rows: int, num_columns: int, *, itemsize: int = 2) -> gemv.GemvConfig:
        """itemsize: bytes of a weight."""
        measured = self.gemvs.get((num_rows, num_columns))
        return measured or gemv.default_config(num_rows, num_columns, self.device, itemsize=itemsize)

    def skinny(
        self, num_tokens: int, num_rows: int, num_columns: int, *, splits: bool, itemsize: int = 2
    ) -> skinny.SkinnyConfig:
        """splits: whether the reader can add partial sums.  itemsize: bytes of a weight."""
        bucket = skinny.MAX_BLOCK_M if self.batch_invariant else token_bucket(num_tokens)
        config = self.skinnies.get((bucket, num_rows, num_columns, int(splits))) or skinny.default_config(
            bucket if self.batch_invariant else num_tokens,
            num_rows,
            num_columns,
            self.device,
            splits=splits,
            itemsize=itemsize,
        )
        return dataclasses.replace(config, block_m=bucket) if self.batch_invariant else config

    def attention(
        self, batch_size: int, num_heads: int, num_kv_heads: int, num_slots: int, *, integers: bool = False
    ) -> attention.AttentionConfig:
        """What was measured for the smallest cache that is no smaller: a session's is as long as its request, the one
        measured as long as the engine allows.  integers: whether integer weights follow."""
        if self.batch_invariant:
            return attention.invariant_config(num_heads, num_kv_heads)
        key = (batch_size, num_heads, num_kv_heads, num_slots)
        measured = [other for other in self.attentions if other[:3] == key[:3] and other[3] >= num_slots]
        if measured:
            return self.attentions[min(measured)]
        return attention.default_config(*key, self.device, integers=integers)

    def save(self, path: Path) -> None:
        """Writes what was measured, with the device and the compiler it holds for."""
        tables = {
            name: [[key, dataclasses.asdict(config)] for key, config in getattr(self, name).items()] for name in _KINDS
        }
        write_text(path, json.dumps({**_conditions(self.device), **tables}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Tuning:
        """What `save` wrote for this device and compiler; without any such, or for others, defaults and a line."""
        tuning = cls(device)
        if not path.is_file():
            return tuning
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
            if any(stored.get(name) != value for name, value in _conditions(device).items()):
                log.info(
                    "%s was measured elsewhere: %s", path, {name: stored.get(name) for name in _conditions(device)}
                )
                return tuning
            for name, kind in _KINDS.items():
                getattr(tuning, name).update({tuple(key): kind(**values) for key, values in stored[name]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is no record of launch parameters (%s); defaults are used", path, error)
            return cls(device)
        return tuning


_KINDS: dict[str, Any] = {
    "gemvs": gemv.GemvConfig,
    "skinnies": skinny.SkinnyConfig,
    "attentions": attention.AttentionConfig,
}


def _conditions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "triton": TRITON_VERSION}


def tuning_path(engine_folder: Path, device: torch.device) -> Path:
    """Where an engine keeps the launch parameters for a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return engine_folder / f"tuning-{name.replace(' ', '-')}.json"


def token_bucket(num_tokens: int) -> int:
    """The batch sizes that share launch parameters: 16, 32, 64 and above."""
    return 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
