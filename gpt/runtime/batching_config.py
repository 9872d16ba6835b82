"""How an engine with a paged cache is used: the settings, checked at once.  Without torch, for command lines."""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config import BuildConfig
from gpt.errors import ConfigError, Problems

MAX_DRAFT_LEN = 64


@dataclass(frozen=True)
class BatchingConfig:
    """free_memory_fraction: of the device's free memory, how much the pool of cache blocks may take.  max_cache_tokens:
    slots of the pool, None for as many as a full batch of the longest sequences needs.  max_draft_len: tokens that are
    proposed at a time and checked in one step; 0 is off.

    Raises ConfigError listing all values out of range.
    """

    free_memory_fraction: float = 0.9
    max_cache_tokens: int | None = None
    max_draft_len: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        if not 0 < self.free_memory_fraction <= 1:
            problems.add(
                f"--kv_cache_free_gpu_memory_fraction {self.free_memory_fraction:g}: allowed are more than 0 up to 1"
            )
        if self.max_cache_tokens is not None and self.max_cache_tokens < 1:
            problems.add(f"--max_tokens_in_paged_kv_cache {self.max_cache_tokens}: allowed are 1 and above")
        if not 0 <= self.max_draft_len <= MAX_DRAFT_LEN:
            problems.add(f"--max_draft_len {self.max_draft_len}: allowed are 0 (off) to {MAX_DRAFT_LEN}")
        problems.raise_if_any(ConfigError, "these settings cannot be used")

    def contradictions(self, num_beams: int, *, batch_invariant: bool) -> list[str]:
        """What goes against a search with so many beams, and against results that are the same to the last bit."""
        if self.max_draft_len == 0:
            return []
        reasons = (
            (num_beams > 1, "beams: drafts are checked for one text"),
            (batch_invariant, "--batch_invariant: steps of several tokens, which check drafts, round otherwise"),
        )
        return [f"--max_draft_len {self.max_draft_len} with {reason}" for present, reason in reasons if present]

    def check_fits(self, build: BuildConfig) -> None:
        """Raises ConfigError for settings of a paged cache that the engine does not have."""
        if self != DEFAULT_BATCHING and not build.paged_kv_cache:
            raise ConfigError(
                "the engine has no paged cache",
                found="--max_draft_len, --kv_cache_free_gpu_memory_fraction or --max_tokens_in_paged_kv_cache",
                hint="build.py --paged_kv_cache makes one that has",
            )


DEFAULT_BATCHING = BatchingConfig()
