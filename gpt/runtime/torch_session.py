"""A session executed by PyTorch: the default on a CPU, and the oracle."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch

from gpt.comm import Communicator, NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.host_lists import on_device
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
        *,
        batch_invariant: bool = False,
    ):
        """weights: as `gpt.engine.weights.engine_tensors` makes them, already on `device`.  comm: to the other ranks of
        `mapping`.  batch_invariant: see gpt.runtime.execution; here each sequence is computed alone."""
        self.comm = comm or NullCommunicator()
        self.model = model
        self.build = build
        self.mapping = mapping
        self.batch_invariant = batch_invariant
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
        if not self.batch_invariant:
            return self._context(prompts, virtual, self._cache())
        alone = [
            self._context(
                [prompt], None if virtual is None else virtual.of_prompts([row]), self._cache().of_sequence(row)
            )
            for row, prompt in enumerate(prompts)
        ]
        return torch.cat(alone)

    def _context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None, cache: KvCache) -> torch.Tensor:
        packed = self.build.remove_input_padding or len(set(map(len, prompts))) == 1
        step = _packed_step(prompts, self.device) if packed else _padded_step(prompts, self.device)
        return self._forward(step if virtual is None else self._with_table(step, virtual), cache)

    def _set_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        self._lengths = [len(prompt) for prompt in prompts]
        self._positions = torch.tensor(self._lengths, dtype=torch.int32, device=self.device)
        self._beginnings = SharedBeginnings(self._lengths)

    def all_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Like `context`, with the logits after every token: [N, V], the prompts one after the other."""
        self._set_lengths(prompts)
        parts = [[prompt] for prompt in prompts] if self.batch_invariant else [prompts]
        steps = [_packed_step(part, self.device) for part in parts]
        return torch.cat(
            [self._run(replace(step, last=torch.arange(len(step.ids), device=self.device))) for step in steps]
        )

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(torch.int32)
        if self.batch_invariant:
            alone = [
                self._forward(
                    GenerationStep(ids[row : row + 1], self._positions[row : row + 1], length, uniform=True),
                    self._cache().of_sequence(row),
                )
                for row, length in enumerate(self._lengths)
            ]
            logits = torch.cat(alone)
        else:
            longest = max(self._lengths)
            uniform = min(self._lengths) == longest
            logits = self._run(GenerationStep(ids, self._positions, max_position=longest, uniform=uniform))
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
        step = replace(_packed_step([prompt], self.device), last=torch.tensor(places, device=self.device))
        return self._run(step if virtual is None else self._with_table(step, virtual))

    def _with_table(self, step: ContextStep, virtual: VirtualTokens) -> ContextStep:
        table = virtual.table.to(self.device, self._dtype).flatten(0, 1)
        first_rows = torch.tensor(virtual.tasks, dtype=torch.int32, device=self.device) * virtual.num_tokens
        counts = torch.tensor(step.lengths, device=self.device)
        if step.padded:
            counts.fill_(max(step.lengths))
        return replace(step, prompt_table=table, first_row=first_rows.repeat_interleave(counts))

    def _run(self, step: ContextStep | GenerationStep) -> torch.Tensor:
        return self._forward(step, self._cache())

    def _cache(self) -> KvCache:
        if self.cache is None:
            raise RuntimeError("start comes before context and generation")
        return self.cache

    def _forward(self, step: Step, cache: KvCache) -> torch.Tensor:
        with torch.inference_mode():
            self.ops.begin(step, cache)
            shard = forward(self.ops, self.model, self.mapping, gather=False)
            return gather_logits(shard, self.model, self.mapping, self.comm, self._num_best)

    def start_paged(self, num_blocks: int, tokens_per_block: int) -> None:
        self._num_best = None
        pool = self.pool
        if pool is None or pool.num_blocks < num_blocks or pool.tokens_per_block != tokens_per_block:
            self.cache = self.pool = None  # the old ones are gone before the new one is made
            self.pool = self._make_cache(num_blocks, tokens_per_block)

    @property
    def num_pool_blocks(self) -> int:
        return 0 if self.pool is None else self.pool.num_blocks

    def run_paged(self, step: PagedStep) -> torch.Tensor:
        if not self.batch_invariant:
            return self._forward(step, self._pool())
        lines = {token: line for line, token in enumerate(step.wanted.tolist())}
        parts = [paged_part(step, [row], lines)[0] for row in range(len(step.num_new))]
        return torch.cat([self._forward(part, self._pool()) for part in parts])

    def _pool(self) -> KvCache:
        if self.pool is None:
            raise RuntimeError("start_paged comes before run_paged")
        return self.pool


def paged_part(step: PagedStep, rows: Sequence[int], lines: Dict[int, int]) -> tuple[PagedStep, list[int]]:
    """The step of some of its sequences, in order, and which lines of the whole step's logits its own are.

    lines: by the place of a wanted token in the whole step; on the host, so that nothing waits for the device.
    """
    starts = list(accumulate(step.num_new, initial=0))
    places = [place for row in rows for place in range(starts[row], starts[row + 1])]
    device = step.ids.device
    picked = on_device(places, device, torch.int64)
    wanted = [index for index, place in enumerate(places) if place in lines]
    part = PagedStep(
        ids=step.ids[picked],
        positions=step.positions[picked],
        wanted=on_device(wanted, device, torch.int64),
        num_new=tuple(step.num_new[row] for row in rows),
        num_past=tuple(step.num_past[row] for row in rows),
        block_table=step.block_table[on_device(rows, device, torch.int64)],
        prompt_table=step.prompt_table,
        first_row=None if step.first_row is None else step.first_row[picked],
    )
    return part, [lines[places[index]] for index in wanted]


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
