"""One step's inputs, the same for every executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ContextStep:
    """Whole prompts into an empty cache.

    Either padded, N = B * S with rows of S = max(lengths) and the padding on the right, or packed, N = sum(lengths).
    Padding tokens are computed and never looked at: a causal mask keeps them out of real rows, and the cache slots they
    reach are overwritten by the tokens generated later.

    ids, positions: [N] int32.  lengths: the prompts' own lengths, B of them.  last: [B] int64, the tokens of N
    whose logits are wanted: where each prompt ends, or any others.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    lengths: tuple[int, ...]
    padded: bool
    prompt_table: torch.Tensor | None = None
    first_row: torch.Tensor | None = None


@dataclass(frozen=True)
class GenerationStep:
    """One new token per sequence.

    ids, positions: [B] int32; a position is also the cache slot that the token's K and V go to.  max_position: the
    largest of them, known on the host.  uniform: all positions are equal.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    max_position: int
    uniform: bool


Step = ContextStep | GenerationStep
