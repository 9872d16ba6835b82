"""Text that appears while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from gpt.text.stop_words import StopWords, TextHoldback, TokenHoldback
from gpt.text.stream_decoder import StreamDecoder
from gpt.text.tokenizer import Tokenizer


class RowText:
    """The text of one sequence as its tokens come; the pieces joined are its text at the end.

    The end token has no text.  What may still become another character, or a stop word, is held back.
    """

    def __init__(self, tokenizer: Tokenizer, end_id: int | None, stops: StopWords | None = None):
        self._decoder = StreamDecoder(tokenizer, skip_special=False)
        self._end_id = end_id
        self._tokens = TokenHoldback(() if stops is None else stops.ids)
        self._text = TextHoldback(() if stops is None else stops.words)

    def add(self, token: int) -> str:
        if token == self._end_id:
            return ""
        return "".join(self._text.step(self._decoder.step(one)) for one in self._tokens.step(token))

    def finish(self) -> str:
        pieces = [self._decoder.step(token) for token in self._tokens.finish()]
        pieces = [self._text.step(piece) for piece in (*pieces, self._decoder.finish())]
        return "".join(pieces) + self._text.finish()


class StreamPrinter:
    """Prints several sequences one after the other while all of them are generated.

    The first unfinished sequence appears live; those behind it wait, complete so far, for their turn.  What has been
    printed at the end is exactly what `print_results` prints without streaming.
    """

    def __init__(self, prompts: Sequence[str], new_text: Callable[[], RowText], out: TextIO, num_samples: int = 1):
        """prompts: the texts of the prompts, each of which has `num_samples` sequences."""
        self._prompts = prompts
        self._num_samples = num_samples
        self._texts = [new_text() for _ in range(len(prompts) * num_samples)]
        self._waiting = ["" for _ in self._texts]
        self._begun = [False] * len(self._texts)
        self._ended = [False] * len(self._texts)
        self._num_shown = len(self._texts)
        self._out = out
        self._live = -1
        self._advance()

    def add(self, row: int, token: int) -> None:
        self._begun[row] = True
        self._show(row, self._texts[row].add(token))

    def end(self, row: int) -> None:
        """Called for each sequence once it is complete; again does nothing."""
        if self._ended[row]:
            return
        self._show(row, self._texts[row].finish())
        self._ended[row] = True
        while self._live < self._num_shown and self._ended[self._live]:
            self._out.write('"\n')
            self._advance()
        self._out.flush()

    def interrupt(self) -> None:
        """Ends all sequences with what they have; behind the one that is shown live, those that have nothing are left
        out."""
        begun = [row for row, has_tokens in enumerate(self._begun) if has_tokens]
        self._num_shown = min(len(self._texts), max([self._live, *begun]) + 1)
        for row in range(max(0, self._live), self._num_shown):
            self.end(row)

    def _advance(self) -> None:
        self._live += 1
        if self._live < self._num_shown:
            if self._live % self._num_samples == 0:
                self._out.write(f'Input: "{self._prompts[self._live // self._num_samples]}"\n')
            self._out.write(f'Output: "{self._waiting[self._live]}')
            self._out.flush()

    def _show(self, row: int, piece: str) -> None:
        if row != self._live:
            self._waiting[row] += piece
        elif piece:
            self._out.write(piece)
            self._out.flush()


def print_results(prompt: str, outputs: Sequence[str], out: TextIO) -> None:
    out.write(f'Input: "{prompt}"\n' + "".join(f'Output: "{output}"\n' for output in outputs))
