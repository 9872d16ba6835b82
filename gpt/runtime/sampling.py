"""The choice of the next token from the logits: penalties, blocks, filters, and a draw from what is left.

The order is that of `transformers`' generate: repetition penalty, (presence and frequency penalty, which it does not
have,) n-gram block, minimal length; then, unless decoding is greedy, temperature, top-k, top-p, min-p, and the draw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from gpt.errors import GptError
from gpt.runtime.sampling_config import SamplingConfig

__all__ = ["Sampler", "SamplingConfig"]


class Sampler:
    """Chooses the tokens of one batch, step by step; remembers what each sequence has so far.

    Each sequence has a random stream of its own, made from the seed and the index of its prompt in the whole input, and
    uses one number per token: what is drawn for a prompt does not depend on the batch it is in.

    prompts: token ids, one sequence each; ids from `vocab_size` on (virtual tokens) have no logits and are not
    penalised.  end_id: masked until `min_length` new tokens.  first_row: index of the first prompt in the whole input.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        end_id: int | None,
        device: torch.device,
        first_row: int = 0,
    ):
        self.config = config = config.with_seed()
        self._end_id = end_id
        self._num_new = 0
        self._running = [True] * len(prompts)
        shape = len(prompts), vocab_size
        self._seen: torch.Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, [token for token in prompt if token < vocab_size]] = True
            self._seen = self._seen.to(device)
        self._counts: torch.Tensor | None = None
        if config.presence_penalty != 0 or config.frequency_penalty != 0:
            self._counts = torch.zeros(shape, dtype=torch.float32, device=device)
        size = config.no_repeat_ngram_size
        self._ngrams = [_NGrams(size, prompt) for prompt in prompts] if size else []
        self._streams = [] if config.is_greedy else [_stream(config.seed, first_row + i) for i in range(len(prompts))]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] float32, which stay as they are -> ids [B] int64, which count as generated from then on.

        Raises GptError where the n-gram block leaves a running sequence no token.
        """
        scores = self.process(logits)
        if self.config.is_greedy:
            chosen = scores.argmax(dim=-1)
        else:
            uniforms = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)
            chosen = draw(scores, uniforms.to(scores.device))
        self._append(chosen)
        return chosen

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] -> what the token is chosen from, in the same form, minus infinity for what cannot come."""
        config, scores = self.config, logits
        if self._seen is not None:
            penalised = torch.where(scores < 0, scores * config.repetition_penalty, scores / config.repetition_penalty)
            scores = torch.where(self._seen, penalised, scores)
        if self._counts is not None:
            penalty = config.presence_penalty * (self._counts > 0) + config.frequency_penalty * self._counts
            scores = scores - penalty
        scores = self._block(scores)
        if config.is_greedy:
            return scores
        if config.temperature != 1:
            scores = scores / config.temperature
        if config.top_k > 0:
            scores = keep_top_k(scores, config.top_k)
        if config.nucleus < 1:
            scores = keep_top_p(scores, config.nucleus)
        if config.min_p > 0:
            scores = keep_min_p(scores, config.min_p)
        return scores

    def _block(self, scores: torch.Tensor) -> torch.Tensor:
        vocab_size = scores.shape[-1]
        blocked = [
            (row, token) for row, ngrams in enumerate(self._ngrams) for token in ngrams.blocked() if token < vocab_size
        ]
        if self._end_id is not None and 0 <= self._end_id < vocab_size and self._num_new < self.config.min_length:
            blocked += [(row, self._end_id) for row in range(len(scores))]
        if not blocked:
            return scores
        rows, tokens = torch.tensor(blocked, device=scores.device).T
        scores = scores.index_put((rows, tokens), scores.new_tensor(-torch.inf))
        for row, nothing_left in enumerate(scores.amax(dim=-1).isneginf().tolist()):
            if nothing_left and self._running[row]:
                raise GptError(
                    "no token is left to choose",
                    found=f"every token is blocked as new token {self._num_new} of sequence {row} of the batch",
                    hint="a larger --no_repeat_ngram_size, or a smaller --min_length",
                )
        return scores

    def _append(self, chosen: torch.Tensor) -> None:
        self._num_new += 1
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, chosen[:, None], self._counts.new_ones(len(chosen), 1))
        if self._ngrams:
            for row, token in enumerate(chosen.tolist()):
                self._ngrams[row].append(token)
                self._running[row] &= token != self._end_id


class _NGrams:
    """The n-grams of one sequence, kept up to date token by token, whatever its length."""

    def __init__(self, size: int, tokens: Sequence[int]):
        self._last: deque[int] = deque(maxlen=size - 1)
        self._followers: dict[tuple[int, ...], set[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        if len(self._last) == self._last.maxlen:
            self._followers.setdefault(tuple(self._last), set()).add(token)
        self._last.append(token)

    def blocked(self) -> set[int]:
        """The tokens that would complete an n-gram that the sequence has."""
        return self._followers.get(tuple(self._last), set())


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


def _stream(seed: int | None, row: int) -> np.random.Generator:
    """torch's generators keep 32 bits of a seed: among 10,000 prompts two would often share a stream."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(row,))))
