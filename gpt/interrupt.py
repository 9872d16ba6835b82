"""What Ctrl-C does: a script ends with one line and exit code 130, whenever it comes.

Behind the command line it is a KeyboardInterrupt, as everywhere in Python, which `gpt.cli.run_main` makes a message of.
While modules are loaded it ends the process at once: there is nothing to clean up yet, and an exception would be shown
with all the imports it came through, or worse: PyTorch, while it is loaded, aborts at some and loses others, with half
of NumPy missing from there on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_EXIT_CODE = 130
_MESSAGE = b"error: interrupted\n"


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, _MESSAGE)
    os._exit(_EXIT_CODE)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib."):
            _end(number, frame)
        caller = caller.f_back
    raise KeyboardInterrupt


def end_at_once() -> None:
    """From here on Ctrl-C ends the process with one line.

    It is what a script that was started as a program does before it imports anything else.  Who imports the package or
    a script keeps his own handling; a job that was started with Ctrl-C ignored, as in the background, goes on so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt where it would end the process at once, unless a module is being loaded."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C waits.  Processes that are started here never get it: who starts them ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # started with the first process, it would let Ctrl-C through from there on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
