"""Files of prompts in, files of token ids out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt.errors import ConfigError
from gpt.text.prompts import (
    TOKEN_SUFFIXES,
    check_input_file,
    check_output_file,
    full_rows,
    read_tokens,
    write_csv,
    write_npy,
)

END = 9


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_rows_may_differ_in_length(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", b"\xef\xbb\xbf1,2,3\r\n4\r\n 5 ,9\r\n")
    assert read_tokens(path, END) == [[1, 2, 3], [4], [5, 9]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_npy_padding_is_stripped_at_the_end_only(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, END, 2, END, END], [END, 3, 4, 5, 6]], dtype=dtype))
    assert read_tokens(tmp_path / "a.npy", END) == [[1, END, 2], [END, 3, 4, 5, 6]]
    assert read_tokens(tmp_path / "a.npy", None) == [[1, END, 2, END, END], [END, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompts"),
        (b"1,2\n\n3\n", "row 2: an empty prompt"),
        (b"1,two,3\nhello world\n", "row 1, column 2: 'two'"),
        (b"1,two,3\nhello world\n", "row 2, column 1: 'hello world'"),
        (b"1,,3\n", "row 1, column 2: an empty cell"),
        (b"1,2,\n", "row 1, column 3: an empty cell"),
        (b"1.5\n", "row 1, column 1: '1.5'"),
        (b"\xff\xfe1\x00", "cannot be read as token ids"),
    ],
)
def test_bad_csv_is_explained(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tokens(_file(tmp_path, "a.csv", content), END)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones((2, 3), np.float32), "float32 [2, 3]"),
        (np.ones((1, 2, 3), np.int32), "int32 [1, 2, 3]"),
        (np.ones(3, np.int32), "int32 [3]"),
        (np.ones((2, 3), bool), "bool [2, 3]"),
        (np.ones((0, 3), np.int32), "no rows"),
        (np.array([[1, 2], [END, END]], np.int32), "row 2: an empty prompt"),
    ],
)
def test_bad_npy_is_explained(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError) as caught:
        read_tokens(tmp_path / "a.npy", END)
    assert expected in str(caught.value)


def test_pickles_and_garbage_are_no_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[1], [2, 3]], dtype=object))
    for path in (tmp_path / "objects.npy", _file(tmp_path, "text.npy", "1,2"), _file(tmp_path, "empty.npy", "")):
        with pytest.raises(ConfigError, match="is no numpy array"):
            read_tokens(path, END)


def test_input_files_are_checked(tmp_path: Path) -> None:
    _file(tmp_path, "a.json", "")
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("a.json", "format not supported"),
        ("b", "format not supported"),
        ("c.csv", "no such input file"),
        ("folder.csv", "is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_input_file(tmp_path / name, TOKEN_SUFFIXES)


def test_whole_rows_are_written(tmp_path: Path) -> None:
    rows = full_rows([[1, 2, 3], [4]], [[5, END], [6, 7, 8]], max_output_len=3, fill_id=END)
    expected = [[1, 2, 3, 5, END, END], [4, 6, 7, 8, END, END]]
    assert rows.dtype == np.int32
    assert rows.tolist() == expected
    csv_path, npy_path = tmp_path / "deep" / "er" / "a.csv", tmp_path / "deep" / "a.npy"
    for path in (csv_path, npy_path):
        check_output_file(path)
    write_csv(csv_path, rows)
    write_npy(npy_path, rows)
    assert csv_path.read_bytes() == b"1,2,3,5,9,9\r\n4,6,7,8,9,9\r\n"
    loaded = np.load(npy_path)
    assert loaded.dtype == np.int32
    assert loaded.tolist() == expected
    assert read_tokens(npy_path, END) == [[1, 2, 3, 5], [4, 6, 7, 8]]
    assert sorted(item.name for item in (tmp_path / "deep").rglob("*")) == ["a.csv", "a.npy", "er"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", "old")

    class Interrupted:
        def tolist(self) -> list[list[int]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(path, Interrupted())  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_output_paths_are_refused_before_the_work(tmp_path: Path) -> None:
    file = _file(tmp_path, "file", "")
    with pytest.raises(ConfigError, match="is a folder"):
        check_output_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be made"):
        check_output_file(file / "below" / "a.csv")
