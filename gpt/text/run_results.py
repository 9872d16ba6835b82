"""What comes of a run: tokens as they come, then text on stdout, token files, log-probabilities."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gpt.console import log
from gpt.errors import InterruptError
from gpt.files import write_text
from gpt.text.pipeline import describe_speed, without_end
from gpt.text.prompts import full_rows, write_csv, write_npy
from gpt.text.stop_words import StopWords
from gpt.text.streaming import RowText, StreamPrinter, print_results
from gpt.text.token_records import describe_output
from gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation


@dataclass(frozen=True)
class Wanted:
    """Where results go.  output_csv, output_npy: in place of text on stdout.  logprobs: beside either of them.
    max_output_len: of a row in a token file.  fill_id: what such rows end with.  num_results: per prompt."""

    output_csv: Path | None
    output_npy: Path | None
    logprobs: Path | None
    streaming: bool
    max_output_len: int
    fill_id: int
    num_results: int

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.output_csv, self.output_npy, self.logprobs) if path is not None]

    @property
    def prints_text(self) -> bool:
        return self.output_csv is None and self.output_npy is None


class Results:
    """The rows of a run: row p * n + k is result k of prompt p."""

    def __init__(
        self,
        wanted: Wanted,
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None,
        end_id: int | None,
        stops: StopWords | None,
        vocab_size: int,
        out: TextIO,
    ):
        """tokenizer: None where only token files go in and out."""
        self._wanted = wanted
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._stops = stops
        self._vocab_size = vocab_size
        self._out = out
        self._rows: list[list[int]] = [[] for _ in range(len(prompts) * wanted.num_results)]
        self._num_ended = 0
        self._printer: StreamPrinter | None = None
        if wanted.streaming and tokenizer is not None:
            texts = [self._input(prompt) for prompt in range(len(prompts))]
            self._printer = StreamPrinter(
                texts, lambda: RowText(tokenizer, end_id, stops), out, num_samples=wanted.num_results
            )

    def add(self, row: int, token: int) -> None:
        self._rows[row].append(token)
        if self._printer is not None:
            self._printer.add(row, token)

    def end(self, row: int) -> None:
        self._num_ended += 1
        if self._printer is not None:
            self._printer.end(row)

    def finish(self, batches: Sequence[Generation]) -> list[str]:
        """Prints or writes what is complete; returns the texts, none without a tokenizer."""
        self._rows = [tokens for batch in batches for tokens in batch.tokens]
        if self._printer is None:  # else it is told at every level
            log.info(describe_speed(batches))
        texts = [] if self._tokenizer is None else [self.text(tokens) for tokens in self._rows]
        try:
            self._write_files(batches)
        finally:  # a full disk does not take the texts along
            if self._printer is not None:
                print(describe_speed(batches), file=sys.stderr, flush=True)
            elif self._wanted.prints_text:
                self._print(texts)
        return texts

    def _write_files(self, batches: Sequence[Generation]) -> None:
        if self._wanted.logprobs is not None:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._logprob_lines(batches)]
            write_text(self._wanted.logprobs, "".join(lines))
        if not self._wanted.prints_text:
            self._write_tokens(self._wanted.output_csv, self._wanted.output_npy, len(self._rows))

    def interrupted(self, batches: Sequence[Generation]) -> InterruptError:
        """Prints or writes what there is, token files under a name that says so; the error to end with."""
        if not any(self._rows):  # a search tells its tokens at its end
            done = [tokens for batch in batches for tokens in batch.tokens]
            self._rows[: len(done)] = done
            self._num_ended = len(done)
        num_begun = max((row + 1 for row, tokens in enumerate(self._rows) if tokens), default=0)
        found = [f"{self._num_ended} of {len(self._rows)} outputs are complete"]
        if self._printer is not None:
            self._printer.interrupt()
        elif self._wanted.prints_text:
            self._print([self.text(tokens) for tokens in self._rows[:num_begun]])
        elif num_begun:
            named = [_interrupted_name(path) for path in (self._wanted.output_csv, self._wanted.output_npy)]
            self._write_tokens(named[0], named[1], num_begun)
            found += [f"what there is went to {path}" for path in named if path is not None]
        many = "--output_file keeps results as they come, and --resume goes on with them"
        return InterruptError("interrupted", found=found, hint=many if len(self._prompts) > 1 else None)

    def break_off(self) -> None:
        """Closes the line that is being written."""
        if self._printer is not None:
            self._printer.interrupt()

    def text(self, tokens: Sequence[int]) -> str:
        return final_text(tokens, self._tokenizer, self._end_id, self._stops)

    def _print(self, texts: Sequence[str]) -> None:
        count = self._wanted.num_results
        for first in range(0, len(texts), count):
            print_results(self._input(first // count), texts[first : first + count], self._out)
        self._out.flush()

    def _input(self, prompt: int) -> str:
        """Virtual tokens have no text."""
        return self._decode([token for token in self._prompts[prompt] if token < self._vocab_size])

    def _decode(self, tokens: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special=False)

    def _write_tokens(self, csv: Path | None, npy: Path | None, num_rows: int) -> None:
        wanted = self._wanted
        prompts = [self._prompts[row // wanted.num_results] for row in range(num_rows)]
        rows = full_rows(prompts, self._rows[:num_rows], wanted.max_output_len, fill_id=wanted.fill_id)
        if csv is not None:
            write_csv(csv, rows)
        if npy is not None:
            write_npy(npy, rows)

    def _logprob_lines(self, batches: Sequence[Generation]) -> list[dict[str, Any]]:
        """One object per row."""
        records = [row for batch in batches for row in batch.logprobs]
        scores = [score for batch in batches for score in batch.scores]
        lines = []
        for row, (tokens, logprobs) in enumerate(zip(self._rows, records, strict=True)):
            prompt, number = divmod(row, self._wanted.num_results)
            score = scores[row] if scores else None
            described = describe_output(tokens, logprobs, score, self._tokenizer)
            lines.append({"prompt": prompt, "result": number, **described})
        return lines


def final_text(
    tokens: Sequence[int],
    tokenizer: Tokenizer | None,
    end_id: int | None,
    stops: StopWords | None,
    *,
    skip_special: bool = False,
) -> str:
    """A row's text, without the end token or stop word that ended it; none without a tokenizer."""
    if tokenizer is None:
        return ""
    tokens = without_end(tokens, end_id)
    decoded = tokenizer.decode(tokens if stops is None else stops.trim(tokens), skip_special)
    return decoded if stops is None else stops.cut(decoded)


def _interrupted_name(path: Path | None) -> Path | None:
    """Beside the file that was asked for: what is there under its name is whole."""
    return None if path is None else path.with_name(f"{path.stem}.interrupted{path.suffix}")
