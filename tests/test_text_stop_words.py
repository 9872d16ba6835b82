"""Stop words: found across token boundaries and inside characters of several bytes, cut off, held back in a stream."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session, random_prompts
from tiny_models import save_tokenizer

from gpt.errors import ConfigError
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.text.stop_words import StopWords
from gpt.text.streaming import RowText
from gpt.text.tokenizer import Tokenizer, load_tokenizer

END = 263


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, and a few pairs of letters, as tokens."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def ends_at(stops: StopWords, tokens: list[int]) -> int | None:
    """The number of the token that a stop word is complete with."""
    state = stops.start()
    return next((number for number, token in enumerate(tokens) if state.add(token)), None)


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("on the ninth day", ["the n"], "on "),
        ("one, two", ["x", ", t"], "one"),
        ("日本語の本です", ["の本"], "日本語"),
        ("naïve café 🙂 end", ["🙂"], "naïve café "),
        ("naïve", ["ïv", "ve"], "na"),
        ("a\n\nb", ["\n\n"], "a"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("first", ["f"], ""),
        ("nothing here", ["absent"], None),
    ],
)
def test_words_are_found_in_the_text(text: str, words: list[str], kept: str | None, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(text)
    stops = StopWords(words, tokenizer=tokenizer)
    place = ends_at(stops, tokens)
    if kept is None:
        assert place is None
        assert stops.cut(text) == text
        return
    assert place is not None
    until = tokenizer.decode(tokens[: place + 1])
    assert any(word in until for word in words)
    assert not any(word in tokenizer.decode(tokens[:place]) for word in words)
    assert stops.cut(until) == kept
    assert stops.cut(text) == kept


def test_however_the_word_is_cut_into_tokens(tokenizer: Tokenizer) -> None:
    """Every way to spell " the on" with the vocabulary's tokens, some of which no tokenizer would choose."""
    pieces = {tokenizer.decode([token]): token for token in range(END)}
    word = " the on"
    spellings = []
    for cuts in itertools.product([False, True], repeat=len(word) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(word)]
        parts = [word[first:after] for first, after in itertools.pairwise(places)]
        if all(part in pieces for part in parts):
            spellings.append([pieces[part] for part in parts])
    assert len(spellings) == 10
    for tokens in spellings:
        assert ends_at(StopWords([word], tokenizer=tokenizer), tokens) == len(tokens) - 1
        assert ends_at(StopWords(["e o"], tokenizer=tokenizer), tokens) is not None


def test_a_copy_goes_its_own_way(tokenizer: Tokenizer) -> None:
    stops = StopWords(["日本"], [(5, 6)], tokenizer)
    tokens = tokenizer.encode("日本")
    state = stops.start()
    assert not any(state.add(token) for token in tokens[:-1])
    other = state.copy()
    broken = state.copy()
    assert not broken.add(5)  # the character that has begun is none then
    assert not broken.add(tokens[-1])
    assert state.add(tokens[-1])
    assert not other.add(5)
    third = other.copy()
    assert other.add(6)
    assert not third.add(7)
    assert not third.add(6)


def test_token_sequences(tokenizer: Tokenizer) -> None:
    stops = StopWords(ids=[(1, 2, 3), (2, 3), (9,)])
    assert ends_at(stops, [1, 2, 4, 2, 3]) == 4
    assert ends_at(stops, [3, 2, 1]) is None
    assert list(stops.trim([7, 1, 2, 3])) == [7]
    assert list(stops.trim([7, 2, 3])) == [7]
    assert list(stops.trim([9])) == []
    assert list(stops.trim([2, 3, 4])) == [2, 3, 4]
    with pytest.raises(ConfigError, match="need a tokenizer"):
        StopWords(["a"])


def test_a_stream_is_the_cut_text(tokenizer: Tokenizer) -> None:
    """Random bytes, so that there are broken characters, over few letters, so that stop words begin and come."""
    generator = random.Random(0)
    letters = tokenizer.encode("ab日 theon")
    stops = StopWords(["ab", "ba日a", "日日", "on the"], [(letters[0], letters[0]), (letters[1],) * 3], tokenizer)
    num_stopped = 0
    for _ in range(400):
        state, row, pieces, tokens = stops.start(), RowText(tokenizer, END, stops), [], []
        for _ in range(25):
            tokens.append(generator.choice(letters))
            pieces.append(row.add(tokens[-1]))
            if state.add(tokens[-1]):
                num_stopped += 1
                break
        else:
            tokens.append(END)
            pieces.append(row.add(END))
        pieces.append(row.finish())
        kept = tokens[:-1] if tokens[-1] == END else stops.trim(tokens)
        assert "".join(pieces) == stops.cut(tokenizer.decode(kept, skip_special=False))
    assert 100 < num_stopped < 400


def test_what_may_be_a_beginning_waits(tokenizer: Tokenizer) -> None:
    row = RowText(tokenizer, END, StopWords(["\n\nEnd"], tokenizer=tokenizer))
    shown = [row.add(token) for token in tokenizer.encode("a\n\n\nEx\n")]
    assert shown == ["a", "", "", "\n", "", "\n\nEx", ""]
    assert row.finish() == "\n"


def test_rows_end_on_their_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In the decoding loop: each row stops with the token that completes a word, the others go on."""
    sizes = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "264", "--n_positions", "60"]
    limits = ["--max_batch_size", "4", "--max_input_len", "10", "--max_output_len", "40"]
    session = open_session(build_engine(None, tmp_path, *sizes, *limits, "--dtype", "float32", "--random_seed", "3"))
    prompts = random_prompts((4, 7, 2, 4), 264)
    free = generate(session, Request(prompts, max_new_tokens=30)).tokens
    word = tokenizer.decode(free[1][10:12])
    stops = StopWords([word], [tuple(free[2][4:7])], tokenizer)
    ended: list[int] = []
    result = generate(session, Request(prompts, max_new_tokens=30, stops=stops), on_end=ended.append)
    expected = [ends_at(stops, row) for row in free]
    lengths = [30 if place is None else place + 1 for place in expected]
    assert [len(row) for row in result.tokens] == lengths
    assert all(row == whole[: len(row)] for row, whole in zip(result.tokens, free, strict=True))
    assert lengths[1] <= 12
    assert lengths[2] <= 7
    assert [lengths[row] for row in ended] == sorted(lengths)


def test_log_probabilities_of_each_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "264", "--n_positions", "60"]
    session = open_session(build_engine(None, tmp_path, *sizes, "--dtype", "float32", "--random_seed", "3"))
    prompts = random_prompts((4, 7), 264)
    result = generate(session, Request(prompts, max_new_tokens=9, num_top_logprobs=3))
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        assert len(tokens) == len(logprobs) == 9
        for step, one in enumerate(logprobs):
            session.start(1, 30)
            exact = session.context([prompt + tokens[:step]])[0].double().log_softmax(-1)
            best = exact.topk(3)
            assert one.logprob == pytest.approx(exact[tokens[step]].item(), abs=1e-5)
            assert [token for token, _ in one.top] == best.indices.tolist()
            torch.testing.assert_close(
                torch.tensor([value for _, value in one.top], dtype=torch.float64), best.values, atol=1e-5, rtol=0
            )
