"""The choice of the next token from the logits: penalties, blocks, filters, and a draw from what is left.

The order is that of `transformers`' generate: repetition penalty, (presence and frequency penalty, which it does not
have,) n-gram block, bad words, minimal length; then, unless decoding is greedy, temperature, top-k, top-p, min-p, and
the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpt.errors import GptError
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.sequence_memory import BadWords, SequenceMemory


@dataclass(frozen=True)
class Draws:
    """What a device needs to draw tokens by itself, where what came before changes nothing: the settings, and the
    random numbers [T, B] float64 in [0, 1) of T steps to come.  See gpt.kernels.draw."""

    config: SamplingConfig
    uniforms: torch.Tensor


class Sampler:
    """Chooses tokens for sequences that come and go, step by step; remembers what each of them has so far.

    Each sequence has a random stream of its own, made from the seed and the index of its prompt in the whole input, and
    uses one number per token: what is drawn for a prompt does not depend on the batch it is in.

    prompts: token ids of the first rows, one sequence each; ids from `vocab_size` on (virtual tokens) have no logits
    and are not penalised.  end_id: masked until `min_length` new tokens.  keys: what names each row's random stream,
    (index of the prompt in the whole input,) or (index, number of the sample); by default the row itself.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompts: Sequence[Sequence[int]] = (),
        *,
        vocab_size: int,
        end_id: int | None,
        device: torch.device,
        keys: Sequence[tuple[int, ...]] | None = None,
    ):
        self.config = config = config.with_seed()
        self._vocab_size = vocab_size
        self._device = device
        self._end_id = end_id if end_id is not None and 0 <= end_id < vocab_size else None
        self._bad_words = BadWords(config.bad_words, end_id)
        self._rows: list[SequenceMemory | None] = []
        capacity = len(prompts)
        self._seen: torch.Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(capacity, vocab_size, dtype=torch.bool, device=device)
        self._counts: torch.Tensor | None = None
        if config.presence_penalty != 0 or config.frequency_penalty != 0:
            self._counts = torch.zeros(capacity, vocab_size, dtype=torch.float32, device=device)
        for row, prompt in enumerate(prompts):
            self.open(prompt, (row,) if keys is None else keys[row])

    def open(self, prompt: Sequence[int], key: tuple[int, ...]) -> int:
        """Takes a sequence in; returns its row, the number that the other methods know it by."""
        memory = SequenceMemory(self.config, prompt, key, self._bad_words)
        row = self._rows.index(None) if None in self._rows else len(self._rows)
        self._rows[row : row + 1] = [memory]
        if self._seen is not None:
            self._seen = _with_room(self._seen, row)
            self._seen[row] = False
            self._seen[row, [token for token in prompt if token < self._vocab_size]] = True
        if self._counts is not None:
            self._counts = _with_room(self._counts, row)
            self._counts[row] = 0
        return row

    def close(self, row: int) -> None:
        """Forgets a sequence; its number may be given to another one."""
        self._rows[row] = None

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i goes on as a copy of what row sources[i] has so far, with the number of rows that `sources` has."""
        rows = [self._rows[source] for source in sources]
        self._rows = [None if memory is None else memory.copy() for memory in rows]
        index = torch.tensor(sources, device=self._device)
        if self._seen is not None:
            self._seen = self._seen[index]
        if self._counts is not None:
            self._counts = self._counts[index]

    def choose(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [K, V] float32, which stay as they are -> ids [K] int64, which count as generated from then on.

        rows: which sequence each line of logits belongs to, by default row by row.

        Raises GptError where blocks leave an open sequence no token.
        """
        scores = self.process(logits, rows)
        if self.config.is_greedy:
            chosen = scores.argmax(dim=-1)
        else:
            memories = self._memories(rows)
            uniforms = np.array([0.0 if row is None else row.uniforms(1)[0] for row in memories])
            chosen = draw(scores, torch.from_numpy(uniforms).to(scores.device))
        self.append(chosen, rows)
        return chosen

    def process(
        self, logits: torch.Tensor, rows: Sequence[int] | None = None, *, may_block_all: bool = False
    ) -> torch.Tensor:
        """Logits [K, V] -> what the token is chosen from, in the same form, minus infinity for what cannot come.

        may_block_all: a line where nothing can come is no error, since others compete with it.
        """
        config, scores = self.config, logits
        if self._seen is not None:
            penalised = torch.where(scores < 0, scores * config.repetition_penalty, scores / config.repetition_penalty)
            scores = torch.where(_rows_of(self._seen, rows, len(scores)), penalised, scores)
        if self._counts is not None:
            counts = _rows_of(self._counts, rows, len(scores))
            scores = scores - (config.presence_penalty * (counts > 0) + config.frequency_penalty * counts)
        scores = self._block(scores, rows, may_block_all)
        return scores if config.is_greedy else keep_likely(scores, config)

    def draws_ahead(self, num_steps: int) -> Draws:
        """The next random numbers of all rows, for settings that are memoryless; `choose` is not called any more."""
        streams = [np.zeros(num_steps) if row is None else row.uniforms(num_steps) for row in self._rows]
        return Draws(self.config, torch.from_numpy(np.stack(streams, axis=1)))

    def append(self, chosen: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        """Counts ids [K] as generated."""
        index = torch.arange(len(chosen)) if rows is None else torch.tensor(rows)
        index = index.to(chosen.device)
        if self._seen is not None:
            self._seen[index, chosen] = True
        if self._counts is not None:
            self._counts[index, chosen] += 1
        for memory, token in zip(self._memories(rows), chosen.tolist(), strict=True):
            if memory is not None:
                memory.append(token)

    def _memories(self, rows: Sequence[int] | None) -> list[SequenceMemory | None]:
        return self._rows if rows is None else [self._rows[row] for row in rows]

    def _block(self, scores: torch.Tensor, rows: Sequence[int] | None, may_block_all: bool) -> torch.Tensor:
        memories = self._memories(rows)
        blocked = [
            (line, token)
            for line, memory in enumerate(memories)
            if memory is not None
            for token in memory.blocked()
            if token < self._vocab_size
        ]
        if self._end_id is not None and self.config.min_length > 0:
            blocked += [
                (line, self._end_id)
                for line, memory in enumerate(memories)
                if memory is not None and memory.num_new < self.config.min_length
            ]
        if not blocked:
            return scores
        lines, tokens = torch.tensor(blocked, device=scores.device).T
        scores = scores.index_put((lines, tokens), scores.new_tensor(-torch.inf))
        if may_block_all:
            return scores
        for memory, nothing_left in zip(memories, scores.amax(dim=-1).isneginf().tolist(), strict=True):
            if nothing_left and memory is not None:
                raise GptError(
                    "no token is left to choose",
                    found=f"every token is blocked as new token {memory.num_new} of prompt {memory.key[0]}",
                    hint="a larger --no_repeat_ngram_size, fewer --bad_words, or a smaller --min_length",
                )
        return scores


def _rows_of(table: torch.Tensor, rows: Sequence[int] | None, num_rows: int) -> torch.Tensor:
    return table[:num_rows] if rows is None else table[torch.tensor(rows, device=table.device)]


def _with_room(table: torch.Tensor, row: int) -> torch.Tensor:
    """`table` [rows, V], doubled where it ends before `row`."""
    if row < len(table):
        return table
    return torch.cat([table, table.new_zeros(max(1, len(table)), table.shape[1])])


def keep_likely(scores: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Scores [B, V] over the temperature, minus infinity for what the filters leave out."""
    if config.temperature != 1:
        scores = scores / config.temperature
    if config.top_k > 0:
        scores = keep_top_k(scores, config.top_k)
    if config.nucleus < 1:
        scores = keep_top_p(scores, config.nucleus)
    if config.min_p > 0:
        scores = keep_min_p(scores, config.min_p)
    return scores


def keep_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest scores of each row; those equal to the smallest of them stay too."""
    smallest = scores.topk(min(k, scores.shape[-1]), dim=-1).values[:, -1:]
    return scores.masked_fill(scores < smallest, -torch.inf)


def keep_top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest tokens of each row that hold probability p together: those behind which less than 1 - p is left go."""
    ascending, order = scores.sort(dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def keep_min_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """The tokens of each row with at least p times the probability of the likeliest."""
    probabilities = scores.softmax(dim=-1)
    largest = probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < p * largest, -torch.inf)


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token per row by the inverse of the distribution function: scores [B, V], uniforms [B] in [0, 1) -> ids [B].

    In float64, since rounded sums of 50,000 probabilities in float32 would favour some tokens.  Searching for a mass
    above 0 and up to the whole sum never finds a token of probability 0.
    """
    sums = scores.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = (1 - uniforms)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted)[:, 0]
