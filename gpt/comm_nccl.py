"""Ranks over NCCL, of torch.distributed: CUDA tensors."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpt.comm import LEAVING_TIME_S, Communicator, SmallSum, Watch, own_address, time_limit_s
from gpt.console import print_error
from gpt.errors import ConfigError, GptError

if TYPE_CHECKING:
    import torch


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
            host = own_address(control)
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
        if not self._left.wait(LEAVING_TIME_S):
            print_error(f"rank {self.rank}: NCCL has not ended within {LEAVING_TIME_S:g} s; all work was done before")
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

    def speaks(self) -> bool:
        return self._control.speaks()

    def abort(self, code: int) -> None:
        self._control.abort(code)


def _time_limit() -> datetime.timedelta:
    return datetime.timedelta(seconds=time_limit_s())
