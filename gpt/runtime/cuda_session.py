"""A session on one GPU per rank: prompts by PyTorch's libraries, decode steps as CUDA graphs of our kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass

import torch

from gpt.comm import Communicator
from gpt.config import BuildConfig, ModelConfig
from gpt.console import log
from gpt.engine.cuda_ops import DecodeInputs, DecodeOps
from gpt.engine.kv_cache import KvCache
from gpt.engine.tuning import Tuning
from gpt.kernels.choose import choose_greedy
from gpt.mapping import Mapping
from gpt.network.gpt import forward
from gpt.runtime.limits import check_start
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.virtual_tokens import VirtualTokens

# Slots of the cache and rows of a batch are rounded up, so that requests of about the same size share a graph.
_SLOTS = 128
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
# Steps that may be under way while the host still reads older tokens.
_LEAD = 3


@dataclass
class _Decoder:
    """A decode step for one batch size: its buffers and, on a GPU, its graph.

    tokens: [T, 2, B] int32: per step the chosen tokens and the bits of their logits.
    """

    inputs: DecodeInputs
    first: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class CudaSession(TorchSession):
    """See gpt.runtime.session.Session; `greedy` decodes without waiting for the host.

    graphs: whether steps are captured in CUDA graphs; without, the same kernels are launched one by one.
    """

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
    ):
        super().__init__(model, build, mapping, weights, device, comm)
        self.graphs = graphs and self.device.type == "cuda"
        self._decode_ops = DecodeOps(
            model,
            mapping,
            weights,
            Tuning(self.device),
            max_seq_len=build.max_seq_len + _SLOTS,
            comm=self.comm,
        )
        self._decoders: dict[int, _Decoder] = {}
        self._batch_size = 0
        self._num_generated = 0

    def start(self, batch_size: int, max_seq_len: int) -> None:
        check_start(self.model, self.build, batch_size, max_seq_len)
        num_rows = batch_bucket(batch_size)
        num_slots = -(-max_seq_len // _SLOTS) * _SLOTS
        cache = self.cache
        if cache is None or cache.num_blocks < num_rows or cache.tokens_per_block < num_slots:
            self._decoders.clear()
            self.cache = None  # the old one is gone before the new one is made
            self.cache = KvCache.empty(
                self.model,
                self.build,
                self.mapping,
                self.device,
                num_blocks=num_rows,
                tokens_per_block=num_slots,
            )
        self._batch_size = batch_size
        self._lengths = []

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        logits = super().context(prompts, virtual)
        decoder = self._decoder()
        inputs = decoder.inputs
        inputs.positions.zero_()
        inputs.positions[: self._batch_size] = self._positions
        decoder.first.copy_(inputs.positions)
        self._num_generated = 0
        return logits

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        decoder = self._decoder()
        decoder.inputs.ids[: self._batch_size] = ids
        self._step(decoder)
        self._num_generated += 1
        assert decoder.logits is not None
        return decoder.logits[: self._batch_size, : self.model.vocab_size]

    def greedy(self, first: torch.Tensor, num_steps: int) -> Iterator[tuple[list[int], list[float]]]:
        """Appends `first` [B], then each step's likeliest tokens: yields per step the tokens and their logits.

        The device runs a few steps ahead of what has been yielded.  A caller that has enough closes the iterator, which
        ends the batch: `start` comes next.
        """
        decoder = self._decoder()
        decoder.inputs.ids[: self._batch_size] = first
        host = torch.empty((num_steps, 2, decoder.first.shape[0]), dtype=torch.int32, pin_memory=self.graphs)
        done: list[torch.cuda.Event] = []
        already = self._num_generated
        for step in range(num_steps + _LEAD):
            if step < num_steps:
                self._step(decoder)
                host[step].copy_(decoder.tokens[already + step], non_blocking=True)
                if self.graphs:
                    done.append(torch.cuda.Event())
                    done[-1].record()
            if step >= _LEAD or not self.graphs:
                oldest = step - _LEAD if self.graphs else step
                if oldest >= num_steps:
                    return
                if self.graphs:
                    done[oldest].synchronize()
                self._num_generated += 1
                tokens, values = host[oldest, :, : self._batch_size]
                yield tokens.tolist(), values.view(torch.float32).tolist()

    def _decoder(self) -> _Decoder:
        num_rows = batch_bucket(self._batch_size)
        if num_rows not in self._decoders:
            self._decoders[num_rows] = self._make_decoder(num_rows)
        return self._decoders[num_rows]

    def _make_decoder(self, num_rows: int) -> _Decoder:
        cache = self.cache
        if cache is None:
            raise RuntimeError("start comes before context and generation")

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        table = torch.arange(num_rows, dtype=torch.int32, device=self.device)[:, None].contiguous()
        inputs = DecodeInputs(zeros(num_rows), zeros(num_rows), table, cache)
        return _Decoder(inputs, zeros(num_rows), zeros(cache.tokens_per_block + 1, 2, num_rows))

    def _step(self, decoder: _Decoder) -> None:
        with torch.inference_mode():
            if not self.graphs:
                self._launch(decoder)
                return
            if decoder.graph is None:
                self._capture(decoder)
            assert decoder.graph is not None
            decoder.graph.replay()

    def _launch(self, decoder: _Decoder) -> None:
        ops = self._decode_ops
        ops.begin(decoder.inputs)
        decoder.logits = ops.value(forward(ops, self.model, self.mapping))
        tiles = ops.tiles
        if tiles is None or self.mapping.world_size > 1:
            best = decoder.logits[:, : self.model.vocab_size].max(dim=-1, keepdim=True)
            tiles = (best.values, best.indices.to(torch.int32))
        choose_greedy(tiles, decoder.inputs.ids, decoder.inputs.positions, decoder.first, decoder.tokens)

    def _capture(self, decoder: _Decoder) -> None:
        """Runs the step once to have its kernels compiled, puts the inputs back, and records it."""
        begin = time.perf_counter()
        saved = decoder.inputs.ids.clone(), decoder.inputs.positions.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._launch(decoder)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        decoder.inputs.ids.copy_(saved[0])
        decoder.inputs.positions.copy_(saved[1])
        torch.cuda.synchronize(self.device)
        compiled = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(decoder)
        decoder.graph = graph
        log.debug(
            "Decode step of %d sequences captured in %.2f s (%.2f s of compiling and first run)",
            decoder.first.shape[0],
            time.perf_counter() - begin,
            compiled - begin,
        )


def batch_bucket(batch_size: int) -> int:
    """The number of rows a batch is padded to."""
    for size in _BATCH_BUCKETS:
        if batch_size <= size:
            return size
    return -(-batch_size // 64) * 64
