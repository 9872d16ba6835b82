"""A session on one GPU per rank: prompts by PyTorch's libraries, decode steps as CUDA graphs of our kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import replace
from itertools import accumulate

import torch

from gpt.comm import Communicator
from gpt.comm_nccl import NcclCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.cuda_ops import DecodeOps
from gpt.engine.cuda_prompt_ops import PromptOps
from gpt.engine.cuda_w8a8 import W8a8Linear
from gpt.engine.host_lists import on_device
from gpt.engine.kv_cache import KvCache, batch_bucket, cache_slots
from gpt.engine.step import AheadStep, PagedStep, Step
from gpt.engine.tuning import Tuning
from gpt.kernels.draw import Filters
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.decoder import Decoder, HostTokens
from gpt.runtime.limits import check_start
from gpt.runtime.prompt_graphs import PromptGraphs
from gpt.runtime.recording import Recorder
from gpt.runtime.sampling import Draws
from gpt.runtime.torch_session import TorchSession, paged_part
from gpt.runtime.virtual_tokens import VirtualTokens

# Steps that may be under way while the host still reads older tokens.
_LEAD = 3


def kernels_know(quant: QuantConfig, device: torch.device) -> bool:
    """Whether the card has the numbers of this engine: FP8 came with compute capability 8.9.  `TorchSession` takes
    all."""
    has_fp8 = "fp8" in (quant.weights, quant.kv_cache)
    return not has_fp8 or torch.cuda.get_device_capability(device) >= (8, 9)


class CudaSession(TorchSession):
    """See gpt.runtime.session.Session and PagedSession; `run_ahead` decodes without waiting for the host.

    graphs: whether steps are captured in CUDA graphs; without, the same kernels are launched one by one.
    batch_invariant: prompts alone, decode kernels with launch parameters that no batch changes.
    """

    _ops_class = PromptOps

    def __init__(
        self,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        weights: Dict[str, torch.Tensor],
        device: torch.device | str = "cuda",
        comm: Communicator | None = None,
        *,
        graphs: bool = True,
        tuning: Tuning | None = None,
        batch_invariant: bool = False,
    ):
        super().__init__(model, build, mapping, weights, device, comm, batch_invariant=batch_invariant)
        self.graphs = graphs and self.device.type == "cuda"
        self._decode_ops = DecodeOps(
            model,
            mapping,
            weights,
            replace(tuning or Tuning(self.device), batch_invariant=batch_invariant),
            max_seq_len=build.max_seq_len + cache_slots(1),
            comm=self.comm,
            products={name: each for name, each in self.ops.linears.items() if isinstance(each, W8a8Linear)},
        )
        self._decoders: dict[tuple[str, int], Decoder] = {}
        self._recorder = Recorder(self.device) if self.graphs else None
        self._prompts: PromptGraphs | None = None
        if self._recorder is not None and not batch_invariant:  # graphs pad prompts, and not from the first time on
            self._prompts = PromptGraphs(self._forward_whole, self._recorder)
        self._active: Decoder | None = None  # the one that holds the positions of the batch
        self._num_generated = 0  # since it does
        if isinstance(self.comm, NcclCommunicator):
            self.comm.before_leaving(self.release_graphs)

    @property
    def recording_seconds(self) -> float:
        """See gpt.runtime.session.RecordsSteps."""
        return 0.0 if self._recorder is None else self._recorder.seconds

    def release_graphs(self) -> None:
        """Forgets all that was recorded; the next step records it again."""
        self._forget("batch")
        self._forget("paged")

    def exchange_through(self, comm: Communicator) -> None:
        super().exchange_through(comm)
        self._decode_ops.comm = comm
        self.release_graphs()

    def start(self, batch_size: int, max_seq_len: int) -> None:
        check_start(self.model, self.build, batch_size, max_seq_len)
        num_blocks = batch_size + 1 if self.batch_invariant else batch_bucket(batch_size)
        num_slots = cache_slots(max_seq_len)
        cache = self.cache
        if cache is None or cache.num_blocks < num_blocks or cache.tokens_per_block < num_slots:
            self._forget("batch")
            self.cache = None  # the old one is gone before the new one is made
            self.cache = self._make_cache(num_blocks, num_slots)
        self._num_best = None
        self._lengths = []
        self._active = None

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        logits = None
        if self._prompts is not None and self.cache is not None and virtual is None:
            logits = self._prompts.run(prompts, self.cache, self.model.n_positions)
        if logits is None:
            return super().context(prompts, virtual)
        self._set_lengths(prompts)
        return logits

    def _forward_whole(self, step: Step, cache: KvCache) -> torch.Tensor:
        """With all logits: what ranks exchange must not depend on values where a graph records it."""
        asked, self._num_best = self._num_best, None
        try:
            return self._forward(step, cache)
        finally:
            self._num_best = asked

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        decoder = self._batch_decoder()
        decoder.inputs.ids[: len(self._lengths)] = ids
        logits = decoder.step()
        self._count_step()
        return logits[: len(self._lengths)]

    def run_ahead(
        self, first: torch.Tensor, num_steps: int, draws: Draws | None = None
    ) -> Iterator[tuple[list[int], list[float]]]:
        """See gpt.runtime.session.RunsAhead.  The device runs a few steps ahead of what has been yielded; after closing
        the iterator, `start` comes next."""
        decoder = self._batch_decoder()
        num_rows = len(self._lengths)
        decoder.inputs.ids[:num_rows] = first
        begin = self._num_generated
        filters = None
        if draws is not None:
            config = draws.config
            filters = Filters(config.temperature, config.top_k, config.nucleus, config.min_p)
            decoder.uniforms[begin : begin + num_steps, :num_rows] = draws.uniforms.to(self.device)
        host = HostTokens(num_steps, decoder, waits=self.graphs)
        for step in range(num_steps + _LEAD):
            if step < num_steps:
                decoder.step(filters)
                host.send(step, decoder.tokens[begin + step])
            if step >= _LEAD:
                oldest = host.read(step - _LEAD, num_rows)
                self._count_step()
                yield oldest

    def reorder(self, sources: Sequence[int]) -> None:
        if self._active is not None:
            self._positions = self._active.inputs.positions[: len(self._lengths)].clone()
        super().reorder(sources)
        self._active = None

    def start_paged(self, num_blocks: int, tokens_per_block: int) -> None:
        before = self.pool
        super().start_paged(num_blocks + 1, tokens_per_block)  # the last one is for the rows that fill up a batch
        if self.pool is not before:
            self._forget("paged")
            self._forget("batch")

    @property
    def num_pool_blocks(self) -> int:
        return max(0, super().num_pool_blocks - 1)

    def run_paged(self, step: PagedStep) -> torch.Tensor:
        """Rows of one token after a past take the decode step, all others PyTorch's.  The host prepares the latter
        while the device decodes."""
        decoding = [num_new == 1 and past > 0 for num_new, past in zip(step.num_new, step.num_past, strict=True)]
        if not any(decoding):
            return super().run_paged(step)
        starts = list(accumulate(step.num_new, initial=0))
        rows = [row for row, one in enumerate(decoding) if one]
        if all(decoding):
            return self._decode_rows(step, rows, rows)[step.wanted]
        lines = {token: line for line, token in enumerate(step.wanted.tolist())}
        logits = self._decode_rows(step, rows, [starts[row] for row in rows])
        result = logits.new_empty((len(lines), logits.shape[1]))
        decoded = [(lines[starts[row]], index) for index, row in enumerate(rows) if starts[row] in lines]
        if decoded:
            target, source = on_device(decoded, self.device, torch.int64).T
            result[target] = logits[source]
        part, others = paged_part(step, [row for row, one in enumerate(decoding) if not one], lines)
        result[on_device(others, self.device, torch.int64)] = super().run_paged(part)
        return result

    def run_paged_ahead(self, step: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
        num_rows = len(step.ids)
        decoder = self._paged_decoder(num_rows)
        inputs = decoder.inputs
        trash = self._pool().num_blocks - 1
        width = inputs.table.shape[1]
        # One copy to the device: tokens, positions, ends, tables.
        rows = [
            [token, past, end, *table, *[trash] * (width - len(table))]
            for token, past, end, table in zip(step.ids, step.num_past, step.ends, step.tables, strict=True)
        ]
        rows += [[0, 0, 0, *[trash] * width]] * (decoder.num_rows - num_rows)
        numbers = on_device(rows, self.device)
        inputs.ids.copy_(numbers[:, 0])
        decoder.begin(numbers[:, 1])
        ends = numbers[:, 2].contiguous()
        inputs.table.copy_(numbers[:, 3:])
        host = HostTokens(step.num_steps, decoder, waits=self.graphs)
        for number in range(step.num_steps):
            decoder.step()
            torch.minimum(inputs.positions, ends, out=inputs.positions)
            host.send(number, decoder.tokens[number])
        return (host.read(number, num_rows) for number in range(step.num_steps))

    def _decode_rows(self, step: PagedStep, rows: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """One decode step of these rows of a paged step, whose tokens stand at `tokens`: logits [rows, V]."""
        decoder = self._paged_decoder(len(rows))
        inputs, num_rows = decoder.inputs, len(rows)
        picked = on_device(tokens, self.device, torch.int64)
        inputs.ids[:num_rows] = step.ids[picked]
        decoder.begin(step.positions[picked])
        inputs.table.fill_(self._pool().num_blocks - 1)
        width = min(step.block_table.shape[1], inputs.table.shape[1])
        inputs.table[:num_rows, :width] = step.block_table[on_device(rows, self.device, torch.int64), :width]
        return decoder.step()[:num_rows]

    def _paged_decoder(self, num_rows: int) -> Decoder:
        key = ("paged", self._num_rows(num_rows))
        if key not in self._decoders:
            pool = self._pool()
            width = -(-self.build.max_seq_len // pool.tokens_per_block)
            self._decoders[key] = Decoder(self._decode_ops, self._recorder, key[1], width, pool)
        return self._decoders[key]

    def _batch_decoder(self) -> Decoder:
        """The decoder that goes on with the batch, its positions set."""
        if self._active is not None:
            return self._active
        if self.cache is None:
            raise RuntimeError("start comes before context and generation")
        key = ("batch", self._num_rows(len(self._lengths)))
        if key not in self._decoders:
            self._decoders[key] = Decoder(self._decode_ops, self._recorder, key[1], 1, self.cache)
            rows = torch.arange(key[1], dtype=torch.int32, device=self.device)
            # Rows that fill up a batch may share a block, if need be.
            self._decoders[key].inputs.table.copy_(rows.clamp(max=self.cache.num_blocks - 1)[:, None])
        decoder = self._decoders[key]
        decoder.begin(self._positions)
        self._active, self._num_generated = decoder, 0
        return decoder

    def _num_rows(self, batch_size: int) -> int:
        """What a batch is padded to.  Triton's code for one row, and for multiples of 16, is code of its own."""
        return -(-batch_size // 16) * 16 if self.batch_invariant else batch_bucket(batch_size)

    def _forget(self, kind: str) -> None:
        """Graphs hold the addresses of a cache that is about to go."""
        self._decoders = {key: decoder for key, decoder in self._decoders.items() if key[0] != kind}
        if self._prompts is not None:
            self._prompts.clear()
        if self._recorder is not None:
            self._recorder.renew_memory()  # the graphs that are left keep theirs
        self._active = None

    def _count_step(self) -> None:
        self._num_generated += 1
        self._lengths = [length + 1 for length in self._lengths]
        self._beginnings.grow()
