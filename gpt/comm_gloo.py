"""Ranks over gloo, of torch.distributed: CPU tensors without MPI."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt.comm import (
    GONE_HINT,
    LEAVING_TIME_S,
    POLL_S,
    TIMEOUT_VARIABLE,
    SmallSum,
    Watch,
    describe_rank,
    summable,
    time_limit_s,
)
from gpt.console import print_error
from gpt.errors import ConfigError, GptError, brief
from gpt.launch import Launch

if TYPE_CHECKING:
    import torch

_MEETING_HINT = "MASTER_ADDR and MASTER_PORT, the same on all ranks, name a machine and a free port"
# Within this time ranks that are told to end have read it, unless they are gone themselves.
_OBEYING_TIME_S = 3.0


class GlooCommunicator:
    """CPU tensors over torch.distributed, for ranks that srun --mpi=none started and that have to find each other."""

    def __init__(self, launch: Launch):
        """Meets rank 0; `join` follows, when a failure can end the others.  Raises ConfigError for a meeting point that
        cannot be one, GptError where rank 0 cannot be reached."""
        # Of a connection that breaks it would print its stack, on every rank, beside our message.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        host, port = _meeting_point()
        import torch.distributed as dist

        self._limit_s = time_limit_s()
        self.rank, self.size = launch.rank, launch.size
        self.stage = ""
        self.small_sum: SmallSum | None = None
        limit = datetime.timedelta(seconds=self._limit_s)
        try:
            self._store = dist.TCPStore(host, port, self.size, self.rank == 0, timeout=limit, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise _not_found(f"{host}:{port}: {brief(error)}", _MEETING_HINT) from error
        atexit.register(self._leave)
        self._dist = dist
        self._leaving = False
        self._ending = threading.Lock()
        self._num_barriers = 0
        self._watch = Watch(self, self._obey)

    def join(self) -> None:
        """Raises GptError where ranks are missing or cannot be connected."""
        missing = self.roll_call(self._limit_s)
        if missing:
            found = f"nothing from rank {', '.join(map(str, missing))} in {self._limit_s:g} s"
            raise _not_found(found, f"look for its message, or raise {TIMEOUT_VARIABLE}")
        self.barrier()  # rank 0 has the better message
        limit = datetime.timedelta(seconds=self._limit_s)
        try:
            self._dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=limit
            )
        except (RuntimeError, ValueError) as error:
            raise _not_found(brief(error), "see that the machines reach each other") from error
        hosts = self.gather_objects(socket.gethostname())
        self.local_size = hosts.count(hosts[self.rank])
        self.local_rank = hosts[: self.rank].count(hosts[self.rank])

    def all_reduce(self, tensor: torch.Tensor) -> None:
        total = summable(tensor)
        with self._watch("all-reduce"), self._connected():
            self._dist.all_reduce(total)
        if total is not tensor:
            tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        import torch

        own = tensor.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._watch("all-gather"), self._connected():
            self._dist.all_gather(parts, own)
        return torch.cat(parts, dim)

    def broadcast_object(self, value: Any) -> Any:
        self.barrier()
        values = [value]
        self._dist.broadcast_object_list(values)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        self.barrier()
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self._num_barriers += 1
        name = f"barrier {self._num_barriers}"
        here = self._store.add(name, 1)
        while here < self.size:
            time.sleep(POLL_S)
            here = self._store.add(name, 0)
        # Rank 0 keeps the store: it must not leave before everybody has seen the last one come.
        seen = self._store.add(name + " seen", 1)
        while self.rank == 0 and seen < self.size:
            time.sleep(POLL_S)
            seen = self._store.add(name + " seen", 0)

    def roll_call(self, limit_s: float) -> list[int]:
        self._store.set(f"here {self.rank}", "")
        if self.rank > 0:
            return []
        missing = list(range(1, self.size))
        deadline = time.monotonic() + limit_s
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.check([f"here {rank}"])]
            time.sleep(POLL_S)
        return missing

    def versions(self) -> dict[str, str]:
        return {}  # PyTorch's own

    def speaks(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return int(self._store.add("speakers", 1)) == 1
        return False  # rank 0 is gone, and another thread of rank 1 says so

    def abort(self, code: int) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set("abort", str(code))
        self._end(code)

    def _end(self, code: int) -> None:
        self._ending.acquire()  # by one thread, for good
        self._keep_store(_OBEYING_TIME_S)
        os._exit(code)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """A connection that breaks means that another rank has failed, and it may have said why."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(1.0)  # time to obey
            raise GptError(
                "another rank is gone or does not answer",
                found=str(error).partition("]")[2].strip().partition(". ")[0],
                hint=GONE_HINT,
            ) from error

    def _leave(self) -> None:
        """At the end of the process."""
        self._leaving = True
        self._keep_store(LEAVING_TIME_S)
        if self._dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                self._dist.destroy_process_group()

    def _keep_store(self, limit_s: float) -> None:
        """Counts this rank as one that needs the store no more; rank 0 waits for the others."""
        with contextlib.suppress(RuntimeError):
            left = self._store.add("left", 1)
            deadline = time.monotonic() + limit_s
            while self.rank == 0 and left < self.size and time.monotonic() < deadline:
                time.sleep(POLL_S)
                left = self._store.add("left", 0)

    def _obey(self) -> None:
        """Ends this rank once another one has asked for it, or rank 0 is gone and the store with it."""
        if self._leaving:
            return
        try:
            code = int(self._store.get("abort")) if self._store.check(["abort"]) else None
        except RuntimeError:
            if self.rank == 1:
                print_error(f"{describe_rank(self)}: {GptError('rank 0 is gone', hint=GONE_HINT)}")
            os._exit(1)
        if code is not None:
            self._end(code)


def _not_found(found: str, hint: str) -> GptError:
    return GptError("the ranks did not find each other", found=found, hint=hint)


def _meeting_point() -> tuple[str, int]:
    """Host and port of rank 0: MASTER_ADDR and MASTER_PORT, else the step's first machine and a port made of the job's
    and the step's number, which differ between jobs.  Raises ConfigError for names of no machine and no port."""
    environ = os.environ
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    numbers = [int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    port = environ.get("MASTER_PORT") or str(20000 + (numbers[0] * 37 + numbers[1]) % 12000)
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            "the ranks have no place to meet", found=f"{host}:{port}: {brief(error)}", hint=_MEETING_HINT
        ) from error
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first name of a Slurm list of machines: gpu[03-05,9],login -> gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\]\-,]*)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
