"""Texts with references: from a local file, from a cache of the `datasets` library, or from the hub."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.console import log
from gpt.errors import ConfigError, Problems, brief
from gpt.text.hub import use_cache_when_offline

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT = "test"


@dataclass(frozen=True)
class HubData:
    """A data set on the hub, the version of it, its columns of texts and of references, the split that is read, and the
    flag that names a file to read in its place."""

    name: str
    version: str | None
    text_column: str
    reference_column: str = ""
    split: str = _SPLIT
    flag: str = "--dataset_path"


CNN_DAILYMAIL = HubData("abisee/cnn_dailymail", "3.0.0", "article", "highlights")
HUMANEVAL = HubData("openai/openai_humaneval", "openai_humaneval", "prompt", "canonical_solution")


@dataclass(frozen=True)
class Article:
    """A text to summarise or to continue; `number` counts from 0 in the order of the data set."""

    number: int
    text: str
    reference: str


def load_articles(
    path: Path | None, article_column: str, highlights_column: str, limit: int, hub: HubData = CNN_DAILYMAIL
) -> list[Article]:
    """The first `limit` articles of a file, of the `test` split in a folder, or (None) of `hub`.

    Raises ConfigError for data that is not there, has no rows, lacks a column or has something other than text in it.
    """
    rows = rows_of_hub(hub, None) if path is None else _rows_of_path(path, hub)
    source = hub.name if path is None else str(path)
    articles: list[Article] = []
    problems = Problems()
    for number, row in enumerate(itertools.islice(rows, limit)):
        _check_columns(row, (article_column, highlights_column), source)
        values = row[article_column], row[highlights_column]
        for column, value in zip((article_column, highlights_column), values, strict=True):
            if not isinstance(value, str) or not value.strip():
                problems.add(f"row {number + 1}: {column} is {value!r:.80}")
        articles.append(Article(number, *values))
    problems.raise_if_any(ConfigError, f"{source} has rows without text", hint="mend or remove them")
    if not articles:
        raise ConfigError(f"{source} has no rows", allowed="at least one")
    log.info("Texts from %s: %d, at most %d by --batch_size and --max_ite", source, len(articles), limit)
    return articles


def _check_columns(row: Mapping[str, Any], columns: Iterable[str], source: str) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise ConfigError(
            f"{source} has no column {' and no column '.join(missing)}",
            found=", ".join(map(str, row)),
            hint="--article_column and --highlights_column name the columns to use",
        )


def _rows_of_path(path: Path, hub: HubData) -> Iterator[Mapping[str, Any]]:
    if path.is_dir():
        return _rows_of_folder(path, hub)
    if path.suffix.lower() not in FILE_SUFFIXES:
        allowed = f"{', '.join(FILE_SUFFIXES)} or a folder"
        raise ConfigError(f"no data set in {path}", found=path.suffix or "no such folder", allowed=allowed)
    if not path.is_file():
        raise ConfigError(f"there is no data set {path}", hint="--dataset_path names a file or a folder")
    return rows_of_file(path)


def rows_of_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of FILE_SUFFIXES.  Raises ConfigError where it cannot be read as what its name says."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        for row in readers[path.suffix.lower()](path):
            if not isinstance(row, Mapping):
                raise ConfigError(f"{path} holds no rows with columns", found=type(row).__name__, allowed="objects")
            yield row
    except (ValueError, csv.Error) as error:  # covers broken JSON, other encodings and pyarrow's errors
        allowed = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else None
        raise ConfigError(f"{path} cannot be read as {path.suffix}", found=error, allowed=allowed) from error


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, character {error.pos + 1}: {error.msg}") from error


def _read_json(path: Path) -> Iterable[Any]:
    """A list of objects, an object of equally long lists, or either below a key `data`."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and "data" in content:
        content = content["data"]
    if isinstance(content, dict):
        if not all(isinstance(column, list) for column in content.values()):
            return [content]
        return (dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True))
    return content if isinstance(content, list) else [content]


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # articles are longer than the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _rows_of_folder(path: Path, hub: HubData) -> Iterator[Mapping[str, Any]]:
    """A saved data set, files of the test split somewhere below, or else the cache folder for a download."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        if not isinstance(saved, DatasetDict):
            return iter(saved)
        if _SPLIT not in saved:
            raise ConfigError(f"{path} has no split {_SPLIT!r}", found=", ".join(map(str, saved)))
        return iter(saved[_SPLIT])
    cached = sorted(path.rglob(f"*{_SPLIT}*.arrow"))
    if cached:
        from datasets import Dataset

        return itertools.chain.from_iterable(Dataset.from_file(str(file)) for file in cached)
    for suffix in (".parquet", ".jsonl", ".json", ".csv"):
        files = sorted(path.rglob(f"*{_SPLIT}*{suffix}"))
        if files:
            return itertools.chain.from_iterable(map(rows_of_file, files))
    return rows_of_hub(hub, path)


def rows_of_hub(hub: HubData, cache_dir: Path | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set from the hub or its cache.  Raises ConfigError where neither has it."""
    online = use_cache_when_offline()
    from datasets import load_dataset

    cache = None if cache_dir is None else str(cache_dir)
    try:
        return iter(load_dataset(hub.name, hub.version, split=hub.split, cache_dir=cache))
    except Exception as error:  # the library raises many kinds, from ConnectionError to its own
        where = "the default cache" if cache_dir is None else str(cache_dir)
        reason = "the hub refused" if online else "no hub reachable"
        raise ConfigError(
            f"the data set {hub.name} cannot be loaded",
            found=f"{reason}, and it is not in {where}: {brief(error)}",
            hint=f"{hub.flag} <file> reads a file with "
            + (f"the columns {hub.text_column} and {hub.reference_column}" if hub.reference_column else "texts"),
        ) from error
