"""Errors a person can act on: what is wrong, what was found, what is allowed, what to do next.

Exit codes of every script: 2 wrong command line or configuration, 3 bad checkpoint or engine, 130 an interrupt, 1
anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

_MAX_LINES = 20


class GptError(Exception):
    """Base of the errors that end a script with one message.

    Args:
        what: one line, the problem itself.
        found: what was there (a value, or one line per problem).
        allowed: what would have been accepted.
        hint: the next step, preferably a command or a flag.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        allowed: object = None,
        hint: str | None = None,
    ):
        super().__init__(what)
        self.what = what
        self.found = found
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        for label, value in (("found", self.found), ("allowed", self.allowed), ("next", self.hint)):
            if value is None:
                continue
            if isinstance(value, (list, tuple)):
                lines.append(f"  {label}:")
                lines.extend(f"    - {item}" for item in value)
            else:
                lines.append(f"  {label + ':':<9}{value}")
        return "\n".join(lines)


class ConfigError(GptError):
    """A wrong command line, option or input given by the user."""

    exit_code = 2


class CheckpointError(GptError):
    """A model checkpoint (Hugging Face, NeMo or FT) that cannot be used."""

    exit_code = 3


class EngineError(GptError):
    """An engine folder that cannot be used."""

    exit_code = 3


class InterruptError(GptError):
    """Somebody pressed Ctrl-C; what there was has been printed or written."""

    exit_code = 130


def first_lines(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"... and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return [*lines[:_MAX_LINES], *more]


def brief(error: BaseException) -> str:
    """What a library's error says, without the rest of a long text; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rethrow_as(error: GptError, kind: type[GptError], what: str) -> GptError:
    """The same details under another exit code: a bad config.ini is a bad checkpoint, not a bad command line."""
    details = [error.what] if error.found is None else error.found
    return kind(what, found=details, allowed=error.allowed, hint=error.hint)


class Problems:
    """Collects problems so that all of them are reported at once."""

    def __init__(self) -> None:
        self.items: list[str] = []

    def add(self, problem: str) -> None:
        self.items.append(problem)

    def __bool__(self) -> bool:
        return bool(self.items)

    def raise_if_any(self, error: type[GptError], what: str, *, hint: str | None = None) -> None:
        """Raises `error` listing the problems."""
        if self.items:
            raise error(what, found=first_lines(self.items), hint=hint)
