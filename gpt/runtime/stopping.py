"""What ends a sequence besides its end token and its length: the decoding loop's side of stop words."""

from __future__ import annotations

from typing import Protocol


class StopState(Protocol):
    """One sequence."""

    def add(self, token: int) -> bool:
        """Takes the next new token; whether the sequence ends with it."""
        ...

    def copy(self) -> StopState:
        """A sequence of its own that has the same past."""
        ...


class Stops(Protocol):
    """Among several ranks only the first one has them, and tells the others what ended."""

    def start(self) -> StopState:
        """The state of a sequence without new tokens."""
        ...
