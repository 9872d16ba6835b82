"""A session executed by PyTorch: the default on a CPU, and the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from itertools import chain

import torch

from gpt.comm import Communicator, NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.kv_cache import KvCache, kv_scales
from gpt.engine.step import ContextStep, GenerationStep, PagedStep, Step
from gpt.engine.torch_executor import TorchOps
from gpt.mapping import Mapping
from gpt.network.gpt import forward
from gpt.runtime.limits import check_start
from gpt.runtime.shard_logits import gather_logits
from gpt.runtime.shared_beginnings import SharedBeginnings, copy_rows
from gpt.runtime.virtual_tokens import VirtualTokens


class TorchSession:
    """See gpt.runtime.session.Session.  `ops.trace` may be set to a dict to keep named intermediate results."""

    _ops_class: type[TorchOps] = TorchOps

    def __init__(
        self,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        comm: Communicator | None = None,
    ):
        """weights: as `gpt.engine.weights.engine_tensors` makes them, already on `device`.  comm: to the other ranks of
        `mapping`."""
        self.comm = comm or NullCommunicator()
        self.model = model
        self.build = build
        self.mapping = mapping
        self.device = torch.device(device)
        self.ops = self._ops_class(
            model, mapping, weights, fused=build.fused_attention, comm=self.comm, quant=build.quant
        )
        self._dtype = weights["model.wte"].dtype
        self._kv_scales = kv_scales(weights, model)
        self.cache: KvCache | None = None
        self.pool: KvCache | None = None
        self._num_best: int | None = None
        self._lengths: list[int] = []
        self._positions = torch.empty(0)
        self._beginnings = SharedBeginnings([])

    def exchange_through(self, comm: Communicator) -> None:
        """What the network's sums go through from now on, for measuring what they cost."""
        self.ops.comm = comm

    def start(self, batch_size: int, max_seq_len: int) -> None:
        check_start(self.model, self.build, batch_size, max_seq_len)
        cache = self.cache
        if cache is None or (cache.num_blocks, cache.tokens_per_block) != (batch_size, max_seq_len):
            self.cache = None  # the old one is gone before the new one is made
            self.cache = self._make_cache(batch_size, max_seq_len)
        self._num_best = None
        self._lengths = []

    def _make_cache(self, num_blocks: int, tokens_per_block: int) -> KvCache:
        return KvCache.empty(
            self.model,
            self.build,
            self.mapping,
            self.device,
            num_blocks=num_blocks,
            tokens_per_block=tokens_per_block,
            scales=self._kv_scales,
        )

    def limit_logits(self, num_best: int | None) -> None:
        self._num_best = num_best

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        self._set_lengths(prompts)
        packed = self.build.remove_input_padding or len(set(self._lengths)) == 1
        step = _packed_step(prompts, self.device) if packed else _padded_step(prompts, self.device)
        if virtual is not None:
            step = self._with_table(step, virtual)
        return self._run(step)

    def _set_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        self._lengths = [len(prompt) for prompt in prompts]
        self._positions = torch.tensor(self._lengths, dtype=torch.int32, device=self.device)
        self._beginnings = SharedBeginnings(self._lengths)

    def all_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Like `context`, with the logits after every token: [N, V], the prompts one after the other."""
        self._lengths = [len(prompt) for prompt in prompts]
        self._positions = torch.tensor(self._lengths, dtype=torch.int32, device=self.device)
        step = _packed_step(prompts, self.device)
        return self._run(dataclasses.replace(step, last=torch.arange(len(step.ids), device=self.device)))

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        longest = max(self._lengths)
        step = GenerationStep(
            ids=ids.to(torch.int32),
            positions=self._positions,
            max_position=longest,
            uniform=min(self._lengths) == longest,
        )
        logits = self._run(step)
        self._lengths = [length + 1 for length in self._lengths]
        self._positions = self._positions + 1
        self._beginnings.grow()
        return logits

    def reorder(self, sources: Sequence[int]) -> None:
        if self.cache is None or len(sources) > self.cache.num_blocks:
            raise RuntimeError("start makes room for the rows of reorder")
        with torch.inference_mode():
            copy_rows(self.cache.blocks, self._beginnings.reorder(sources))
        self._lengths = [self._lengths[source] for source in sources]
        self._positions = self._positions[torch.tensor(sources, device=self.device)]

    def prompt_logits(
        self, prompt: Sequence[int], places: Sequence[int], virtual: VirtualTokens | None = None
    ) -> torch.Tensor:
        step = dataclasses.replace(_packed_step([prompt], self.device), last=torch.tensor(places, device=self.device))
        return self._run(step if virtual is None else self._with_table(step, virtual))

    def _with_table(self, step: ContextStep, virtual: VirtualTokens) -> ContextStep:
        table = virtual.table.to(self.device, self._dtype).flatten(0, 1)
        first_rows = torch.tensor(virtual.tasks, dtype=torch.int32, device=self.device) * virtual.num_tokens
        counts = torch.tensor(step.lengths, device=self.device)
        if step.padded:
            counts.fill_(max(step.lengths))
        return dataclasses.replace(step, prompt_table=table, first_row=first_rows.repeat_interleave(counts))

    def _run(self, step: ContextStep | GenerationStep) -> torch.Tensor:
        if self.cache is None:
            raise RuntimeError("start comes before context and generation")
        return self._forward(step, self.cache)

    def _forward(self, step: Step, cache: KvCache) -> torch.Tensor:
        with torch.inference_mode():
            self.ops.begin(step, cache)
            shard = forward(self.ops, self.model, self.mapping, gather=False)
            return gather_logits(shard, self.model, self.mapping, self.comm, self._num_best)

    def start_paged(self, num_blocks: int, tokens_per_block: int) -> None:
        self._num_best = None
        pool = self.pool
        if pool is None or (pool.num_blocks, pool.tokens_per_block) != (num_blocks, tokens_per_block):
            self.cache = self.pool = None  # the old ones are gone before the new one is made
            self.pool = self._make_cache(num_blocks, tokens_per_block)

    def run_paged(self, step: PagedStep) -> torch.Tensor:
        return self._forward(step, self._pool())

    def _pool(self) -> KvCache:
        if self.pool is None:
            raise RuntimeError("start_paged comes before run_paged")
        return self.pool


def _packed_step(prompts: Sequence[Sequence[int]], device: torch.device) -> ContextStep:
    lengths = tuple(len(prompt) for prompt in prompts)
    positions = list(chain.from_iterable(range(length) for length in lengths))
    return ContextStep(
        ids=torch.tensor(list(chain.from_iterable(prompts)), dtype=torch.int32, device=device),
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
        last=torch.tensor(lengths, device=device).cumsum(0) - 1,
        lengths=lengths,
        padded=len(set(lengths)) == 1,
    )


def _padded_step(prompts: Sequence[Sequence[int]], device: torch.device) -> ContextStep:
    lengths = tuple(len(prompt) for prompt in prompts)
    width = max(lengths)
    rows = [
        list(prompt) + [0] * (width - len(prompt)) for prompt in prompts
    ]  # any valid id: padding is never looked at
    row_starts = torch.arange(len(prompts), device=device) * width
    return ContextStep(
        ids=torch.tensor(rows, dtype=torch.int32, device=device).flatten(),
        positions=torch.arange(width, dtype=torch.int32, device=device).repeat(len(prompts)),
        last=row_starts + torch.tensor(lengths, device=device) - 1,
        lengths=lengths,
        padded=True,
    )
