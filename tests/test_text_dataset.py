"""Articles from every kind of file and folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from gpt.errors import ConfigError
from gpt.text.dataset import Article, load_articles

ROWS = [{"article": f"text {n}, naïve\nline 2", "highlights": f"summary {n}", "id": str(n)} for n in range(5)]


def _load(path: Path | None, limit: int = 100, columns: tuple[str, str] = ("article", "highlights")) -> list[Article]:
    return load_articles(path, *columns, limit)


def _expected(count: int) -> list[Article]:
    return [Article(n, row["article"], row["highlights"]) for n, row in enumerate(ROWS[:count])]


def _write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"articles{suffix}")
    assert _load(path) == _expected(5)
    assert _load(path, limit=3) == _expected(3)


@pytest.mark.parametrize(
    "content",
    [
        {"data": ROWS},
        {key: [row[key] for row in ROWS] for key in ROWS[0]},
        {"data": {k: [r[k] for r in ROWS] for k in ROWS[0]}},
    ],
)
def test_json_shapes(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert _load(tmp_path / "a.json") == _expected(5)


def test_long_csv_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("article,highlights\n" + "word " * 60000 + ",short\n")
    assert len(_load(tmp_path / "a.csv")[0].text) == 300000


def test_columns_by_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl")
    assert _load(path, 1, ("highlights", "id")) == [Article(0, "summary 0", "0")]


def test_folders(tmp_path: Path) -> None:
    """The test split of a saved data set, of the library's cache and of a folder of files; a saved split."""
    from datasets import Dataset, DatasetDict

    test = Dataset.from_list(ROWS)
    train = Dataset.from_list([{**row, "article": "train"} for row in ROWS])
    DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "saved"))
    test.save_to_disk(str(tmp_path / "split"))
    cache = tmp_path / "cache" / "cnn_dailymail" / "3.0.0" / "0123"
    cache.mkdir(parents=True)
    for name, rows in (("train", train), ("test", test)):
        rows.save_to_disk(str(tmp_path / name))
        (tmp_path / name / "data-00000-of-00001.arrow").rename(cache / f"cnn_dailymail-{name}.arrow")
    (tmp_path / "files").mkdir()
    _write(tmp_path / "files" / "test-00000.parquet")
    (tmp_path / "files" / "train-00000.jsonl").write_text("{}")
    for name in ("saved", "split", "cache", "files"):
        assert _load(tmp_path / name) == _expected(5), name


def test_saved_data_without_a_test_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="no split 'test'"):
        _load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x", "summary": "y"}', ["no column article", "text, summary", "--article_column"]),
        ("a.csv", "article,summary\nx,y\n", ["no column highlights", "article, summary"]),
        ("a.jsonl", "", ["has no rows"]),
        ("a.csv", "article,highlights\n", ["has no rows"]),
        ("a.json", "[]", ["has no rows"]),
        ("a.json", "[1]", ["no rows with columns"]),
        ("a.json", "{", ["cannot be read as .json"]),
        ("a.jsonl", '{"article": 1, "highlights": "x"}', ["row 1: article is 1"]),
        ("a.jsonl", '{"article": "x", "highlights": " "}', ["row 1: highlights is ' '"]),
        ("a.jsonl", b"\xff\xff", ["cannot be read as .jsonl", "UTF-8 text"]),
        ("a.parquet", "no parquet", ["cannot be read as .parquet"]),
        ("a.txt", "x", ["no data set in", ".jsonl"]),
    ],
)
def test_bad_data_is_explained(tmp_path: Path, name: str, content: str | bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        _load(path)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent"])
def test_missing_paths_are_explained(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="data set"):
        _load(tmp_path / name)


@pytest.mark.parametrize("use_folder", [True, False])
def test_offline_the_next_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_folder: bool) -> None:
    import datasets

    asked: list[object] = []

    def unreachable(*args: object, **options: object) -> None:
        asked.extend([*args, options["split"], options["cache_dir"]])
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path if use_folder else None)
    assert asked == ["abisee/cnn_dailymail", "3.0.0", "test", str(tmp_path) if use_folder else None]
    assert "no hub reachable" in str(caught.value)
    assert "--dataset_path <file>" in str(caught.value)


def test_bundled_articles() -> None:
    articles = _load(Path(__file__).parents[1] / "assets" / "articles.jsonl", limit=1000)
    assert len(articles) == 100
    assert len({article.text for article in articles}) == 100
