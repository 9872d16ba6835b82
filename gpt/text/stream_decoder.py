"""Text that grows token by token."""

from __future__ import annotations

from gpt.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character is at most three bytes, and a tokenizer shows each of them as at most one U+FFFD.
_MAX_UNFINISHED = 3


class StreamDecoder:
    """Decodes one sequence token by token; the pieces joined are the text of all tokens at once.

    The bytes of a character may be spread over tokens: what might still become another character is held back.
    Decoding goes over a short window of tokens, because the text of a token can depend on its left neighbour
    (sentencepiece drops the blank of a first word).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._window_shown = 0  # characters of the window's text that have been returned

    def step(self, token: int) -> str:
        """The text that has become certain with `token`; often "" or several characters."""
        self._window.append(token)
        text = self._decode()
        held = min(_MAX_UNFINISHED, len(text) - len(text.rstrip(_REPLACEMENT)))
        piece = text[self._window_shown : len(text) - held]
        self._window_shown += len(piece)
        if piece and not held:
            self._restart(token)
        return piece

    def finish(self) -> str:
        """What was held back and has not become a character."""
        rest = self._decode()[self._window_shown :]
        self._window, self._window_shown = [], 0
        return rest

    def copy(self) -> StreamDecoder:
        """A sequence of its own that has the same past."""
        other = StreamDecoder(self._tokenizer, self._skip_special)
        other._window, other._window_shown = list(self._window), self._window_shown
        return other

    def _restart(self, token: int) -> None:
        alone = self._tokenizer.decode([token], self._skip_special)
        if alone:  # a token without text of its own does not show what its right neighbour will look like
            self._window, self._window_shown = [token], len(alone)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)
