"""Ranks over torch.distributed: gloo for CPU tensors without MPI, NCCL for CUDA tensors."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gpt.comm import POLL_S, Communicator, SmallSum, Watch, summable, time_limit_s
from gpt.console import print_error
from gpt.errors import ConfigError, GptError, brief
from gpt.launch import Launch

if TYPE_CHECKING:
    import torch

# Longer than a slow machine needs to end an interpreter; ranks that were killed are not waited for beyond it.
_LEAVING_TIME_S = 10.0


class GlooCommunicator:
    """CPU tensors over torch.distributed, for ranks that srun --mpi=none started and that have to find each other."""

    def __init__(self, launch: Launch):
        """Raises GptError where rank 0 cannot be reached."""
        import torch.distributed as dist

        host, port = _meeting_point()
        self.rank, self.size = launch.rank, launch.size
        self.stage = ""
        self.small_sum: SmallSum | None = None
        try:
            self._store = dist.TCPStore(host, port, launch.size, launch.rank == 0, timeout=_time_limit())
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=_time_limit()
            )
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
            deadline = time.monotonic() + _LEAVING_TIME_S
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


class NcclCommunicator:
    """CUDA tensors of one device per rank; everything else through `control`, which started the ranks."""

    def __init__(self, control: Communicator, device: torch.device):
        """Raises ConfigError where PyTorch was built without NCCL."""
        import torch.distributed as dist

        if not dist.is_nccl_available():
            raise ConfigError(
                "GPU ranks need NCCL, which this PyTorch does not have",
                hint="install a CUDA build of PyTorch, or use --device cpu",
            )
        self._control = control
        self._dist = dist
        self.rank, self.size = control.rank, control.size
        self.local_rank, self.local_size = control.local_rank, control.local_size
        self.small_sum: SmallSum | None = None  # where the GPUs reach each other's memory
        # NCCL sees no hang of a graph, and nobody that of a sum through shared memory.
        self._watch = Watch(self)
        self._releases: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._leaving, self._left = threading.Event(), threading.Event()
        threading.Thread(target=self._end_late, daemon=True, name="leaving").start()
        if dist.is_initialized():
            self.group = dist.new_group(backend="nccl", timeout=_time_limit(), device_id=device)
        else:
            self.group = self._make_group(device)
        atexit.register(self._leave)

    def _make_group(self, device: torch.device) -> torch.distributed.ProcessGroup:
        dist, control = self._dist, self._control
        # Rank 0 takes any free port, so that two jobs on one machine never meet.
        store = None
        address = None
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR") or _own_address(control)
            store = dist.TCPStore(host, 0, self.size, True, timeout=_time_limit(), wait_for_workers=False)
            address = (host, store.port)
        host, port = control.broadcast_object(address)
        if store is None:
            store = dist.TCPStore(host, port, self.size, False, timeout=_time_limit())
        dist.init_process_group(
            "nccl", store=store, rank=self.rank, world_size=self.size, timeout=_time_limit(), device_id=device
        )
        return dist.group.WORLD

    def before_leaving(self, release: Callable[[], None]) -> None:
        """`release`, a method, is called at the end of the process while its object lives: NCCL does not end before the
        last CUDA graph is gone that holds one of its sums."""
        self._releases.append(weakref.WeakMethod(release))

    def release_all(self) -> None:
        """What `before_leaving` was told to call."""
        for reference in self._releases:
            release = reference()
            if release is not None:
                release()

    def _leave(self) -> None:
        """At the end of the process, when everything is written: graphs, then NCCL, which may not keep us."""
        self._leaving.set()
        self.release_all()
        gc.collect()  # graphs in cycles that nobody refers to
        self._dist.destroy_process_group(self.group)
        self._left.set()

    def _end_late(self) -> None:
        """A thread of its own from the start: an interpreter that ends starts none."""
        self._leaving.wait()
        if not self._left.wait(_LEAVING_TIME_S):
            print_error(f"rank {self.rank}: NCCL has not ended within {_LEAVING_TIME_S:g} s; all work was done before")
            os._exit(1)

    def nccl_address(self) -> int:
        """Where the NCCL communicator lies in memory, for a library that calls NCCL itself.  All ranks call this.

        Raises GptError where this PyTorch does not tell.
        """
        import torch

        # NCCL makes its communicator when it is first needed.
        self._dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()])
        backend = self.group._get_backend(torch.device("cuda"))
        if not hasattr(backend, "_comm_ptr"):
            raise GptError(
                "this PyTorch does not give its NCCL communicator to others",
                found=torch.__version__,
                allowed="2.6 or newer",
                hint="pip install -r requirements.txt",
            )
        return int(backend._comm_ptr())

    @property
    def stage(self) -> str:
        return self._control.stage

    @stage.setter
    def stage(self, text: str) -> None:
        self._control.stage = text
        self._watch.follow(text)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        total = tensor.contiguous()
        if self.small_sum is None or not self.small_sum(total):
            self._dist.all_reduce(total, group=self.group)
        if total is not tensor:
            tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        import torch

        own = tensor.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim)

    def broadcast_object(self, value: Any) -> Any:
        self._watch.follow("")  # rank 0 may take its time before
        return self._control.broadcast_object(value)

    def gather_objects(self, value: Any) -> list[Any]:
        self._watch.follow("")
        return self._control.gather_objects(value)

    def barrier(self) -> None:
        self._watch.follow("")
        self._control.barrier()

    def roll_call(self, limit_s: float) -> list[int]:
        return self._control.roll_call(limit_s)

    def versions(self) -> dict[str, str]:
        return self._control.versions()

    def abort(self, code: int) -> None:
        self._control.abort(code)


def _time_limit() -> datetime.timedelta:
    return datetime.timedelta(seconds=time_limit_s())


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


def _own_address(control: Communicator) -> str:
    if control.local_size == control.size:
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())
