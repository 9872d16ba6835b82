"""From the logits of each rank's part of the vocabulary to logits that every rank has: all of them, or the best."""

from __future__ import annotations

import torch

from gpt.comm import Communicator
from gpt.config import ModelConfig
from gpt.mapping import Mapping

# Dividing by a temperature may make equal what was not; so near, values count as equal. In units of float32's epsilon.
_NEAR = 4.0


def gather_logits(
    shard: torch.Tensor, model: ModelConfig, mapping: Mapping, comm: Communicator, num_best: int | None
) -> torch.Tensor:
    """Logits [B, V] from this rank's [B, V padded / R] float32, the same on every rank.

    num_best: None for all of them.  Otherwise at least that many of each row are there, all that equal the last of them
    included, and the rest is -inf: greedy choice and top-k filters find what they would find among all.
    """
    size = shard.shape[-1]
    # Less than half of the traffic, or it is not worth a sort.
    if mapping.world_size == 1 or num_best is None or 4 * (num_best + 1) > size:
        whole = shard if mapping.world_size == 1 else comm.all_gather(shard, -1)
        return whole[:, : model.vocab_size]
    first = mapping.rank * size
    num_words = min(max(model.vocab_size - first, 0), size)
    if num_words < size:
        shard = shard.clone()
        shard[:, num_words:] = -torch.inf  # padding, which is never chosen
    if num_best == 1:
        values, ids = shard.max(dim=-1, keepdim=True)  # the lowest id of equal ones
    else:
        values, ids = shard.topk(num_best + 1, dim=-1)
    # One exchange: the bits of the values beside the ids.
    packed = torch.stack([values.view(torch.int32), (ids + first).to(torch.int32)], dim=-1)  # [B, k, 2]
    gathered = comm.all_gather(packed, 1)  # [B, R*k, 2]
    values = gathered[..., 0].contiguous().view(torch.float32)
    if num_best > 1 and _may_hide_equals(values, num_best, mapping.world_size):
        return comm.all_gather(shard, -1)[:, : model.vocab_size]
    result = torch.full((len(shard), size * mapping.world_size), -torch.inf, device=shard.device)
    return result.scatter_(1, gathered[..., 1].long(), values)[:, : model.vocab_size]


def _may_hide_equals(values: torch.Tensor, num_best: int, num_ranks: int) -> bool:
    """Whether a rank may have more logits as large as the last one wanted than it has shown: values [B, R * (k + 1)],
    each rank's in descending order.  The same answer on all ranks, which have the same values."""
    wanted = values.topk(num_best, dim=-1).values[:, -1:]  # [B, 1]
    unseen = values.view(len(values), num_ranks, num_best + 1)[..., -1]  # [B, R], bounds of what was not shown
    margin = _NEAR * torch.finfo(torch.float32).eps * wanted.abs()
    return bool((unseen >= wanted - margin).any())
