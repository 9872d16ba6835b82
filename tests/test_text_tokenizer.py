"""Tokenizers from every kind of files, and text that appears token by token."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from tiny_models import END_OF_TEXT, save_tokenizer

from gpt.errors import ConfigError
from gpt.text.stream_decoder import StreamDecoder
from gpt.text.streaming import RowText, StreamPrinter, print_results
from gpt.text.tokenizer import FastTokenizer, SentencePieceTokenizer, Tokenizer, TransformersTokenizer, load_tokenizer

TEXT = "In the north: naïve café, 日本語, 🙂 and the end"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def bpe_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bpe"
    folder.mkdir()
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with byte fallback, so that characters outside it are spread over several tokens."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(["the cat sat on the mat", "a naive cafe in the north", "and the end of the line"] * 20))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_byte_level_files_agree_with_tokenizer_json(bpe_folder: Path) -> None:
    whole = load_tokenizer(bpe_folder)
    (bpe_folder / "tokenizer.json").unlink()
    pair = load_tokenizer(bpe_folder)
    assert isinstance(whole, FastTokenizer)
    assert isinstance(pair, FastTokenizer)
    text = f"{TEXT}{END_OF_TEXT}x"
    assert pair.encode(text) == whole.encode(text)
    assert whole.end_id in pair.encode(text)
    assert pair.decode(pair.encode(text), skip_special=False) == text
    assert pair.decode(pair.encode(text)) == f"{TEXT}x"
    assert (pair.vocab_size, pair.end_id) == (whole.vocab_size, whole.end_id) == (264, 263)


def test_encoding_adds_no_special_tokens(bpe_folder: Path) -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import processors

    core = Core.from_file(str(bpe_folder / "tokenizer.json"))
    plain = core.encode("the end").ids
    core.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 263)]
    )
    core.enable_truncation(2)
    core.enable_padding(length=50)
    core.save(str(bpe_folder / "tokenizer.json"))
    assert load_tokenizer(bpe_folder).encode("the end") == plain


def test_end_id_comes_from_the_configuration(bpe_folder: Path) -> None:
    settings = json.loads((bpe_folder / "tokenizer_config.json").read_text())
    (bpe_folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": {"content": "a"}}))
    assert load_tokenizer(bpe_folder).end_id == load_tokenizer(bpe_folder).encode("a")[0]
    (bpe_folder / "tokenizer_config.json").write_text("{}")
    (bpe_folder / "generation_config.json").write_text('{"eos_token_id": [17, 18]}')
    assert load_tokenizer(bpe_folder).end_id == 17
    (bpe_folder / "generation_config.json").unlink()
    assert load_tokenizer(bpe_folder).end_id == 263  # GPT-2's token, by name


def test_sentencepiece_model(sentencepiece_file: Path) -> None:
    import sentencepiece

    core = sentencepiece.SentencePieceProcessor()
    core.Load(str(sentencepiece_file))
    for place in (sentencepiece_file, sentencepiece_file.parent):
        tokenizer = load_tokenizer(place)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.end_id == core.eos_id() == 2  # its own, never GPT-2's 50256
        ids = tokenizer.encode("the cat in 日本")
        assert ids == core.EncodeAsIds("the cat in 日本")
        assert tokenizer.decode([*ids, 2]) == "the cat in 日本"


def test_other_formats_go_to_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "end"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}')
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, TransformersTokenizer)
    assert tokenizer.encode("the end") == [5, 6]
    assert tokenizer.end_id == 3
    assert tokenizer.decode([5, 6, 3]) == "the end"


def test_ids_outside_the_tokenizer_are_shown_as_unknown(bpe_folder: Path, sentencepiece_file: Path) -> None:
    for tokenizer in (load_tokenizer(bpe_folder), load_tokenizer(sentencepiece_file)):
        ids = tokenizer.encode("the end")
        assert tokenizer.decode([*ids, 5000, 5001]) == "the end\ufffd\ufffd"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "no such tokenizer folder"),
        (lambda folder: folder / "absent.model", "no such sentencepiece model"),
        (lambda folder: folder, "no tokenizer in"),
        (lambda folder: _write(folder / "tokenizer.json", "{"), "is no tokenizer"),
        (lambda folder: _write(folder / "broken.model", "no model"), "is no sentencepiece model"),
        (lambda folder: _write(folder / "tokenizer_config.json", "{}"), "no tokenizer could be loaded"),
        (lambda folder: "no-such-organisation/no-such-model", "no tokenizer could be loaded"),
    ],
)
def test_unusable_tokenizers_are_explained(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(make(tmp_path))
    assert caught.value.exit_code == 2


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path if path.suffix == ".model" else path.parent


def test_fast_path_imports_neither_transformers_nor_torch(bpe_folder: Path) -> None:
    code = (
        "import sys; from gpt.text.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).encode('x');"
        "print(sorted({'transformers', 'torch', 'sentencepiece'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, bpe_folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_streamed_pieces_join_to_the_whole_text(kind: str, bpe_folder: Path, sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder if kind == "bpe" else sentencepiece_file)
    ids = tokenizer.encode(TEXT)
    assert len(tokenizer.encode("日")) > 1
    random = Random(0)
    blanks = tokenizer.encode("a  b")  # a blank of its own shows only together with its neighbours
    likely = [*ids, *blanks * 5, *range(3, 259), 5000]
    sequences = [ids, ids[:-1], ids[1:], ids[::-1], list(range(3, 262))]
    sequences += [random.choices(likely, k=8) for _ in range(300)]
    for sequence in sequences:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.step(token) for token in sequence]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(sequence)


def test_unfinished_characters_are_held_back(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    stream = StreamDecoder(tokenizer)
    smile = tokenizer.encode("🙂")
    assert len(smile) == 4
    assert [stream.step(token) for token in [*smile, *tokenizer.encode("!")]] == ["", "", "", "🙂", "!"]
    assert stream.step(smile[0]) == ""
    assert stream.finish() == "\ufffd"


def test_streamed_sequences_print_like_finished_ones(bpe_folder: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(bpe_folder)
    outputs = ["one é", "second, longer 日本", "", "4"]
    rows = [[*tokenizer.encode(text), 263] for text in outputs]
    streamed, whole = io.StringIO(), io.StringIO()
    printer = StreamPrinter(["p0", "p1", "p2", "p3"], lambda: RowText(tokenizer, 263), streamed)
    for step in range(max(map(len, rows))):
        for index, row in enumerate(rows):
            if step < len(row):
                printer.add(index, row[step])
                if index == 0 and step == 0:
                    assert streamed.getvalue() == 'Input: "p0"\nOutput: "on'
    for index in range(len(rows)):
        printer.end(index)
    for index, text in enumerate(outputs):
        print_results(f"p{index}", [text], whole)
    assert streamed.getvalue() == whole.getvalue()


def test_bundled_tokenizer_has_all_its_files() -> None:
    tokenizer = load_tokenizer(ROOT / "assets" / "gpt2-tiny")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (4096, 0)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_local_folder_wins_over_a_hub_name(bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bpe_folder, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_tokenizer("gpt2"), FastTokenizer)
