"""Ranks over gloo, of torch.distributed: CPU tensors without MPI."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt.comm import LEAVING_TIME_S, POLL_S, SmallSum, Watch, summable, time_limit_s
from gpt.errors import GptError, brief
from gpt.launch import Launch

if TYPE_CHECKING:
    import torch


class GlooCommunicator:
    """CPU tensors over torch.distributed, for ranks that srun --mpi=none started and that have to find each other."""

    def __init__(self, launch: Launch):
        """Raises GptError where rank 0 cannot be reached."""
        import torch.distributed as dist

        host, port = _meeting_point()
        limit = datetime.timedelta(seconds=time_limit_s())
        self.rank, self.size = launch.rank, launch.size
        self.stage = ""
        self.small_sum: SmallSum | None = None
        try:
            self._store = dist.TCPStore(host, port, launch.size, launch.rank == 0, timeout=limit)
            dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise GptError(
                "the ranks did not find each other",
                found=f"{host}:{port}: {brief(error)}",
                hint="MASTER_ADDR and MASTER_PORT, the same on all ranks, name a machine and a free port",
            ) from error
        atexit.register(self._leave)
        self._dist = dist
        self._leaving = False
        self._num_barriers = 0
        hosts = self.gather_objects(socket.gethostname())
        self.local_size = hosts.count(hosts[self.rank])
        self.local_rank = hosts[: self.rank].count(hosts[self.rank])
        self._watch = Watch(self, self._obey)

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

    def abort(self, code: int) -> None:
        self._store.set("abort", str(code))
        if self.rank == 0:
            time.sleep(3 * Watch.interval_s)  # the others read it here
        os._exit(code)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """A connection that breaks means that another rank has failed, and it may have said why."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(2 * Watch.interval_s)  # time to obey
            raise GptError(
                "another rank is gone or does not answer",
                found=str(error).partition("]")[2].strip().partition(". ")[0],
                hint="look for its message; srun --kill-on-bad-exit ends all ranks with the first",
            ) from error

    def _leave(self) -> None:
        """At the end of the process.  Rank 0 keeps the store until nobody can miss it any more."""
        self._leaving = True
        with contextlib.suppress(RuntimeError):
            left = self._store.add("left", 1)
            deadline = time.monotonic() + LEAVING_TIME_S
            while self.rank == 0 and left < self.size and time.monotonic() < deadline:
                time.sleep(POLL_S)
                left = self._store.add("left", 0)
            self._dist.destroy_process_group()

    def _obey(self) -> None:
        """Ends this rank once another one has asked for it, or is gone with the store."""
        if self._leaving:
            return
        try:
            code = int(self._store.get("abort")) if self._store.check(["abort"]) else 0
        except RuntimeError:
            code = 1
        if code:
            os._exit(code)


def _meeting_point() -> tuple[str, int]:
    """Host and port of rank 0: MASTER_ADDR and MASTER_PORT, else the step's first machine and a port made of the job's
    and the step's number, which differ between jobs."""
    environ = os.environ
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    numbers = [int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return host, int(environ.get("MASTER_PORT") or 20000 + (numbers[0] * 37 + numbers[1]) % 12000)


def first_host(nodes: str) -> str:
    """The first name of a Slurm list of machines: gpu[03-05,9],login -> gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\]\-,]*)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
