"""Every rank's connection to rank 0, which its machine closes when it ends: so the others learn of it.

mpirun ends all ranks with one that is killed; srun without --kill-on-bad-exit lets the others wait for it without end.
"""

from __future__ import annotations

import atexit
import contextlib
import secrets
import selectors
import socket
import threading
import time

from gpt.comm import GONE_HINT, Communicator, describe_rank, end_job, own_address
from gpt.console import verbose
from gpt.errors import GptError

_BYE = b"."
_CONNECTING_TIME_S = 10.0
# mpirun, and srun with --kill-on-bad-exit, end the others within it, and say so in their own words.
_GRACE_S = 2.0
_held: list[_Lifeline] = []


def hold(ranks: Communicator) -> bool:
    """Connects the ranks, which all call this; False where they are connected already.  Where a connection cannot be
    made, that rank is missed by nobody but its process manager."""
    if _held:
        return False
    server, place = None, None
    if ranks.rank == 0:
        with contextlib.suppress(OSError):
            server = socket.create_server(("", 0), backlog=ranks.size)
            place = own_address(ranks), server.getsockname()[1], secrets.token_bytes(16)
    _held.append(_Lifeline(ranks, server, ranks.broadcast_object(place)))
    return True


class _Lifeline:
    def __init__(self, ranks: Communicator, server: socket.socket | None, place: tuple[str, int, bytes] | None):
        """place: host and port of rank 0's `server`, and what a rank says first, in front of its number."""
        self._ranks = ranks
        self._server = server
        self._hello = b"" if place is None else place[2]
        self._rank_of: dict[socket.socket, int] = {}
        self._leaving = False
        self._selector = selectors.DefaultSelector()
        try:
            if server is not None:
                self._selector.register(server, selectors.EVENT_READ)
            elif place is not None:
                line = socket.create_connection(place[:2], timeout=_CONNECTING_TIME_S)
                line.settimeout(None)
                line.sendall(self._hello + ranks.rank.to_bytes(4, "big"))
                self._rank_of[line] = 0
                self._selector.register(line, selectors.EVENT_READ)
        except OSError as error:
            verbose(f"No lifeline to rank 0: {error}")
            return
        atexit.register(self._leave)
        threading.Thread(target=self._run, daemon=True, name="lifeline").start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._selector.register(self._server.accept()[0], selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)

    def _hear(self, line: socket.socket) -> None:
        try:
            data = line.recv(64)
        except OSError:
            data = b""
        if line not in self._rank_of and data.startswith(self._hello):
            self._rank_of[line] = int.from_bytes(data[len(self._hello) :][:4], "big")
            data = data[len(self._hello) + 4 :]
            if not data:
                return
        # Anything else ends it: a farewell, a stranger, or the end of a rank.
        self._selector.unregister(line)
        rank = self._rank_of.pop(line, None)
        line.close()
        if rank is None or data == _BYE:
            return
        time.sleep(_GRACE_S)
        if not self._leaving:
            gone = GptError(f"rank {rank} is gone", hint=GONE_HINT)
            end_job(self._ranks, f"{describe_rank(self._ranks)}: {gone}", 1)

    def _leave(self) -> None:
        self._leaving = True
        for line in list(self._rank_of):
            with contextlib.suppress(OSError):
                line.sendall(_BYE)
