"""Folders that are whole or absent, and checksums."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.errors import ConfigError
from gpt.files import file_checksum, staged_folder, write_text


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_staged_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "1-gpu"
    with staged_folder(target, force=False, marker="config.ini") as staging:
        (staging / "config.ini").write_text("x", encoding="utf-8")
        assert not target.exists()
    assert listing(target.parent) == ["1-gpu"]
    assert listing(target) == ["config.ini"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "new/1-gpu", force=False, marker="m") as staging:
            write_text(staging / "m", "text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert listing(tmp_path) == []


def test_an_old_folder_is_replaced_with_force_after_success_only(tmp_path: Path) -> None:
    target = tmp_path / "1-gpu"
    target.mkdir()
    write_text(target / "config.ini", "old")
    with pytest.raises(ConfigError, match="in use"), staged_folder(target, force=False, marker="config.ini"):
        pass
    with pytest.raises(ValueError, match="broken"), staged_folder(target, force=True, marker="config.ini"):
        raise ValueError("broken")
    assert (target / "config.ini").read_text(encoding="utf-8") == "old"
    with staged_folder(target, force=True, marker="config.ini") as staging:
        write_text(staging / "config.ini", "new")
        assert (target / "config.ini").read_text(encoding="utf-8") == "old"
    assert (target / "config.ini").read_text(encoding="utf-8") == "new"
    assert listing(tmp_path) == ["1-gpu"]


def test_a_folder_with_something_else_is_left_alone_even_with_force(tmp_path: Path) -> None:
    write_text(tmp_path / "thesis.txt", "text")
    with pytest.raises(ConfigError, match="something else"), staged_folder(tmp_path, force=True, marker="config.ini"):
        pass
    assert listing(tmp_path) == ["thesis.txt"]


def test_two_at_once_do_not_overwrite_each_other(tmp_path: Path) -> None:
    target = tmp_path / "1-gpu"

    def lose_the_race() -> None:
        with staged_folder(target, force=False, marker="m"):
            target.mkdir()
            write_text(target / "m", "the faster one")

    with pytest.raises(ConfigError, match="in use"):
        lose_the_race()
    assert listing(tmp_path) == ["1-gpu"]
    assert (target / "m").read_text(encoding="utf-8") == "the faster one"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_cleaned_up(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = tmp_path / f".1-gpu.partial-{host}-{dead_process()}"
    alive = tmp_path / f".1-gpu.partial-{host}-{os.getppid()}"
    elsewhere = tmp_path / ".1-gpu.partial-some.other.host-1"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    with staged_folder(tmp_path / "1-gpu", force=False, marker="m"):
        pass
    assert listing(tmp_path) == sorted(["1-gpu", alive.name, elsewhere.name])


def test_an_old_folder_set_aside_by_a_dead_process_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / f".1-gpu.old-{socket.gethostname()}-{dead_process()}"
    aside.mkdir()
    write_text(aside / "m", "old")
    with pytest.raises(ConfigError, match="in use"), staged_folder(tmp_path / "1-gpu", force=False, marker="m"):
        pass
    assert (tmp_path / "1-gpu" / "m").read_text(encoding="utf-8") == "old"


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    import xxhash

    data = bytes(range(256)) * 20_000  # more than one read
    (tmp_path / "data").write_bytes(data)
    assert file_checksum(tmp_path / "data") == xxhash.xxh3_128_hexdigest(data)


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert listing(tmp_path) == ["pipe"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
