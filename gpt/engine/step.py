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


@dataclass(frozen=True)
class PagedStep:
    """New tokens of several sequences, whatever their pasts: whole prompts, parts of prompts, one token each, drafts.

    ids, positions: [N] int32, N = sum(num_new), sequence after sequence; a position is also the sequence's cache slot.
    wanted: [K] int64, which of the N tokens' logits are asked for, any number of a sequence's.  num_new, num_past: per
    sequence, new tokens (at least one) and tokens whose K and V are in the cache already.  block_table: [B, M] int32;
    slot p of sequence b is in block block_table[b, p // tokens_per_block], at p % tokens_per_block.  Unused entries
    name any block that exists.  prompt_table [rows, E], first_row [N] int32: as in a ContextStep.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    wanted: torch.Tensor
    num_new: tuple[int, ...]
    num_past: tuple[int, ...]
    block_table: torch.Tensor
    prompt_table: torch.Tensor | None = None
    first_row: torch.Tensor | None = None


@dataclass(frozen=True)
class AheadStep:
    """`num_steps` steps of one token each over a paged cache, in numbers of the host: every sequence appends its token,
    then the likeliest ones.

    ids, num_past: per sequence, the token to begin with and its position.  ends: the position that a sequence stays at
    when it comes there; what it says from then on means nothing.  tables: its blocks, enough for the positions before.
    """

    ids: list[int]
    num_past: list[int]
    ends: list[int]
    tables: list[list[int]]
    num_steps: int


Step = ContextStep | GenerationStep | PagedStep
