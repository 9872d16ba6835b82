"""All ranks of a tensor-parallel model in one process: each operation runs on every rank, the all-reduce really
adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig
from gpt.engine.torch_executor import TorchOps
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping
from gpt.network.gpt import forward
from gpt.quant import FLOAT, QuantConfig
from gpt.runtime import torch_session

Ranks = list[torch.Tensor]


class ShardedOps:
    """gpt.network.ops.Ops over one tensor per rank."""

    def __init__(self, ranks: Sequence[TorchOps]):
        self.ranks = ranks

    def __getattr__(self, operation: str) -> Any:
        def on_every_rank(*args: Any, **options: Any) -> Ranks:
            results = []
            for rank, ops in enumerate(self.ranks):
                own = [arg[rank] if isinstance(arg, list) else arg for arg in args]
                results.append(getattr(ops, operation)(*own, **options))
            return results

        return on_every_rank

    def all_reduce(self, x: Ranks) -> Ranks:
        total = torch.stack(x).sum(0)
        return [total.clone() for _ in x]

    def all_gather(self, x: Ranks) -> Ranks:
        whole = torch.cat(x, dim=-1)
        return [whole.clone() for _ in x]


def sharded_logits(
    folder: Path, prompts: Sequence[Sequence[int]], new: Sequence[int], quant: QuantConfig = FLOAT
) -> torch.Tensor:
    """Logits [2B, V] of the context step and of one generation step with the tokens `new`, from every rank of a folder;
    fails where the ranks disagree."""
    checkpoint = Checkpoint.open(folder)
    model, world_size = checkpoint.model, checkpoint.world_size
    build = BuildConfig(dtype="float32", world_size=world_size, gpt_attention_plugin="float32", quant=quant)
    sessions = []
    for rank in range(world_size):
        mapping = Mapping(world_size, rank)
        weights = dict(engine_tensors(model, build, mapping, checkpoint))
        session = torch_session.TorchSession(model, build, mapping, weights)
        session.start(len(prompts), max(map(len, prompts)) + 1)
        sessions.append(session)
    together = ShardedOps([session.ops for session in sessions])
    steps: list[Ranks] = []
    original = torch_session.forward
    try:
        # Every session prepares its own step and cache; the last one to ask runs the network for all.
        for call in ("context", "generation"):
            asked: list[int] = []

            def wait(ops: Any, *_: Any, asked: list[int] = asked, **__: Any) -> torch.Tensor:
                asked.append(1)
                if len(asked) == world_size:
                    steps.append(forward(together, model, Mapping(world_size)))
                return torch.empty(len(prompts), model.vocab_size)

            setattr(torch_session, "forward", wait)  # noqa: B010
            for session in sessions:
                getattr(session, call)(prompts if call == "context" else torch.tensor(new))
    finally:
        torch_session.forward = original
    for ranks in steps:
        for logits in ranks[1:]:
            torch.testing.assert_close(logits, ranks[0])
    return torch.cat([ranks[0][:, : model.vocab_size] for ranks in steps])
