"""The texts that activations are measured on: a file, a data set on the hub, or what comes with this project."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.console import log
from gpt.errors import ConfigError, Problems
from gpt.text.dataset import FILE_SUFFIXES, HubData, rows_of_file, rows_of_hub
from gpt.text.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", *FILE_SUFFIXES)
BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "calibration.txt"
_HINT = f"--calib-data {BUNDLED} is always there"
_COLUMN, _SPLIT, _FLAG = "text", "validation", "--calib-data"
# The data set of the original, under the name that the hub has for it today.
LAMBADA = HubData("cimec/lambada", None, _COLUMN, split=_SPLIT, flag=_FLAG)


def load_texts(data: str | None, column: str, size: int, cache_dir: str | None) -> tuple[str, list[str]]:
    """Where the texts come from, and the first `size` of them.

    data: a file (paragraphs of .txt, `column` of the others) or a data set's name on the hub; None for the original's
    data set where it can be had, else the project's own text.  Raises ConfigError for what is not there or has no text.
    """
    if data is None:
        source, rows = _default_rows(cache_dir)
        column = _COLUMN
    elif _names_a_file(data):
        source, rows = data, _rows_of_path(Path(data).expanduser(), column)
    else:
        hub = HubData(data, None, column, split=_SPLIT, flag=_FLAG)
        source, rows = data, rows_of_hub(hub, Path(cache_dir) if cache_dir else None)
    texts = list(itertools.islice(_texts(rows, column, source), size))
    if not texts:
        empty = _names_a_file(source) and Path(source).expanduser().stat().st_size == 0
        raise ConfigError(
            f"no text to calibrate on: {source}",
            found="an empty file" if empty else "no rows, or nothing but blanks in them",
            allowed="at least one text",
            hint=_HINT,
        )
    if len(texts) < size:
        log.info("%s has %d texts; --calib-size %d would take more", source, len(texts), size)
    return source, texts


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer, length: int, vocab_size: int) -> list[list[int]]:
    """The first `length` token ids of each text that has any.  Raises ConfigError where the model does not know them,
    which is where tokenizer and model do not belong together."""
    samples = [ids for text in texts if (ids := tokenizer.encode(text)[:length])]
    if not samples:
        raise ConfigError("the tokenizer makes no tokens of the calibration texts", found=tokenizer.name)
    largest = max(max(ids) for ids in samples)
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer does not belong to the model: {tokenizer.name}",
            found=f"token id {largest}",
            allowed=f"0 to {vocab_size - 1}",
            hint="--calib-tokenizer names the model's own",
        )
    return samples


def _names_a_file(data: str) -> bool:
    path = Path(data).expanduser()
    return path.exists() or path.is_absolute() or data.startswith(".") or path.suffix.lower() in TEXT_SUFFIXES


def _default_rows(cache_dir: str | None) -> tuple[str, Iterator[Mapping[str, Any]]]:
    try:
        return LAMBADA.name, rows_of_hub(LAMBADA, Path(cache_dir) if cache_dir else None)
    except ConfigError as error:
        log.info("%s (%s): calibrating on %s; --calib-data names another text", error.what, error.found, BUNDLED.name)
        return f"{BUNDLED.parent.name}/{BUNDLED.name}", _rows_of_path(BUNDLED, _COLUMN)


def _rows_of_path(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    if not path.is_file() or path.suffix.lower() not in TEXT_SUFFIXES:
        raise ConfigError(
            f"no calibration text: {path}",
            found="no such file" if not path.exists() else "a folder" if path.is_dir() else path.suffix or "no suffix",
            allowed=f"a file of {', '.join(TEXT_SUFFIXES)}, or a data set's name on the hub",
            hint=_HINT,
        )
    if path.suffix.lower() != ".txt":
        return rows_of_file(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text", found=error, hint="iconv -t utf-8 converts it") from error
    paragraphs = "\n".join(line.strip() for line in content.splitlines()).split("\n\n")
    return iter([{column: paragraph.strip()} for paragraph in paragraphs])


def _texts(rows: Iterable[Mapping[str, Any]], column: str, source: str) -> Iterator[str]:
    problems = Problems()
    for number, row in enumerate(rows, start=1):
        if column not in row:
            found = ", ".join(map(str, row))
            raise ConfigError(
                f"{source} has no column {column}", found=found, hint="--calib-column names the one to use"
            )
        if not isinstance(row[column], str):
            problems.add(f"row {number}: {column} is {row[column]!r}")
            problems.raise_if_any(ConfigError, f"{source} has rows without text", hint="mend or remove it")
        if row[column].strip():
            yield row[column]
