"""Archives from strangers: whatever is in them, nothing is written outside, run, or left behind."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_nemo import save_files, save_model, tiny_config, tiny_state, torch_bytes

from gpt.checkpoint.nemo_archive import find_config, read_yaml, unpack, unpacked
from gpt.errors import CheckpointError, ConfigError, GptError
from nemo_ckpt_convert import ProgArgs, run_conversion


def member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return path


def refuse(source: Path, tmp_path: Path, kind: type[GptError] = CheckpointError) -> str:
    """The message of a conversion that must fail and leave nothing, neither in the output folder nor around it."""
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(kind) as raised:
        run_conversion(ProgArgs(out_dir=str(tmp_path / "out"), in_file=str(source)))
    assert sorted(path for path in tmp_path.rglob("*")) == before
    return str(raised.value)


HOSTILE: dict[str, tuple[Callable[[Path], tuple[tarfile.TarInfo, bytes]], str]] = {
    "absolute": (lambda root: member(str(root / "evil")), "absolute"),
    "absolute in Windows": (lambda root: member("C:\\evil"), "absolute"),
    "parent": (lambda root: member("../evil"), "out of the archive"),
    "parent further in": (lambda root: member("a/../../evil"), "out of the archive"),
    "parent in Windows": (lambda root: member("a\\..\\..\\evil"), "out of the archive"),
    "symbolic link": (
        lambda root: member("model_config.yaml", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "symbolic link",
    ),
    "hard link": (
        lambda root: member("model_config.yaml", b"", type=tarfile.LNKTYPE, linkname="../../secret"),
        "hard link",
    ),
    "device": (lambda root: member("null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "special file"),
    "pipe": (lambda root: member("pipe", b"", type=tarfile.FIFOTYPE), "special file"),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(("make", "word"), HOSTILE.values(), ids=HOSTILE)
def test_unsafe_members_are_refused(
    make: Callable[[Path], tuple[tarfile.TarInfo, bytes]], word: str, mode: str, tmp_path: Path
) -> None:
    first = member("model_config.yaml.txt", b"harmless")
    source = archive(tmp_path / "hostile.nemo", first, make(tmp_path), mode=mode)
    message = refuse(source, tmp_path)
    assert word in message
    assert "unsafe archive" in message


def test_a_file_that_would_replace_another_is_refused(tmp_path: Path) -> None:
    source = archive(tmp_path / "twice.nemo", member("./a", b"1"), member("a", b"2"))
    assert "twice" in refuse(source, tmp_path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    num_bytes = 200 << 20
    with gzip.open(tmp_path / "bomb.nemo", "wb", compresslevel=1) as file:
        file.write(member("model_weights.ckpt", b"", size=num_bytes)[0].tobuf())
        for _ in range(num_bytes >> 20):
            file.write(bytes(1 << 20))
    message = refuse(tmp_path / "bomb.nemo", tmp_path)
    assert "200.0 MiB or more" in message


def test_a_header_that_claims_a_gigabyte_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1 << 30
    (tmp_path / "header.nemo").write_bytes(info.tobuf() + bytes(4096))
    assert "a header of 1.0 GiB" in refuse(tmp_path / "header.nemo", tmp_path)


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = archive(tmp_path / "big.nemo", member("model_weights.ckpt", bytes(1000)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Free)
    assert "not enough space" in refuse(source, tmp_path, GptError)


class _Free:
    free = 999


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_truncated_archive_is_refused(share: float, mode: str, tmp_path: Path) -> None:
    config = tiny_config()
    whole = save_model(tmp_path / "whole.nemo", config, tiny_state(config), mode=mode).read_bytes()
    (tmp_path / "part.nemo").write_bytes(whole[: int(len(whole) * share)])
    assert "damaged" in refuse(tmp_path / "part.nemo", tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file", "tar file"),
        (b"\x1f\x8b no gzip", "tar file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_archive_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "strange.nemo").write_bytes(content)
    assert word in refuse(tmp_path / "strange.nemo", tmp_path)


def test_a_missing_archive_is_a_wrong_command_line(tmp_path: Path) -> None:
    assert "no such archive" in refuse(tmp_path / "absent.nemo", tmp_path, ConfigError)


def test_the_unpacked_files_are_removed_again(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.nemo", member("folder/file", b"content"))
    with unpacked(source, tmp_path / "scratch") as folder:
        assert (folder / "folder" / "file").read_bytes() == b"content"
    assert not (tmp_path / "scratch").exists()
    with unpacked(tmp_path, tmp_path / "scratch") as folder:
        assert folder == tmp_path


def test_the_size_of_an_archive_is_counted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert unpack(archive(tmp_path / "a.nemo", member("a", b"123"), member("b", b"45")), tmp_path / "out") == 5


class _Code:
    """Pickled, it is a command that makes the file `trace`."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_code_in_a_pickle_is_not_run_but_named(tmp_path: Path) -> None:
    config = tiny_config()
    files = save_model(tmp_path / "tiny", config, tiny_state(config), mode=None)
    weights = torch_bytes({"state_dict": tiny_state(config), "more": _Code(tmp_path / "trace")})
    (files / "model_weights.ckpt").write_bytes(weights)
    message = refuse(files, tmp_path)
    assert "system" in message
    assert "never run" in message
    archive = save_files(tmp_path / "tiny.nemo", {path.name: path.read_bytes() for path in files.iterdir()})
    # Of the archive, not of a folder that is gone when the message is read.
    assert f"refused or corrupt: {archive}: model_weights.ckpt\n" in refuse(archive, tmp_path)


def test_two_configurations_are_refused_and_named(tmp_path: Path) -> None:
    source = save_files(tmp_path / "two.nemo", {"model_config.yaml": b"a: 1", "other/model_config.yaml": b"a: 1"})
    message = refuse(source, tmp_path)
    assert "model_config.yaml" in message
    assert "other/model_config.yaml" in message


def test_an_archive_without_configuration_says_what_it_has(tmp_path: Path) -> None:
    assert "epoch=3.ckpt" in refuse(save_files(tmp_path / "none.nemo", {"epoch=3.ckpt": b"x"}), tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: !!python/object/apply:os.mkdir [trace]", "python/object"),
        ("a: !tag b", "!tag"),
        ("a: [1, 2", "damaged"),
        ("just words", "keys and values"),
        ("\x00", "damaged"),
        ("a: " + "[" * 5000, "damaged"),
    ],
)
def test_yaml_with_tags_or_damage_is_refused(
    text: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuse(save_files(tmp_path / "bad.nemo", {"model_config.yaml": text.encode()}), tmp_path)
    assert word in message


def test_a_yaml_below_the_root_is_found(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "model_config.yaml").write_text("hidden_size: 8")
    assert read_yaml(find_config(tmp_path)) == {"hidden_size": 8}
