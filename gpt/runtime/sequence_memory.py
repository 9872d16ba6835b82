"""What the choice of tokens remembers of one sequence: its length, its n-grams, its last tokens, its random stream."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from gpt.runtime.sampling_config import SamplingConfig


class SequenceMemory:
    """One sequence.  key: what names its random stream, (index of the prompt,) or (index, number of the sample)."""

    def __init__(self, config: SamplingConfig, prompt: Sequence[int], key: tuple[int, ...], bad_words: BadWords):
        self.key = key
        self.num_new = 0
        self._bad_words = bad_words
        self._last: deque[int] = deque(prompt[-bad_words.longest_beginning :], maxlen=bad_words.longest_beginning)
        self._ngrams = _NGrams(config.no_repeat_ngram_size, prompt) if config.no_repeat_ngram_size else None
        self._stream = None if config.is_greedy else _stream(config.seed, key)

    def append(self, token: int) -> None:
        self.num_new += 1
        self._last.append(token)
        if self._ngrams is not None:
            self._ngrams.append(token)

    def blocked(self) -> Iterable[int]:
        """The tokens that would complete a bad word, or an n-gram that the sequence has."""
        words = self._bad_words.blocked(self._last)
        return words if self._ngrams is None else words | self._ngrams.blocked()

    def uniforms(self, count: int) -> np.ndarray:
        """The stream's next numbers in [0, 1), [count] float64."""
        return np.zeros(count) if self._stream is None else self._stream.random(count)

    def copy(self) -> SequenceMemory:
        """A sequence of its own that has the same past."""
        other = copy.copy(self)
        other._last = self._last.copy()
        other._ngrams = None if self._ngrams is None else self._ngrams.copy()
        return other


class BadWords:
    """Token sequences that must not come.  A word of only the end token is left out, as in `transformers`: it would
    leave no way to end."""

    def __init__(self, words: Sequence[Sequence[int]], end_id: int | None):
        self._always = {word[0] for word in words if len(word) == 1 and word[0] != end_id}
        self._after: dict[tuple[int, ...], set[int]] = {}
        for word in words:
            if len(word) > 1:
                self._after.setdefault(tuple(word[:-1]), set()).add(word[-1])
        self._lengths = sorted({len(beginning) for beginning in self._after})
        self.longest_beginning = max(self._lengths, default=0)

    def blocked(self, last: Sequence[int]) -> set[int]:
        """The tokens that would complete a word behind the `last` tokens of a sequence."""
        result = self._always
        tail = tuple(last)
        for length in self._lengths:
            if length <= len(tail):
                result = result | self._after.get(tail[len(tail) - length :], set())
        return result


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

    def copy(self) -> _NGrams:
        other = copy.copy(self)
        other._last = self._last.copy()
        other._followers = {beginning: set(tokens) for beginning, tokens in self._followers.items()}
        return other


def _stream(seed: int | None, key: tuple[int, ...]) -> np.random.Generator:
    """torch's generators keep 32 bits of a seed: among 10,000 prompts two would often share a stream.

    The first sample of a prompt draws as if it were the only one.
    """
    spawn_key = key[:1] if key[1:] == (0,) else key
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn_key)))
