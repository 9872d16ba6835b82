"""Prompts from files row by row: a row that cannot be read is told by its line and does not stop the others.

.txt: one prompt per line.  .jsonl: one object per line, or one string.  .parquet, and .csv where a column is named: a
table with a column of texts.  .csv otherwise, and .npy: token ids.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import ConfigError, Problems
from gpt.text.prompts import TEXT_HINT, TOKEN_SUFFIXES, read_id, read_tokens, shorten, unicode_problem

DEFAULT_COLUMN = "prompt"
ROW_SUFFIXES = (".txt", ".jsonl", ".parquet", *TOKEN_SUFFIXES)


@dataclass(frozen=True)
class PromptRow:
    """line: where the row begins in the file, counted from 1; of a .parquet or .npy file the number of the row.
    Either text or tokens, or what is wrong."""

    line: int
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    problem: str | None = None


def holds_tokens(path: Path, column: str | None) -> bool:
    return path.suffix.lower() in TOKEN_SUFFIXES and column is None


def read_rows(path: Path, column: str | None, end_id: int | None) -> list[PromptRow]:
    """All rows of a file with a suffix of ROW_SUFFIXES, in order.

    column: of the texts, None for "prompt".  end_id: pads the rows of an array.
    Raises ConfigError for a file without rows, or that as a whole is not what its suffix says.
    """
    suffix = path.suffix.lower()
    if column is not None and suffix in (".txt", ".npy"):
        raise ConfigError("--column names a column of a table", found=path.name, allowed=".jsonl, .parquet, .csv")
    if suffix == ".npy":
        return [PromptRow(n, tokens=tuple(row)) for n, row in enumerate(read_tokens(path, end_id), start=1)]
    if suffix == ".parquet":
        rows = [_text_row(n, value) for n, value in enumerate(_read_parquet(path, column or DEFAULT_COLUMN), start=1)]
    elif suffix == ".csv" and column is not None:
        rows = list(_read_table(path, column))
    else:
        parse: Callable[[int, str], PromptRow] = _text_row
        if suffix == ".jsonl":
            parse = _JsonLines(column or DEFAULT_COLUMN)
        elif suffix == ".csv":
            parse = _token_row
        rows = [_parse_line(n, line, parse) for n, line in enumerate(_lines(path), start=1)]
        if suffix == ".csv" and rows and all(row.problem for row in rows):
            found = f"line 1: {rows[0].problem}"
            raise ConfigError(f"{path} holds something other than token ids", found=found, hint=TEXT_HINT)
    if not rows:
        raise ConfigError(f"{path} holds no prompts", found="no rows", hint="one prompt per row")
    return rows


def read_row_texts(path: Path, column: str | None) -> list[str]:
    """The texts of all rows.  Raises ConfigError as `read_rows` does, and listing every row without one."""
    rows = read_rows(path, column, None)
    problems = Problems()
    for row in rows:
        if row.problem is not None:
            problems.add(f"line {row.line}: {row.problem}")
    problems.raise_if_any(
        ConfigError,
        f"{path} holds rows that are no prompts",
        hint="mend or remove them; with --output_file texts are made of the others",
    )
    return [row.text or "" for row in rows]


def _lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def _parse_line(number: int, line: bytes, parse: Callable[[int, str], PromptRow]) -> PromptRow:
    try:
        return parse(number, line.decode())
    except UnicodeDecodeError as error:
        return PromptRow(number, problem=f"not UTF-8: {error.reason} at byte {error.start}")


def _text_row(number: int, value: object) -> PromptRow:
    if not isinstance(value, str):
        return PromptRow(number, problem="no text" if value is None else f"no text: {shorten(str(value))}")
    if not value.strip():
        return PromptRow(number, problem="an empty prompt")
    problem = unicode_problem(value)
    return PromptRow(number, problem=problem) if problem else PromptRow(number, text=value)


def _token_row(number: int, line: str) -> PromptRow:
    if not line.strip():
        return PromptRow(number, problem="an empty prompt")
    ids = []
    for column, cell in enumerate(line.split(","), start=1):
        token = read_id(cell)
        if token is None:
            return PromptRow(number, problem=f"column {column}: no token id: {shorten(cell)}")
        ids.append(token)
    return PromptRow(number, tokens=tuple(ids))


class _JsonLines:
    """Reads a line of JSON: an object with the texts in one of its keys, or the text itself."""

    def __init__(self, column: str):
        self.column = column

    def __call__(self, number: int, line: str) -> PromptRow:
        if not line.strip():
            return PromptRow(number, problem="an empty line")
        try:
            value = json.loads(line)
        except ValueError as error:
            return PromptRow(number, problem=f"no JSON: {error}")
        if isinstance(value, dict):
            if self.column not in value:
                return PromptRow(number, problem=f"no {self.column!r}; there are {', '.join(map(repr, value))}")
            value = value[self.column]
        return _text_row(number, value)


def _read_parquet(path: Path, column: str) -> list[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise _no_column(path, column, names)
        values: list[object] = pyarrow.parquet.read_table(path, columns=[column]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is no parquet file", found=error) from error
    return values


def _read_table(path: Path, column: str) -> Iterator[PromptRow]:
    csv.field_size_limit(2**31 - 1)  # the library's own is shorter than many a prompt
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            if column not in names:
                raise _no_column(path, column, names)
            place, line = names.index(column), reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _text_row(line, cells[place] if place < len(cells) else None)
                line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path} cannot be read as a table", found=error) from error


def _no_column(path: Path, column: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"{path} has no column {column!r}", found=", ".join(names) or "no columns", hint="--column names the texts"
    )
