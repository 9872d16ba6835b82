"""Prompt steps as CUDA graphs: a few hundred launches one by one take longer than the work of short prompts, and may
take as long as that of long ones in quantised engines."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpt.engine.kv_cache import KvCache
from gpt.engine.step import ContextStep, Step
from gpt.runtime.recording import Recorder

# Up to so many tokens padding costs less than launches; beyond, prompts must come close to filling the graph's rows.
_MAX_PADDED_TOKENS = 1024
_MIN_SHARE = 0.95
# Graphs keep the memory of the largest one's activations.
_MAX_TOKENS = 16384
_TOKENS_PER_BUCKET = 64
_MAX_GRAPHS = 16
# Then no more are recorded: sizes that come and go would spend more on recording than graphs save.  A number and not a
# time, which ranks would measure differently: recording adds them up as any step does, and all must take part.
_MAX_RECORDINGS = 64


@dataclass
class _Prompt:
    """A recorded step of B prompts of up to S tokens: its inputs' memory and its result's."""

    step: ContextStep
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


def graph_size(lengths: Sequence[int], num_slots: int) -> tuple[int, int] | None:
    """The graph for prompts of these lengths, (prompts, tokens of each); None where none is worth it.  num_slots: what
    the cache has for each prompt."""
    width = -(-max(lengths) // _TOKENS_PER_BUCKET) * _TOKENS_PER_BUCKET
    num_tokens = len(lengths) * width
    if num_tokens > _MAX_TOKENS or width > num_slots:
        return None
    if num_tokens > _MAX_PADDED_TOKENS and sum(lengths) < _MIN_SHARE * num_tokens:
        return None
    return len(lengths), width


class PromptGraphs:
    """Prompt steps by batch size and length, padded to a multiple of 64 tokens, recorded when a size comes again."""

    def __init__(self, forward: Callable[[Step, KvCache], torch.Tensor], recorder: Recorder):
        """forward: runs a step."""
        self._forward = forward
        self._recorder = recorder
        self._num_recorded = 0
        self._seen: Counter[tuple[int, int]] = Counter()
        self._graphs: OrderedDict[tuple[int, int], _Prompt] = OrderedDict()

    def run(self, prompts: Sequence[Sequence[int]], cache: KvCache, num_positions: int) -> torch.Tensor | None:
        """The logits [B, V] after the last token of each prompt; None for sizes that are not worth a graph."""
        key = graph_size([len(prompt) for prompt in prompts], cache.tokens_per_block)
        if key is None:
            return None
        width = key[1]
        self._seen[key] += 1
        if key not in self._graphs and (self._seen[key] < 2 or self._num_recorded == _MAX_RECORDINGS):
            return None
        device = cache.blocks.device
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], dtype=torch.int32)
        last = torch.tensor([row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)])
        if key not in self._graphs:
            self._graphs[key] = self._record(key, cache, num_positions)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        recorded = self._graphs[key]
        recorded.step.ids.copy_(ids.flatten().to(device))
        recorded.step.last.copy_(last.to(device))
        recorded.graph.replay()
        return recorded.logits

    def clear(self) -> None:
        """Forgets all graphs: they hold the addresses of the cache."""
        self._graphs.clear()

    def _record(self, key: tuple[int, int], cache: KvCache, num_positions: int) -> _Prompt:
        batch_size, width = key
        device = cache.blocks.device
        positions = torch.arange(width, dtype=torch.int32, device=device).clamp(max=num_positions - 1)
        step = ContextStep(
            ids=torch.zeros(batch_size * width, dtype=torch.int32, device=device),
            positions=positions.repeat(batch_size),
            last=torch.zeros(batch_size, dtype=torch.int64, device=device),
            lengths=(width,) * batch_size,
            padded=True,
        )
        graph, logits = self._recorder.record(lambda: self._forward(step, cache))
        self._num_recorded += 1
        return _Prompt(step, graph, logits)
