"""The tokenizer in a NeMo archive: its files, their size and the ids that begin and end a text."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from gpt.console import log
from gpt.errors import CheckpointError, Problems

_END_OF_TEXT = "<|endoftext|>"
# Key of the yaml's tokenizer section, name of the copy beside the weights, what to look for if the key names no member.
_FILES = (
    ("model", "tokenizer.model", "*.model"),
    ("vocab_file", "vocab.json", "*vocab*"),
    ("merge_file", "merges.txt", "*merge*.txt"),
)


@dataclass(frozen=True)
class NemoTokenizer:
    """`files` maps names beside the weights to files in the archive; `size` is None where nothing tells."""

    files: Mapping[str, Path] = field(default_factory=dict)
    size: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None

    def check_against(self, vocab_size: int) -> None:
        """Raises CheckpointError where tokens have no row in an embedding of `vocab_size` rows."""
        if self.size is None or self.size == vocab_size:
            return
        if self.size > vocab_size:
            raise CheckpointError(
                "the tokenizer has more tokens than the embedding has rows",
                found=f"{self.size} tokens in {', '.join(sorted(path.name for path in self.files.values()))}",
                allowed=f"at most {vocab_size}",
                hint="tokenizer and weights come from different models, or tokens were added after the training",
            )
        log.info(
            "the embedding has %d rows for %d tokens: NeMo pads it; ids from %d on are virtual tokens",
            vocab_size,
            self.size,
            vocab_size,
        )


@contextmanager
def tokenizer_folder(tokenizer: NemoTokenizer) -> Iterator[Path | None]:
    """A folder in which the tokenizer's files have the names that readers look for; None without files."""
    if not tokenizer.files:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nemo-tokenizer-") as folder:
        for name, path in tokenizer.files.items():
            shutil.copyfile(path, Path(folder) / name)
        yield Path(folder)


def find_tokenizer(folder: Path, section: Mapping[str, Any]) -> NemoTokenizer:
    """The tokenizer that the yaml's `section` describes, looked for in `folder`.

    What is not in the archive is said in the log: the model is useful without.  Raises CheckpointError for files that
    are ambiguous or damaged.
    """
    problems = Problems()
    files: dict[str, Path] = {}
    for key, file_name, pattern in _FILES:
        matches = _matches(folder, section.get(key), pattern)
        if len(matches) > 1:
            problems.add(f"{key}: found {', '.join(path.name for path in matches)}, allowed: one file")
        elif matches:
            files[file_name] = matches[0]
    problems.raise_if_any(CheckpointError, "the archive's tokenizer is ambiguous")
    if "tokenizer.model" in files:
        return _sentencepiece(files["tokenizer.model"])
    if {"vocab.json", "merges.txt"} <= files.keys():
        return _byte_level_bpe(files)
    if name := section.get("type") or section.get("model"):
        log.warning("the archive only names its tokenizer, %s (%s): give it to run.py", name, section.get("library"))
    else:
        log.warning("the archive has no tokenizer: give run.py one")
    return NemoTokenizer()


def _matches(folder: Path, value: object, pattern: str) -> list[Path]:
    if value is None or value in ("", "None"):
        return []
    text = str(value)
    if text.startswith(("nemo:", "/artifacts/")):
        pattern = "*" + PureWindowsPath(text.removeprefix("nemo:")).name
    else:
        log.info("tokenizer file %s: looked for as %s in the archive", text, pattern)
    name = pattern.removeprefix("*")
    paths = sorted(path for path in folder.glob("*") if path.is_file())
    if "*" not in name:  # a name may hold characters that mean something in a pattern
        return [path for path in paths if path.name.endswith(name)]
    return [path for path in paths if path.match(pattern)]


def _sentencepiece(path: Path) -> NemoTokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"damaged tokenizer: {path.name}", found=error, allowed="a sentencepiece model"
        ) from error

    def control(token_id: int, piece: str) -> int | None:
        if token_id < 0:
            token_id = model.PieceToId(piece)
        return None if token_id in (-1, model.unk_id()) else token_id

    bos_id, eos_id = control(model.bos_id(), "<s>"), control(model.eos_id(), "</s>")
    if eos_id is None:
        log.warning("%s has no end token: generation stops at its limit only", path.name)
    return NemoTokenizer({"tokenizer.model": path}, model.GetPieceSize(), bos_id, eos_id)


def _byte_level_bpe(files: Mapping[str, Path]) -> NemoTokenizer:
    path = files["vocab.json"]
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        size = 1 + max(vocabulary.values())
        end_id = vocabulary.get(_END_OF_TEXT)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise CheckpointError(f"damaged tokenizer: {path.name}", found=error, allowed="tokens and their ids") from error
    if end_id is None:
        log.warning("%s has no %s: generation stops at its limit only", path.name, _END_OF_TEXT)
    return NemoTokenizer({name: files[name] for name in ("vocab.json", "merges.txt")}, size, end_id, end_id)
