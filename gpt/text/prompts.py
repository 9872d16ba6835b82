"""Prompts from files, results to files.

Token files: .csv, one prompt of comma-separated ids per line, or .npy, a 2-D array of integers.  Results: whole rows
(prompt, new tokens, end id up to the common length), int32, [B, longest prompt + max_output_len].
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.errors import ConfigError, Problems
from gpt.files import whole_file

if TYPE_CHECKING:
    import numpy

TOKEN_SUFFIXES = (".csv", ".npy")
_MAX_SHOWN = 40  # characters
TEXT_HINT = "texts: --input_file with --column NAME for a table, a .txt file with one per line; or --input_text"


def check_input_file(path: Path, suffixes: Sequence[str]) -> None:
    """Raises ConfigError for a missing file, a folder, or a suffix outside `suffixes`."""
    check_suffix(path, suffixes)
    if not path.exists():
        raise ConfigError("no such input file", found=path)
    if not path.is_file():
        raise ConfigError("the input file is no file", found=path)


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """The same as far as it can be said without looking, which may give other results on other machines."""
    if path.suffix.lower() not in suffixes:
        found = path.suffix or f"{path.name} (no suffix)"
        raise ConfigError("input file format not supported", found=found, allowed=", ".join(suffixes))


def read_tokens(path: Path, end_id: int | None) -> list[list[int]]:
    """The prompts of a .csv or .npy file as token ids; rows may differ in length (`end_id` pads the rows of an array).

    Raises ConfigError listing everything in the file that is no token id.
    """
    rows = _read_npy(path, end_id) if path.suffix.lower() == ".npy" else _read_csv(path)
    if not rows:
        raise ConfigError(f"{path} holds no prompts", found="no rows", hint="one prompt per row")
    problems = Problems()
    for number, row in enumerate(rows, start=1):
        if not row:
            problems.add(f"row {number}: an empty prompt")
    problems.raise_if_any(ConfigError, f"{path} holds prompts without tokens", hint="remove the empty rows")
    return rows


def _read_csv(path: Path) -> list[list[int]]:
    rows: list[list[int]] = []
    problems = Problems()
    for number, cells in enumerate(csv.reader(_read_text(path, "token ids").splitlines()), start=1):
        ids = [read_id(cell) for cell in cells]
        for column, (cell, token) in enumerate(zip(cells, ids, strict=True), start=1):
            if token is None:
                problems.add(f"row {number}, column {column}: {shorten(cell) if cell.strip() else 'an empty cell'}")
        rows.append([token for token in ids if token is not None])
    problems.raise_if_any(ConfigError, f"{path} holds something other than token ids", hint=TEXT_HINT)
    return rows


def read_id(cell: str) -> int | None:
    return int(cell) if cell.strip().removeprefix("-").isdecimal() else None


def unicode_problem(text: str) -> str | None:
    """What keeps a text from being Unicode; such a one comes from bytes of a command line or from JSON's escapes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is a byte that is not UTF-8, or half of a surrogate pair"
    return None


def shorten(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")


def _read_npy(path: Path, end_id: int | None) -> list[list[int]]:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{path} is no numpy array", found=error) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise ConfigError(f"{path} holds no prompts", found=found, allowed="integers [prompts, tokens]")
    return [_strip_padding(row, end_id) for row in array.tolist()]


def _strip_padding(row: list[int], end_id: int | None) -> list[int]:
    """Only the end ids behind the last other token are padding; one inside a prompt belongs to it."""
    length = len(row)
    while length and row[length - 1] == end_id:
        length -= 1
    return row[:length]


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as {what}", found=error, allowed="UTF-8 text") from error


def check_output_file(path: Path) -> None:
    """Makes the folders of an output file before the work starts; raises ConfigError where it could not be written."""
    if path.is_dir():
        raise ConfigError("the output file is a folder", found=path, hint="name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise ConfigError(f"the folder of {path} cannot be made", found=error.strerror) from error
    if not writable:
        raise ConfigError(f"{path} cannot be written", found=f"no permission to write in {path.parent}")


def full_rows(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], max_output_len: int, fill_id: int
) -> numpy.ndarray:
    """Prompt and new tokens of each row, then `fill_id`: int32 [B, longest prompt + max_output_len]."""
    import numpy as np

    rows = np.full((len(prompts), max(map(len, prompts)) + max_output_len), fill_id, dtype=np.int32)
    for row, prompt, output in zip(rows, prompts, outputs, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(output)] = output
    return rows


def write_csv(path: Path, rows: numpy.ndarray) -> None:
    """One line of comma-separated ids per row, CRLF at its end."""
    with whole_file(path) as file:
        for row in rows.tolist():
            file.write((",".join(map(str, row)) + "\r\n").encode())


def write_npy(path: Path, rows: numpy.ndarray) -> None:
    import numpy as np

    with whole_file(path) as file:
        np.save(file, rows)
