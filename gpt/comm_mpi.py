"""Ranks over MPI."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt.comm import POLL_S, TIMEOUT_VARIABLE, SmallSum, Watch, summable, time_limit_s
from gpt.errors import ConfigError
from gpt.launch import Launch, check_wire, let_lower_ranks_speak, singletons, speaking_for_all, speaking_turn_s

if TYPE_CHECKING:
    import torch

_ROLL_CALL = 1  # a tag that nothing else has
# Ends with its standard input, that is with the process that it guards.
_GUARD = """
import os, sys, threading, time
def end():
    print(sys.argv[2], file=sys.stderr, flush=True)
    time.sleep(0.2)
    os.kill(int(sys.argv[3]), 9)
timer = threading.Timer(float(sys.argv[1]), end)
timer.daemon = True
timer.start()
sys.stdin.read()
"""


class MpiCommunicator:
    """CPU tensors over MPI."""

    def __init__(self, launch: Launch):
        """Raises ConfigError where MPI is missing or did not connect the ranks."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an mpirun that is not MPI's own; the check below says more
                import mpi4py

                # The library says what it is before it joins, since not all ways to fail there return.
                mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
                from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                "several ranks were started, but MPI cannot be loaded",
                found=f"{type(error).__name__}: {error}",
                hint="python -m pip install mpi4py mpich, or mpi4py built for the cluster's MPI; "
                "srun --mpi=none does without",
            ) from error
        library = MPI.Get_library_version()
        warning = check_wire(library)
        if warning:
            let_lower_ranks_speak()
            with speaking_for_all() as speaks:
                if speaks:  # at every level, for it may be the last word
                    print(f"warning: {warning}", file=sys.stderr, flush=True)
        if not MPI.Is_initialized():
            with warnings.catch_warnings(), _guarded(launch):
                warnings.simplefilter("ignore")  # the same
                MPI.Init_thread()
        world = MPI.COMM_WORLD
        if world.Get_size() != launch.size:
            raise singletons(launch, world.Get_size(), library)
        self._in_place = MPI.IN_PLACE
        self._library = " ".join(library.split("\n")[0].split(",")[0].split())
        self._world = world
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank, self.size = world.Get_rank(), world.Get_size()
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        self.stage = ""
        self.small_sum: SmallSum | None = None
        self._watch = Watch(self)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        total = summable(tensor)
        with self._watch("all-reduce"):
            self._world.Allreduce(self._in_place, total.numpy())
        if total is not tensor:
            tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        import torch

        own = tensor.contiguous()
        parts = torch.empty((self.size, *own.shape), dtype=own.dtype)
        with self._watch("all-gather"):
            # Bytes, since numpy has no bfloat16.
            self._world.Allgather(own.view(-1).view(torch.uint8).numpy(), parts.view(-1).view(torch.uint8).numpy())
        return torch.cat(parts.unbind(), dim)

    def broadcast_object(self, value: Any) -> Any:
        self.barrier()  # rank 0 may have been reading or printing for long
        with self._watch("broadcast"):
            return self._world.bcast(value)

    def gather_objects(self, value: Any) -> list[Any]:
        self.barrier()
        with self._watch("gather"):
            return self._world.allgather(value)

    def barrier(self) -> None:
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(POLL_S)

    def roll_call(self, limit_s: float) -> list[int]:
        if self.rank > 0:
            self._world.isend(None, 0, _ROLL_CALL)
            return []
        requests = {rank: self._world.irecv(source=rank, tag=_ROLL_CALL) for rank in range(1, self.size)}
        deadline = time.monotonic() + limit_s
        while requests and time.monotonic() < deadline:
            requests = {rank: request for rank, request in requests.items() if not request.test()[0]}
            time.sleep(POLL_S)
        return list(requests)

    def versions(self) -> dict[str, str]:
        return {"mpi": self._library}

    def speaks(self) -> bool:
        return True  # the first one to speak ends the others before it is their turn

    def abort(self, code: int) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would add that it aborts
        self._world.Abort(code)


@contextlib.contextmanager
def _guarded(launch: Launch) -> Iterator[None]:
    """Ends this process when joining the ranks takes longer than a wait may: one that ended before it joined is missed
    by nobody else.  From outside, since MPI_Init lets no other thread run."""
    limit_s = time_limit_s()
    message = f"error: rank {launch.rank}: the ranks do not find each other in {limit_s:g} s: one of {launch.size} is "
    message += f"missing\n  next:    look for its message, or raise {TIMEOUT_VARIABLE}"
    patience_s = limit_s + speaking_turn_s(launch.rank)
    words = [sys.executable, "-I", "-S", "-c", _GUARD, str(patience_s), message, str(os.getpid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()
