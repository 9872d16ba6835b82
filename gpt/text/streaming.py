"""Text that appears while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

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

    def _restart(self, token: int) -> None:
        alone = self._tokenizer.decode([token], self._skip_special)
        if alone:  # a token without text of its own does not show what its right neighbour will look like
            self._window, self._window_shown = [token], len(alone)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)


class StreamPrinter:
    """Prints several sequences one after the other while all of them are generated.

    The first unfinished sequence appears live; those behind it wait, complete so far, for their turn.  What has been
    printed at the end is exactly what `print_pair` prints without streaming.
    """

    def __init__(
        self, prompts: Sequence[str], new_decoder: Callable[[], StreamDecoder], end_id: int | None, out: TextIO
    ):
        self._prompts = prompts
        self._decoders = [new_decoder() for _ in prompts]
        self._waiting = ["" for _ in prompts]
        self._ended = [False] * len(prompts)
        self._end_id = end_id
        self._out = out
        self._live = -1
        self._advance()

    def add(self, row: int, token: int) -> None:
        if token == self._end_id:
            self.end(row)
            return
        self._show(row, self._decoders[row].step(token))

    def end(self, row: int) -> None:
        """Called for each sequence once it is complete; again does nothing."""
        if self._ended[row]:
            return
        self._show(row, self._decoders[row].finish())
        self._ended[row] = True
        while 0 <= self._live < len(self._prompts) and self._ended[self._live]:
            self._out.write('"\n')
            self._advance()
        self._out.flush()

    def interrupt(self) -> None:
        """Closes the line that is being written."""
        if self._live < len(self._prompts):
            self._out.write('"\n')
            self._out.flush()

    def _advance(self) -> None:
        self._live += 1
        if self._live < len(self._prompts):
            self._out.write(f'Input: "{self._prompts[self._live]}"\nOutput: "{self._waiting[self._live]}')
            self._out.flush()

    def _show(self, row: int, piece: str) -> None:
        if row != self._live:
            self._waiting[row] += piece
        elif piece:
            self._out.write(piece)
            self._out.flush()


def print_pair(prompt: str, output: str, out: TextIO) -> None:
    out.write(f'Input: "{prompt}"\nOutput: "{output}"\n')
