"""Ranks talking to each other: sums and concatenations of tensors, small objects, and the end of the whole job.

    alone        NullCommunicator    nothing to do, nothing to install
    mpirun, srun MpiCommunicator     CPU tensors through mpi4py's buffers
    --mpi=none   GlooCommunicator    CPU tensors through torch.distributed, ranks found over TCP
    any of them  NcclCommunicator    CUDA tensors through NCCL; objects go through the one that started the ranks

Sums on the CPU are taken in float32 at least: float16 and bfloat16 tensors are widened, added, and rounded once.  NCCL
adds in the tensor's own dtype, rounding at each hop.  A gather gives every rank the same bytes.

A rank that fails calls `abort`, which ends the others; a rank that is killed is noticed by mpirun or srun, or through
its lifeline (gpt/lifeline.py); a rank that hangs is noticed by the others, which wait no longer than GPT_RANK_TIMEOUT
seconds (600): to find each other, in one exchange on a CPU, in one step on a GPU.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from gpt.console import print_error
from gpt.errors import ConfigError
from gpt.launch import let_lower_ranks_speak, let_mpirun_forward, read_launch

if TYPE_CHECKING:
    import torch

POLL_S = 0.001
# Longer than a slow machine needs to end an interpreter; ranks that were killed are not waited for beyond it.
LEAVING_TIME_S = 10.0
TIMEOUT_VARIABLE = "GPT_RANK_TIMEOUT"
_DEFAULT_TIMEOUT_S = 600.0
GONE_HINT = "look for its message; srun --kill-on-bad-exit ends all ranks with the first"


class SmallSum(Protocol):
    """Sums small tensors over GPUs that share memory; larger ones are left to `all_reduce`."""

    limit_bytes: int

    def __call__(
        self, tensor: torch.Tensor, stream: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> bool:
        """Replaces a contiguous `tensor` by its sum, or adds the sum and `bias` [last axis] to the float32 `stream` of
        its shape, and returns True; or leaves everything as it is and returns False.  The same on all ranks, which
        call it with the same shapes and dtypes."""
        ...


class Communicator(Protocol):
    """One rank's side.  Every rank makes the same calls in the same order.

    local_rank, local_size: among the ranks of this machine.  stage: what the rank is at, for messages about failures;
    on GPUs a stage that is not one of IDLE_STAGES may not last longer than one wait.
    small_sum: what `all_reduce` uses for small tensors, where there is something better for them.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    stage: str
    small_sum: SmallSum | None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` (floating point, one shape on all ranks) by the sum over the ranks."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors (one shape and dtype), joined along `dim` in the order of the ranks."""
        ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, which must be picklable, on every rank."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        ...

    def barrier(self) -> None:
        """Returns when all ranks are here.  Waits without a limit and leaves the processor to others."""
        ...

    def roll_call(self, limit_s: float) -> list[int]:
        """The ranks that rank 0 has not heard of within the limit, as rank 0 sees it; [] elsewhere."""
        ...

    def versions(self) -> dict[str, str]:
        """What carries the messages, by name."""
        ...

    def speaks(self) -> bool:
        """Whether this rank, which is about to end the job, says why: as far as can be told no other has."""
        ...

    def abort(self, code: int) -> None:
        """Ends the job with this exit code, whatever the other ranks are doing."""
        ...


class NullCommunicator:
    """The only rank."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        self.stage = ""
        self.small_sum: SmallSum | None = None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def roll_call(self, limit_s: float) -> list[int]:
        return []

    def versions(self) -> dict[str, str]:
        return {}

    def speaks(self) -> bool:
        return True

    def abort(self, code: int) -> None:
        pass


# Stages that may last: nobody waits for this rank's part of a step.
WAITING = "waiting for prompts"
IDLE_STAGES = ("", WAITING)


class Watch:
    """Ends the job when a wait for the other ranks takes too long.  `with watch("all-reduce"): ...`"""

    interval_s = 0.1  # well below a rank's turn to speak: they all find out at the same time

    def __init__(self, comm: Communicator, also: Callable[[], None] | None = None):
        """also: called at each look as well."""
        self._comm = comm
        self._also = also
        self._limit_s = time_limit_s()
        self._what = ""
        self._since: float | None = None
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def __call__(self, what: str) -> Watch:
        self._what = what
        return self

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def follow(self, stage: str) -> None:
        """For waits that nobody sees begin and end: a stage takes no longer than one of them may."""
        self._what = "this step"
        self._since = None if stage in IDLE_STAGES else time.monotonic()

    def _run(self) -> None:
        while True:
            time.sleep(self.interval_s)
            if self._also is not None:
                self._also()
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s:
                message = f"{describe_rank(self._comm)}: no answer from the other ranks for {self._limit_s:g} s "
                message += f"in {self._what}\n  next:    look at what they are doing, or raise {TIMEOUT_VARIABLE}"
                end_job(self._comm, message, 1)


class Deadline:
    """Ends this process, and with it the job, when a part of the work takes longer than `limit_s`: for programs that
    have to end in any case.  `with Deadline(60) as deadline: deadline.begin("roll call"); ...`"""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._what = ""
        self._since: float | None = None

    def begin(self, what: str) -> None:
        """The next part, with the whole limit for itself."""
        self._what, self._since = what, time.monotonic()
        active().stage = what

    def __enter__(self) -> Deadline:
        self.begin("start")
        threading.Thread(target=self._run, daemon=True, name="deadline").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._since = None

    def _run(self) -> None:
        while self._since is not None:
            time.sleep(min(0.1, self._limit_s / 4))
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s:
                late = f"{self._what} takes more than {self._limit_s:g} s: a rank is missing or hangs"
                end_job(active(), f"rank {read_launch().rank}: {late}", 1)
                os._exit(1)


def end_job(ranks: Communicator, message: str, code: int) -> None:
    """Says why, unless another rank has, and ends all ranks with this exit code."""
    let_lower_ranks_speak()
    if ranks.speaks():
        print_error(message)
    let_mpirun_forward()
    ranks.abort(code)


def time_limit_s() -> float:
    """The longest wait inside a step.  Raises ConfigError where the variable holds no positive number."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(_DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e9:
        raise ConfigError(f"{TIMEOUT_VARIABLE} is no time", found=repr(text), allowed="seconds, above 0")
    return seconds


def summable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where it can be summed in place, else a contiguous float32 copy."""
    import torch

    if tensor.dtype in (torch.float32, torch.float64):
        return tensor.contiguous()
    return tensor.to(torch.float32, memory_format=torch.contiguous_format)


def describe_rank(comm: Communicator) -> str:
    """`rank 1, new token 5`, or "" for one that is alone."""
    if comm.size == 1:
        return ""
    return f"rank {comm.rank}, {comm.stage}" if comm.stage else f"rank {comm.rank}"


def own_address(ranks: Communicator) -> str:
    """Where the other ranks reach this one.  Raises OSError where its machine's name does not resolve."""
    if ranks.local_size == ranks.size:
        return "127.0.0.1"
    return os.environ.get("MASTER_ADDR") or socket.gethostbyname(socket.gethostname())


_state: dict[str, Communicator] = {"active": NullCommunicator()}


def active() -> Communicator:
    """The communicator that `start` made, a NullCommunicator before."""
    return _state["active"]


def start() -> Communicator:
    """Joins the ranks that this process was started among; further calls return the same communicator.

    Raises ConfigError where they cannot be joined, GptError where they are not found.
    """
    launch = read_launch()
    if launch.size > 1 and active().size == 1:
        if launch.has_mpi:
            from gpt.comm_mpi import MpiCommunicator

            _state["active"] = MpiCommunicator(launch)
        else:
            from gpt.comm_gloo import GlooCommunicator

            _state["active"] = gloo = GlooCommunicator(launch)
            gloo.join()
    return active()
