"""The decoding flags that scripts share, and the record they become: sampling, ends of texts, beams, what is told."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gpt.config import BuildConfig
from gpt.console import print_notice
from gpt.errors import ConfigError, Problems
from gpt.runtime.beam_config import NO_BEAMS, BeamConfig
from gpt.runtime.sampling_config import GREEDY, SamplingConfig
from gpt.text.prompts import unicode_problem
from gpt.text.stop_words import StopWords
from gpt.text.tokenizer import Tokenizer

_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend"}  # given twice, both count
_EARLY = {"false": False, "true": True, "never": "never"}
_SAMPLING = tuple(field.name for field in fields(SamplingConfig) if field.name != "bad_words")
_BEAM_NAMES = {
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "num_beam_groups": "num_groups",
    "diversity_penalty": "diversity_penalty",
}


@dataclass(frozen=True)
class DecodingOptions:
    """How texts are made, as the flags say it: words are still text.

    bad_words, bad_ids: what must not come, as text and as token ids.  stop_words, stop_ids: what ends a text.
    num_return_sequences: results per prompt; None for one, or all beams.  logprobs: a file for the log-probabilities of
    the new tokens, with the top_logprobs likeliest ones beside each; True where they are part of the results' own file.
    Raises ConfigError listing all settings that contradict each other.
    """

    sampling: SamplingConfig = GREEDY
    beams: BeamConfig = NO_BEAMS
    bad_words: tuple[str, ...] = ()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    stop_words: tuple[str, ...] = ()
    stop_ids: tuple[tuple[int, ...], ...] = ()
    num_return_sequences: int | None = None
    logprobs: Path | Literal[True] | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        count = self.num_return_sequences
        if self.uses_beams and not self.sampling.is_greedy:
            problems.add(
                f"--num_beams {self.beams.num_beams} with --top_k {self.sampling.top_k}: beams are searched, nothing "
                "is drawn; leave --top_k out, or --num_beams"
            )
        if count is not None and count < 1:
            problems.add(f"--num_return_sequences {count}: allowed are 1 and above")
        elif count is not None and count > 1 and not self.uses_beams and self.sampling.is_greedy:
            problems.add(
                f"--num_return_sequences {count} with greedy decoding: all would be equal; draw (--top_k 0) or search "
                f"(--num_beams {count})"
            )
        elif count is not None and self.uses_beams and count > self.beams.num_beams:
            problems.add(f"--num_return_sequences {count}: a search with --num_beams {self.beams.num_beams} has fewer")
        for flag, words in (("bad_words", self.bad_words), ("stop_words", self.stop_words)):
            if "" in words:
                problems.add(f"--{flag}: one of the words is empty")
            wrong = filter(None, map(unicode_problem, words))
            problems.items += [f"--{flag}: one of the words is no text: {problem}" for problem in wrong]
        for flag, ids in (("bad_ids", self.bad_ids), ("stop_ids", self.stop_ids)):
            if () in ids:
                problems.add(f"--{flag}: one of the sequences has no token")
        if self.top_logprobs < 0:
            problems.add(f"--top_logprobs {self.top_logprobs}: allowed are 0 and above")
        if self.top_logprobs > 0 and self.logprobs is None:
            problems.add(f"--top_logprobs {self.top_logprobs} without --logprobs: it says what stands there")
        problems.raise_if_any(ConfigError, "these options cannot be used together")

    @property
    def uses_beams(self) -> bool:
        return self.beams.num_beams > 1

    @property
    def num_results(self) -> int:
        """Outputs per prompt."""
        if self.num_return_sequences is not None:
            return self.num_return_sequences
        return self.beams.num_beams

    def with_seed(self) -> DecodingOptions:
        """The same with a seed where one is needed, which is told if it had to be made up."""
        sampling = self.sampling.with_seed()
        if sampling != self.sampling:
            print_notice(f"Random seed: --seed {sampling.seed} repeats this run")
        return replace(self, sampling=sampling)

    @property
    def search(self) -> BeamConfig:
        return replace(self.beams, num_return=self.num_results)

    @property
    def num_top_logprobs(self) -> int | None:
        """None where nobody asks for log-probabilities."""
        return None if self.logprobs is None else self.top_logprobs

    @property
    def logprobs_file(self) -> Path | None:
        return None if self.logprobs is True else self.logprobs

    def choice(self, tokenizer: Tokenizer | None) -> SamplingConfig:
        """The sampling settings with the bad words as token ids: each word as it stands and behind a blank, since
        tokenizers spell the two differently.

        Raises ConfigError for words without a tokenizer, or that it has no token for.
        """
        if not self.bad_words and not self.bad_ids:
            return self.sampling
        words = dict.fromkeys(self.bad_ids)
        problems = Problems()
        for word in self.bad_words:
            spelled = () if tokenizer is None else tuple(tokenizer.encode(word))
            if tokenizer is None:
                problems.add(f"--bad_words {word!r}: there is no tokenizer; token ids go behind --bad_ids")
            elif not spelled or not tokenizer.decode(spelled, skip_special=False).strip("\ufffd"):
                problems.add(f"--bad_words {word!r}: the tokenizer has no token for it")
            else:
                words[spelled] = None
                words[tuple(tokenizer.encode(" " + word))] = None
        problems.raise_if_any(ConfigError, "these words cannot be kept out")
        return replace(self.sampling, bad_words=tuple(words))

    def stops(self, tokenizer: Tokenizer | None, *, skip_special: bool = False) -> StopWords | None:
        """None where nothing but its end token and its length ends a text.  Raises ConfigError as `StopWords` does."""
        if not self.stop_words and not self.stop_ids:
            return None
        return StopWords(self.stop_words, self.stop_ids, tokenizer, skip_special=skip_special)

    def check_fits(self, build: BuildConfig | None, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError listing what engine, if there is one, vocabulary and length make impossible."""
        problems = Problems()
        for check in (
            lambda: self.sampling.check_fits(vocab_size, max_new_tokens),
            lambda: self.search.check_fits(build, vocab_size) if self.uses_beams and build is not None else None,
        ):
            problems.items += _try(check)[1]
        unknown = sorted({token for ids in (*self.bad_ids, *self.stop_ids) for token in ids if token >= vocab_size})
        if unknown:
            shown = ", ".join(map(str, unknown[:5]))
            problems.add(f"--bad_ids, --stop_ids: token ids {shown}, the model has 0 to {vocab_size - 1}")
        if self.top_logprobs > vocab_size:
            problems.add(f"--top_logprobs {self.top_logprobs}: the vocabulary has {vocab_size} tokens")
        problems.raise_if_any(ConfigError, "these decoding options do not fit")

    def describe(self) -> str:
        """What differs from greedy decoding, in the words of the flags."""
        parts = [self.sampling.describe()]
        if self.uses_beams:
            parts = [self.beams.describe(), *([] if self.sampling.is_argmax else [parts[0].removeprefix("greedy: ")])]
        for name in ("bad_words", "bad_ids", "stop_words", "stop_ids"):
            words = getattr(self, name)
            parts += [f"{name} {' '.join(map(repr, words))}"] if words else []
        if self.num_return_sequences is not None:
            parts.append(f"num_return_sequences {self.num_return_sequences}")
        return ", ".join(parts)


GREEDY_DECODING = DecodingOptions()
_OWN = tuple(field.name for field in fields(DecodingOptions) if field.name not in ("sampling", "beams"))


def add_decoding_flags(parser: ArgumentParser) -> None:
    """All of them, in groups; `read_decoding` reads what was given."""
    add_choice_flags(parser)
    group = parser.add_argument_group("log-probabilities")
    group.add_argument(
        "--logprobs",
        nargs="?",
        type=Path,
        const=True,
        metavar="FILE",
        help="log-probabilities of the new tokens, as .jsonl; without FILE in the lines of --output_file",
    )
    group.add_argument("--top_logprobs", type=int, default=0, metavar="N", help="the N likeliest tokens beside each")


def add_choice_flags(parser: ArgumentParser) -> None:
    """Those that decide which texts are made."""
    _add_sampling_flags(parser)
    _add_end_flags(parser)
    _add_beam_flags(parser)


def _add_sampling_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("choice of tokens (default: greedy)")
    group.add_argument("--top_k", type=int, default=1, help="draw from so many likeliest tokens; 1 greedy, 0 all")
    group.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
    group.add_argument("--min_p", type=float, default=0.0, help="probability, as part of the likeliest token's")
    group.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="on tokens of prompt and output, 1 is off")
    group.add_argument("--presence_penalty", type=float, default=0.0, help="once per generated token that came before")
    group.add_argument("--frequency_penalty", type=float, default=0.0, help="each time that a generated token came")
    group.add_argument("--no_repeat_ngram_size", type=int, default=0, help="no so many tokens in a row come twice")
    group.add_argument("--bad_words", **_SEVERAL, metavar="WORD", help="words that must not come")
    group.add_argument("--bad_ids", **_SEVERAL, metavar="IDS", help="the same as comma-separated token ids")
    group.add_argument("--seed", type=int, help="repeats what was drawn (default: another one each time)")


def _add_end_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("end of a text (besides its length and the end token)")
    group.add_argument("--min_length", type=int, default=0, help="new tokens before the end token may come")
    group.add_argument(
        "--stop_words", **_SEVERAL, metavar="TEXT", help=r"end a text, and are cut off; \n is a new line"
    )
    group.add_argument("--stop_ids", **_SEVERAL, metavar="IDS", help="the same as comma-separated token ids")


def _add_beam_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("beam search, several results")
    group.add_argument("--num_beams", type=int, default=1, help="hypotheses followed at a time, 1 is off")
    group.add_argument("--length_penalty", type=float, default=1.0, help="above 0 favours long hypotheses")
    group.add_argument(
        "--early_stopping",
        nargs="?",
        const="true",
        default="false",
        choices=tuple(_EARLY),
        help="whether as many complete hypotheses as beams end the search; never waits for better ones of any length",
    )
    group.add_argument("--num_beam_groups", type=int, default=1, help="groups of beams that differ from each other")
    group.add_argument("--diversity_penalty", type=float, default=0.0, help="of a token that an earlier group took")
    group.add_argument(
        "--num_return_sequences", type=int, metavar="N", help="results per prompt (default: 1, or all beams)"
    )


def read_decoding(args: Namespace) -> DecodingOptions:
    """The options of a command line with all groups of flags, or some of them.

    Raises ConfigError listing everything that is out of range or contradictory.
    """
    values: dict[str, Any] = {key: value for key, value in vars(args).items() if value is not None}
    for name in ("bad_words", "stop_words"):
        values[name] = tuple(_unescape(word) for word in values.get(name, ()))
    for name in ("bad_ids", "stop_ids"):
        values[name] = tuple(_parse_ids(name, text) for text in values.get(name, ()))
    return _make({**values, "early_stopping": _EARLY[values.get("early_stopping", "false")]})


def decoding_of_call(**values: Any) -> DecodingOptions:
    """The options of a function's keywords, which have the names of the flags.

    bad_words, stop_words: a text or several.  bad_ids, stop_ids: sequences of token ids.
    Raises TypeError for a name that is none, ConfigError listing everything that is out of range or contradictory.
    """
    known = {*_SAMPLING, *_BEAM_NAMES, *_OWN}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("bad_words", "stop_words"):
        words = values.get(name, ())
        values[name] = (words,) if isinstance(words, str) else tuple(words)
    for name in ("bad_ids", "stop_ids"):
        values[name] = tuple(tuple(ids) for ids in values.get(name, ()))
    logprobs = values.pop("logprobs", False)
    if logprobs is not False:
        values["logprobs"] = logprobs if logprobs is True else Path(logprobs)
    return _make(values)


def _make(values: dict[str, Any]) -> DecodingOptions:
    """From values by the names of the flags, among others."""
    problems = Problems()
    beams = {field: values[name] for name, field in _BEAM_NAMES.items() if name in values}
    parts: dict[str, Any] = {name: values[name] for name in _OWN if name in values}
    made: dict[str, Callable[[], Any]] = {
        "sampling": lambda: SamplingConfig(**{name: values[name] for name in _SAMPLING if name in values}),
        "beams": lambda: BeamConfig(**beams),
    }
    for name, make in made.items():
        part, found = _try(make)
        problems.items += found
        if not found:
            parts[name] = part
    if problems and parts.get("num_return_sequences", 0) > 0:
        del parts["num_return_sequences"]  # whether the others leave so many is not known
    options, found = _try(lambda: DecodingOptions(**parts))
    problems.items += found
    problems.raise_if_any(ConfigError, "these decoding options cannot be used")
    return options


def _try(make: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `make` returns, and what a ConfigError of it lists, so that it can be told together with others."""
    try:
        return make(), []
    except ConfigError as error:
        if isinstance(error.found, (list, tuple)):
            return None, [str(item) for item in error.found]
        rest = (("; allowed: ", error.allowed), ("; next: ", error.hint))
        return None, [f"{error.what}: {error.found}" + "".join(f"{label}{text}" for label, text in rest if text)]


def _parse_ids(name: str, text: str) -> tuple[int, ...]:
    cells = [cell.strip() for cell in text.split(",")]
    if not all(cell.isdecimal() for cell in cells):
        raise ConfigError(f"--{name} takes token ids", found=repr(text), allowed="comma-separated numbers")
    return tuple(map(int, cells))


def _unescape(text: str) -> str:
    r"""A shell hands over \n and \t as two characters."""
    marks = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    result, position = "", 0
    while position < len(text):
        pair = text[position : position + 2]
        result += marks.get(pair, text[position])
        position += 2 if pair in marks else 1
    return result
