"""A small session on a terminal: a prompt is typed, the model continues it, and so on.

Lines are edited and recalled with the arrow keys where Python has readline.  Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn, TextIO

from gpt.cli import ArgumentParser, positive_int
from gpt.console import print_notice
from gpt.engine.folder import open_engine
from gpt.errors import ConfigError, GptError
from gpt.runtime.request import Request
from gpt.text.decoding_options import DecodingOptions, add_decoding_flags, read_decoding
from gpt.text.pipeline import (
    choose_end_id,
    choose_tokenizer,
    describe_speed,
    recording_seconds,
    require_tokenizer,
    run_batches,
    tell_recording,
)
from gpt.text.prompt_fit import last_tokens, prompt_limit
from gpt.text.run_prompts import RunConfig, read_prompts
from gpt.text.streaming import RowText

if TYPE_CHECKING:
    from gpt.runtime.generate import Generation
    from gpt.runtime.virtual_tokens import VirtualTokens

_MARK = "> "
_HELP = """\
A line is a prompt; the model continues it.
  /more            goes on from the end of the last answer
  /again           continues the last prompt once more
  /set FLAG ...    changes flags of run.py that decide how texts are made, as in
                   /set --top_k 40 --temperature 0.8 --max_output_len 60
  /reset           sets all of them as they were at first
  /show            what is set
  /help            this text
  /quit            leaves, as Ctrl-D does; Ctrl-C stops an answer
A prompt that begins with / is typed with two of them.
"""


class _SetParser(ArgumentParser):
    """The flags that /set takes; what is wrong with them is an error like others, not the end."""

    def __init__(self) -> None:
        super().__init__(prog="/set", add_help=False)
        self.add_argument("--max_output_len", type=positive_int)
        add_decoding_flags(self)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"/set: {message}", hint="/help shows an example; run.py --help lists the flags")


def _changed(args: Namespace, words: Sequence[str]) -> Namespace:
    """What is set, with what `words` set anew; words and ids replace those from before."""
    parser, args = _SetParser(), copy(args)
    given = vars(parser.parse_args(words))
    vars(args).update({name: None for name, value in given.items() if isinstance(value, list)})
    return parser.parse_args(words, args)


class Conversation:
    """An engine that answers line by line."""

    def __init__(self, config: RunConfig, args: Namespace, out: TextIO):
        """config: what to load, and how texts are made at first; args: the flags that said so.

        Raises ConfigError, EngineError where there is nothing to talk to.
        """
        from gpt.runtime.load import load_session

        self._config = config
        self._args = self._first_args = args
        self._out = out
        self._info = open_engine(config.engine_dir)
        chosen = choose_tokenizer(self._info, config.tokenizer, config.vocab_file)
        self._tokenizer = require_tokenizer(chosen, self._info, "read what is typed")
        self._end_id = choose_end_id(config.end_id, self._tokenizer, self._info.model)
        self._check(config.decoding, config.max_output_len)
        config.batching.check_fits(self._info.build)
        self._session = load_session(self._info, config.device, config.execution)
        self._prompt: list[int] = []
        self._virtual: VirtualTokens | None = None
        self._answer: list[int] = []
        self._commands: dict[str, Callable[[Sequence[str]], None]] = {
            "/more": lambda words: self._continue([*self._prompt, *self._answer]),
            "/again": lambda words: self._continue(self._prompt),
            "/set": lambda words: self._set(_changed(self._args, words)),
            "/reset": lambda words: self._set(self._first_args),
            "/show": lambda words: self._show(),
            "/help": lambda words: self._print(_HELP),
        }

    @property
    def title(self) -> str:
        return f"{self._info.describe()} on {self._session.device}; /help lists the commands, Ctrl-D leaves\n"

    def take(self, line: str) -> bool:
        """One line that was typed; False where it ends the session.  Raises GptError for what cannot be done."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._begin(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, *words = _split(line)
        if name == "/quit":
            return False
        command = self._commands.get(name)
        if command is None:
            raise ConfigError("no such command", found=name, allowed=", ".join([*self._commands, "/quit"]))
        command(words)
        return True

    def _begin(self, text: str) -> None:
        prompts, tuning = read_prompts(replace(self._config, texts=(text,)), self._info, self._tokenizer, self._end_id)
        self._virtual = None if tuning is None else tuning.virtual
        self._continue(prompts[0])

    def _continue(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ConfigError("there is no prompt to continue yet", hint="type one")
        prompt = self._fit(prompt)
        config = self._config
        choice = config.decoding.choice(self._tokenizer).with_seed()
        stops = config.decoding.stops(self._tokenizer)
        request = Request([prompt], config.max_output_len, self._end_id, self._virtual, choice, stops=stops)
        request.check(self._info.model, self._info.build)
        self._prompt, self._answer = list(prompt), []
        batches: list[Generation] = []
        before = recording_seconds(self._session)
        try:
            answer = self._answer_all if config.decoding.num_results > 1 else self._answer_one
            answer(request, batches)
        except KeyboardInterrupt:
            self._print("\n(stopped)\n")
        finally:
            self._session.comm.stage = ""  # what comes next may take its time
        if batches:
            seed = "" if choice.is_greedy else f", seed {choice.seed}"
            print(f"({describe_speed(batches)}{seed})", file=sys.stderr, flush=True)
            tell_recording(self._session, before)

    def _fit(self, prompt: Sequence[int]) -> Sequence[int]:
        """With --on_long_prompt truncate, a text that has become too long goes on from its end."""
        config, model = self._config, self._info.model
        in_front = sum(token >= model.vocab_size for token in prompt)
        limit, reason = prompt_limit(model, self._info.build, config.max_output_len, config.max_input_length, in_front)
        if config.on_long_prompt != "truncate" or len(prompt) - in_front <= limit:
            return prompt
        print_notice(f"Cut to its last {limit} tokens ({reason})")
        return last_tokens(prompt, in_front + limit, in_front)

    def _answer_one(self, request: Request, batches: list[Generation]) -> None:
        """Text appears as it is made."""
        config, stops = self._config, self._config.decoding.stops(self._tokenizer)
        text = RowText(self._tokenizer, self._end_id, stops)

        def add(row: int, token: int) -> None:
            if token != self._end_id:
                self._answer.append(token)
            self._print(text.add(token))

        try:
            run_batches(
                self._session, request, config.decoding, on_token=add, results=batches, batching=config.batching
            )
        except KeyboardInterrupt:
            self._print(text.finish())
            raise
        self._print(text.finish() + "\n")

    def _answer_all(self, request: Request, batches: list[Generation]) -> None:
        """Several answers, one below the other; the first is the one that /more goes on from."""
        config, stops = self._config, self._config.decoding.stops(self._tokenizer)
        run_batches(self._session, request, config.decoding, results=batches, batching=config.batching)
        for number, tokens in enumerate(tokens for batch in batches for tokens in batch.tokens):
            text = RowText(self._tokenizer, self._end_id, stops)
            pieces = [text.add(token) for token in tokens]
            self._print(f"[{number + 1}]" + "".join(pieces) + text.finish() + "\n")
        self._answer = [token for token in batches[0].tokens[0] if token != self._end_id]

    def _set(self, args: Namespace) -> None:
        """Nothing changes where something is wrong with the new flags."""
        decoding = read_decoding(args)
        self._check(decoding, args.max_output_len)
        config = replace(self._config, max_output_len=args.max_output_len, decoding=decoding)
        self._args, self._config = args, config
        self._show()

    def _check(self, decoding: DecodingOptions, max_output_len: int) -> None:
        if decoding.logprobs is not None:
            raise ConfigError("--logprobs goes with prompts on the command line or in a file")
        prompt_limit(self._info.model, self._info.build, max_output_len, self._config.max_input_length)
        decoding.check_fits(self._info.build, self._info.model.vocab_size, max_output_len)
        decoding.choice(self._tokenizer).check_fits(self._info.model.vocab_size, max_output_len)

    def _show(self) -> None:
        config = self._config
        self._print(f"at most {config.max_output_len} new tokens, {config.decoding.describe()}\n")

    def _print(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


def interact(config: RunConfig, args: Namespace, out: TextIO) -> None:
    """Reads lines from the terminal until its end.  Raises what `Conversation` raises before the first line."""
    with contextlib.suppress(ImportError):  # Windows has none; lines can then be typed, but not recalled
        import readline  # noqa: F401
    conversation = Conversation(config, args, out)
    out.write(conversation.title)
    while _takes_line(conversation, out):
        pass


def _takes_line(conversation: Conversation, out: TextIO) -> bool:
    """Whether the session goes on."""
    try:
        return conversation.take(input(_MARK))
    except EOFError:
        out.write("\n")
        return False
    except KeyboardInterrupt:
        out.write("\n")
    except GptError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return True


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError("this command cannot be read", found=error, hint="quotes come in pairs") from error
