"""The command line, the same in every script: flags, exit codes, how errors are shown."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpt import comm, interrupt
from gpt.console import LOG_LEVELS, get_level, print_error
from gpt.errors import ConfigError, GptError
from gpt.launch import let_lower_ranks_speak, read_launch, speaking_for_all


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something, once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse where dashes and underscores are the same inside a long flag, as are unambiguous prefixes of it."""

    def __init__(self, **kwargs: object):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._normalise(args), namespace)

    def error(self, message: str) -> NoReturn:
        let_lower_ranks_speak()
        with speaking_for_all() as speaks:
            if speaks:
                self.print_usage(sys.stderr)
                self._print_message(f"{self.prog}: error: {message}\n", sys.stderr)
        self.exit(2)

    def _normalise(self, args: Sequence[str]) -> list[str]:
        spelled = {name.replace("_", "-"): name for name in self._option_string_actions if name.startswith("--")}
        result: list[str] = []
        for position, arg in enumerate(args):
            if arg == "--":
                return result + list(args[position:])
            if not arg.startswith("--"):
                result.append(arg)
                continue
            flag, equals, value = arg.partition("=")
            flag = flag.replace("_", "-")
            matches = [flag] if flag in spelled else [name for name in spelled if name.startswith(flag)]
            result.append(spelled[matches[0]] + equals + value if len(matches) == 1 else arg)
        return result


def add_log_level(parser: argparse._ActionsContainer, default: str = "info") -> None:
    parser.add_argument(
        "--log_level", choices=LOG_LEVELS, default=default, help="how much is told; debug adds tracebacks to errors"
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, allowed: an integer of at least 1")
    return value


def run_main(body: Callable[[], int | None]) -> int:
    """Runs a script's body and turns whatever ends it into one message and an exit code.

    Among several ranks, the one that fails ends all of them with its message and its code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 shows what it lacks as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run(body)
    try:
        sys.stdout.flush()
    except OSError:
        # What is left has no taker; the interpreter would try once more at its end and say so in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(body: Callable[[], int | None]) -> int:
    try:
        with interrupt.raised():
            code = body() or 0
            sys.stdout.flush()  # a full disk behind a redirection shows only here
            comm.active().barrier()  # a rank that left early would end the others
        return code
    except GptError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail(GptError("interrupted"), 130)
    except BrokenPipeError:
        comm.active().abort(0)
        return 0  # the reader of our output has what it wanted (`... | head`)
    except MemoryError as error:
        return _fail(GptError("out of memory", hint="a smaller batch, model or --processes needs less"), 1, error)
    except OSError as error:
        return _fail(_explain_os_error(error), 1, error)
    except ModuleNotFoundError as error:
        found = f"no module {error.name} for {sys.executable}"
        hint = ". .venv/bin/activate where the quickstart has made it, or python -m pip install -r requirements.txt"
        return _fail(GptError("a package is not installed", found=found, hint=hint), 1, error)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which scripts load late
            hint = "free the card, or ask for a smaller batch or fewer tokens"
            return _fail(GptError("out of GPU memory", found=str(error).partition("\n")[0], hint=hint), 1, error)
        message = GptError(
            f"unexpected {type(error).__name__}: {error}", hint="run again with --log_level debug for the traceback"
        )
        return _fail(message, 1, error)


def _fail(error: GptError, code: int, cause: BaseException | None = None) -> int:
    ranks, own = comm.active(), read_launch()
    text = str(error)
    if get_level() == "debug":
        import traceback

        text = "\n".join([text, *traceback.format_exception(cause or error)]).rstrip("\n")
    if ranks.size > 1:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        comm.end_job(ranks, f"{comm.describe_rank(ranks)}: {text}", code)
        return code
    let_lower_ranks_speak()
    # Before they have joined, ranks have read nothing but the same command line, and none of them finds the others.
    alike = own.size == 1 or cause is None
    with speaking_for_all() if alike else contextlib.nullcontext(True) as speaks:
        if speaks:
            print_error(text if alike else f"rank {own.rank}: {text}")
    return code


def _explain_os_error(error: OSError) -> GptError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GptError(f"no space left on the device{where}", hint="free space or choose another output folder")
    return GptError(f"{error.strerror or error}{where}")


def reject_unsupported(problems: Sequence[str]) -> None:
    """Raises ConfigError listing every flag of the command line that cannot be honoured, with its reason."""
    if problems:
        raise ConfigError("these options cannot be used together or not yet", found=list(problems))
