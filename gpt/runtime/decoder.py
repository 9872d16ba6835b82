"""Decode steps that a GPU repeats by itself, at fixed addresses, and the way of their tokens to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt.engine.cuda_ops import DecodeInputs, DecodeOps
from gpt.engine.kv_cache import KvCache
from gpt.kernels.choose import choose_greedy
from gpt.kernels.draw import Filters, draw_tokens
from gpt.network.gpt import forward
from gpt.runtime.recording import Recorder

# Graphs of a batch size for so many ways of choosing tokens are kept: a long session may be asked for any number.
_MAX_WAYS = 8


@dataclass
class _Recorded:
    """A step's graph and where it leaves the logits [B, V padded]."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class Decoder:
    """A decode step for one batch size: its buffers and, with a recorder, its graphs, one for each way of choosing
    tokens.  Without, its kernels are launched one by one.

    first: [B] int32, the positions at which generating began.  tokens: [T, 2, B] int32: per step since then the chosen
    tokens and the bits of the largest logits.  uniforms: [T, B] float64, the random numbers of these steps.  copies:
    the stream that brings tokens to the host, None without a GPU.
    """

    def __init__(self, ops: DecodeOps, recorder: Recorder | None, num_rows: int, table_width: int, cache: KvCache):
        """table_width: blocks of a sequence at most."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=ops.device)

        self.num_rows = num_rows
        self.inputs = DecodeInputs(zeros(num_rows), zeros(num_rows), zeros(num_rows, table_width), cache)
        self.first = zeros(num_rows)
        # One row more than positions: the device may be a few steps ahead of the last one.
        num_steps = table_width * cache.tokens_per_block + 1
        self.tokens = zeros(num_steps, 2, num_rows)
        self.uniforms = zeros(num_steps, num_rows).double()
        self.copies = torch.cuda.Stream(ops.device) if ops.device.type == "cuda" else None
        self._ops = ops
        self._recorder = recorder
        self._recorded: dict[Filters | None, _Recorded] = {}

    def begin(self, positions: torch.Tensor) -> None:
        """Generating begins at positions [N] of the first rows; the others fill up the batch."""
        self.inputs.positions[: len(positions)] = positions
        self.inputs.positions[len(positions) :] = 0
        self.first.copy_(self.inputs.positions)

    @torch.inference_mode()
    def step(self, filters: Filters | None = None) -> torch.Tensor:
        """The logits [B, V] that follow the inputs, which move on to the likeliest or the drawn tokens."""
        vocab_size = self._ops.model.vocab_size
        if self._recorder is None:
            return self._launch(filters)[:, :vocab_size]
        if filters not in self._recorded:
            if len(self._recorded) == _MAX_WAYS:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[filters] = self._record(filters, self._recorder)
        recorded = self._recorded[filters]
        recorded.graph.replay()
        return recorded.logits[:, :vocab_size]

    def _launch(self, filters: Filters | None) -> torch.Tensor:
        ops, inputs = self._ops, self.inputs
        ops.begin(inputs)
        logits = ops.value(forward(ops, ops.model, ops.mapping))
        tiles, shown = ops.tiles, logits[:, : ops.model.vocab_size]
        if ops.mapping.world_size > 1:
            tiles = None  # of this rank's logits only
        if filters is not None:
            tile_max = None if tiles is None else tiles[0]
            tiles = draw_tokens(shown, filters, self.uniforms, inputs.positions, self.first, tile_max)
        elif tiles is None:
            best = shown.max(dim=-1, keepdim=True)
            tiles = best.values, best.indices.to(torch.int32)
        choose_greedy(tiles, inputs.ids, inputs.positions, self.first, self.tokens)
        return logits

    def _record(self, filters: Filters | None, recorder: Recorder) -> _Recorded:
        """The inputs, which the first run of the step moves on, are put back."""
        saved = self.inputs.ids.clone(), self.inputs.positions.clone()
        graph, logits = recorder.record(lambda: self._launch(filters))
        self.inputs.ids.copy_(saved[0])
        self.inputs.positions.copy_(saved[1])
        return _Recorded(graph, logits)


class HostTokens:
    """The tokens of steps on their way to the host, which may read older ones while later steps run."""

    def __init__(self, num_steps: int, decoder: Decoder, *, waits: bool):
        """waits: whether they arrive later than they are sent, as on a GPU."""
        self._host = torch.empty((num_steps, *decoder.tokens.shape[1:]), dtype=torch.int32, pin_memory=waits)
        # Between two steps a copy would take a twentieth of a small model's step.
        self._stream = decoder.copies if waits else None
        if self._stream is not None:
            # What an earlier request sent and nobody read may still be on its way from where new tokens will stand.
            torch.cuda.current_stream(decoder.tokens.device).wait_stream(self._stream)
        self._sent: list[torch.cuda.Event] = []

    def send(self, step: int, tokens: torch.Tensor) -> None:
        """tokens: [2, B] of a `Decoder`; steps are sent in order."""
        if self._stream is None:
            self._host[step].copy_(tokens)
            return
        self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._stream):
            self._host[step].copy_(tokens, non_blocking=True)
            self._sent.append(torch.cuda.Event())
            self._sent[-1].record()

    def read(self, step: int, num_rows: int) -> tuple[list[int], list[float]]:
        """Tokens and largest logits of the first rows, as soon as they are there."""
        if self._stream is not None:
            self._sent[step].synchronize()
        tokens, values = self._host[step, :, :num_rows]
        return tokens.tolist(), values.view(torch.float32).tolist()
