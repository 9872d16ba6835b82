"""Stop words: found in the text, however it is cut into tokens, or as token ids.

A text ends with the token that completes a stop word.  The tokens are kept; of the text, the stop word and what follows
it are cut off.  Only new tokens count: a stop word does not begin in the prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from gpt.errors import ConfigError
from gpt.text.stream_decoder import StreamDecoder
from gpt.text.tokenizer import Tokenizer


class StopWords:
    """See gpt.runtime.stopping.Stops.  words: text, for which a tokenizer is needed.  ids: token sequences."""

    def __init__(
        self,
        words: Sequence[str] = (),
        ids: Sequence[tuple[int, ...]] = (),
        tokenizer: Tokenizer | None = None,
        *,
        skip_special: bool = False,
    ):
        if words and tokenizer is None:
            raise ConfigError(
                "stop words as text need a tokenizer", found=list(words), hint="--tokenizer, or --stop_ids"
            )
        self.words = tuple(words)
        self.ids = tuple(ids)
        self.tokenizer = tokenizer
        self.skip_special = skip_special

    def start(self) -> StopWordState:
        return StopWordState(self)

    def ended(self, tokens: Sequence[int]) -> Sequence[int]:
        """`tokens` up to the one that completes the first stop word."""
        state = self.start()
        count = next((number for number, token in enumerate(tokens, start=1) if state.add(token)), len(tokens))
        return tokens[:count]

    def trim(self, tokens: Sequence[int]) -> Sequence[int]:
        """`tokens` without the stop sequence that they end with."""
        ending = [len(ids) for ids in self.ids if tuple(tokens[len(tokens) - len(ids) :]) == ids]
        return tokens[: len(tokens) - max(ending, default=0)]

    def cut(self, text: str) -> str:
        """`text` up to its first stop word."""
        places = [place for place in map(text.find, self.words) if place >= 0]
        return text[: min(places, default=len(text))]


class StopWordState:
    """What one sequence has so far: its last characters and tokens, as many as a stop word may begin with."""

    def __init__(self, stops: StopWords):
        self._stops = stops
        self._longest = max(map(len, stops.words), default=0)
        self._tail = ""
        self._last: deque[int] = deque(maxlen=max(map(len, stops.ids), default=0))
        self._decoder: StreamDecoder | None = None
        if stops.tokenizer is not None and stops.words:
            self._decoder = StreamDecoder(stops.tokenizer, stops.skip_special)

    def add(self, token: int) -> bool:
        """Takes the next new token; whether a stop word is complete with it."""
        self._last.append(token)
        last = tuple(self._last)
        found = any(last[len(last) - len(ids) :] == ids for ids in self._stops.ids)
        if self._decoder is not None:
            self._tail += self._decoder.step(token)
            found = found or any(word in self._tail for word in self._stops.words)
            self._tail = self._tail[max(0, len(self._tail) - self._longest + 1) :]
        return found

    def copy(self) -> StopWordState:
        other = StopWordState(self._stops)
        other._tail = self._tail
        other._last = self._last.copy()
        other._decoder = None if self._decoder is None else self._decoder.copy()
        return other


class TextHoldback:
    """Lets text through piece by piece, except what may be the beginning of a stop word, and nothing behind one."""

    def __init__(self, words: Sequence[str]):
        self._words = words
        self._held = ""
        self._ended = False

    def step(self, piece: str) -> str:
        if self._ended:
            return ""
        text = self._held + piece
        places = [place for place in map(text.find, self._words) if place >= 0]
        if places:
            self._ended, self._held = True, ""
            return text[: min(places)]
        size = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def finish(self) -> str:
        """What was held back and became no stop word."""
        rest, self._held = self._held, ""
        return rest


class TokenHoldback:
    """The same for tokens and stop sequences of token ids."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]):
        self._sequences = sequences
        self._held: tuple[int, ...] = ()
        self._ended = False

    def step(self, token: int) -> tuple[int, ...]:
        if self._ended:
            return ()
        tokens = (*self._held, token)
        complete = [len(one) for one in self._sequences if tokens[max(0, len(tokens) - len(one)) :] == one]
        size = max(complete or [_overlap(tokens, one) for one in self._sequences], default=0)
        self._ended, self._held = bool(complete), () if complete else tokens[len(tokens) - size :]
        return tokens[: len(tokens) - size]

    def finish(self) -> tuple[int, ...]:
        rest, self._held = self._held, ()
        return rest


def _overlap(text: str | tuple[int, ...], word: str | tuple[int, ...]) -> int:
    """The length of the longest end of `text` that `word` begins with, without being all of it."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if text[len(text) - size :] == word[:size]), 0)
