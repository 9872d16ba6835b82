"""Strings to token ids and back.

The files decide who does it: `tokenizer.json`, or byte-level `vocab.json` + `merges.txt`, go to `tokenizers`;
`*.model` goes to `sentencepiece`; every other format, and names on the model hub, go to `transformers`, which takes
seconds to import and is therefore the last resort.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt.errors import ConfigError, brief
from gpt.files import listing
from gpt.text.hub import use_cache_when_offline

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """`end_id` ends a text; None where the files name no such token."""

    name: str
    vocab_size: int
    end_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added in front or behind."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids that the tokenizer does not know become U+FFFD."""
        ...


def load_tokenizer(location: str | Path) -> Tokenizer:
    """A tokenizer from a sentencepiece file, a local folder, or a name on the model hub (a local folder wins).

    Raises ConfigError where there is none or its files are damaged.
    """
    path = Path(location)
    if path.is_file() or path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        if path.is_absolute() or str(location).startswith((".", "~")):
            raise ConfigError("no such tokenizer folder", found=location)
        return TransformersTokenizer(str(location))
    if (path / "tokenizer.json").is_file():
        return FastTokenizer(path, _read_tokenizer_json(path / "tokenizer.json"))
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        byte_level = _read_byte_level_bpe(path)
        if byte_level is not None:
            return FastTokenizer(path, byte_level)
    if (path / "tokenizer_config.json").is_file():
        return TransformersTokenizer(str(location))
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(models[0])
    raise ConfigError(
        f"no tokenizer in {path}",
        found=listing(path),
        allowed="tokenizer.json, vocab.json with merges.txt, tokenizer_config.json, or one *.model file",
    )


class FastTokenizer:
    """A `tokenizers` tokenizer with the end token that the folder's configuration names."""

    def __init__(self, folder: Path, core: tokenizers.Tokenizer):
        core.no_padding()
        core.no_truncation()
        self.name = str(folder)
        self.vocab_size = core.get_vocab_size(with_added_tokens=True)
        self.end_id = _find_end_id(folder, core.token_to_id)
        self._core = core

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        def decode_known(known: list[int]) -> str:
            return self._core.decode(known, skip_special_tokens=skip_special)

        return _decode_runs(ids, lambda token: self._core.id_to_token(token) is not None, decode_known)


class SentencePieceTokenizer:
    """A sentencepiece model file.  Control pieces (<s>, </s>, padding) are its special tokens and have no text."""

    def __init__(self, path: Path):
        import sentencepiece

        if not path.is_file():
            raise ConfigError("no such sentencepiece model", found=path, hint="--vocab_file names a *.model file")
        self._core: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._core.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{path} is no sentencepiece model", found=error) from error
        self.name = str(path)
        self.vocab_size = self._core.GetPieceSize()
        self.end_id = self._core.eos_id() if self._core.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return list(self._core.EncodeAsIds(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        def decode_known(known: list[int]) -> str:
            return self._core.DecodeIds(known)

        return _decode_runs(ids, lambda token: 0 <= token < self.vocab_size, decode_known)


class TransformersTokenizer:
    """Whatever `transformers` can load, without running code from the repository it comes from."""

    def __init__(self, location: str):
        use_cache_when_offline()
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConfigError(f"the tokenizer {location!r} needs the package transformers", found=error) from error
        try:
            self._core: Any = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for unusable files
            raise ConfigError(
                f"no tokenizer could be loaded from {location!r}",
                found=brief(error),
                hint="--tokenizer takes a local folder or a name on the model hub, --vocab_file a sentencepiece model",
            ) from error
        self.name = location
        self.vocab_size = len(self._core)
        self.end_id: int | None = self._core.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self._core.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        def decode_known(known: list[int]) -> str:
            return self._core.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

        return _decode_runs(ids, lambda token: 0 <= token < self.vocab_size, decode_known)


def _decode_runs(ids: Sequence[int], is_known: Callable[[int], bool], decode_known: Callable[[list[int]], str]) -> str:
    """Decodes the stretches between unknown ids, which come from models with more tokens than their tokenizer."""
    parts: list[str] = []
    run: list[int] = []
    for token in ids:
        if is_known(token):
            run.append(token)
            continue
        parts += [decode_known(run), "\ufffd"]
        run = []
    return "".join([*parts, decode_known(run)])


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is no tokenizer", found=error) from error


def _read_byte_level_bpe(folder: Path) -> tokenizers.Tokenizer | None:
    """GPT-2's own file pair; None where the vocabulary is not byte-level (a space is not spelled as U+0120)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = _read_json(folder / "vocab.json")
    if "\u0120" not in vocabulary:
        return None
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"vocab.json and merges.txt in {folder} are no tokenizer", found=error) from error
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {END_OF_TEXT, *_configured_tokens(folder)}
    core.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in sorted(names) if name in vocabulary]
    )
    return core


def _configured_tokens(folder: Path) -> dict[str, str]:
    """{token: role} of the special tokens that tokenizer_config.json and special_tokens_map.json name."""
    result: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, value in _read_json(folder / file_name).items():
            token = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(token, str):
                # GPT-2 gives one token several roles; the one that matters here is the end.
                result[token] = "eos_token" if role == "eos_token" else result.get(token, role)
    return result


def _find_end_id(folder: Path, token_to_id: Callable[[str], int | None]) -> int | None:
    """From the tokenizer's own configuration, else from the model's, else GPT-2's token where the vocabulary has it."""
    for token, role in _configured_tokens(folder).items():
        if role == "eos_token" and token_to_id(token) is not None:
            return token_to_id(token)
    for file_name in ("generation_config.json", "config.json"):
        value = _read_json(folder / file_name).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return token_to_id(END_OF_TEXT)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON", found=error) from error
    return value if isinstance(value, dict) else {}
