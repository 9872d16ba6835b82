"""Whether the ranks of a launch can work together: who they are, what links them, sums and their speed.

Every wait has a limit: a rank that is missing or hangs ends the job with a message, too.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt import __version__
from gpt.comm import TIMEOUT_VARIABLE, Communicator, Deadline, start
from gpt.console import human_bytes, progress
from gpt.dtypes import dtype_name
from gpt.errors import ConfigError
from gpt.launch import launch_command, read_launch

KIB = 1024
SIZES = tuple(4 * KIB * 4**step for step in range(8))  # 4 KiB to 64 MiB
# Of a size's timing; the bound on the number of sums keeps slow networks within it.
_SECONDS_PER_SIZE = 0.3
_MAX_SUMS = 200
_MIN_SUMS = 3
_THROUGH = {
    "MpiCommunicator": "CPU tensors over MPI",
    "GlooCommunicator": "CPU tensors over gloo",
    "NcclCommunicator": "CUDA tensors over NCCL",
}


@dataclass(frozen=True)
class RankFacts:
    """One rank.  free_bytes: of its GPU, 0 for a CPU."""

    rank: int
    machine: str
    process: int
    device: str
    device_name: str
    free_bytes: int
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Speed:
    """Sums of one size, in float32.  seconds: of one, on average over `num_sums` in a row, on the slowest rank.

    algbw: bytes over time.  busbw: algbw * 2 (R - 1) / R, what each link carries at least; both as nccl-tests define
    them, in bytes per second.
    """

    num_bytes: int
    seconds: float
    num_sums: int
    algbw: float
    busbw: float


@dataclass
class RankCheck:
    """What was found; no problems mean that the ranks are fit to work."""

    ranks: list[RankFacts]
    through: str
    links: list[str] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_ranks(device: str, timeout_s: float, sizes: tuple[int, ...] = SIZES) -> RankCheck:
    """Joins the ranks of this launch and checks them on `device` (auto, cpu or cuda).  The same result on all ranks.

    Raises ConfigError for a single process, ranks that were not connected, and ranks that cannot have a GPU each.
    """
    if read_launch().size == 1:
        raise ConfigError(
            "one process was started, which has nothing to check",
            hint=f"{launch_command(2)}; as many ranks as the engine will have",
        )
    os.environ[TIMEOUT_VARIABLE] = str(timeout_s)
    ranks = start()
    # What the communicator itself notices in time comes first.
    with Deadline(3 * timeout_s) as deadline:
        deadline.begin("roll call")
        missing = ranks.roll_call(timeout_s / 2)
        if missing:
            raise ConfigError(
                "ranks do not answer",
                found=f"nothing from rank {', '.join(map(str, missing))} in {timeout_s / 2:g} s",
                hint="look at their machines and logs; --timeout gives them more time",
            )
        deadline.begin("facts about the ranks")
        comm, check = _introduce(ranks, device)
        for what, result in _sums(comm, check.ranks[ranks.rank].device):
            deadline.begin(what)
            check.problems += result()
        for num_bytes in progress(sizes, what="sums", unit="size"):
            deadline.begin(f"sums of {human_bytes(num_bytes)}")
            check.speeds.append(_speed(comm, check.ranks[ranks.rank].device, num_bytes))
    return check


def _introduce(ranks: Communicator, device: str) -> tuple[Communicator, RankCheck]:
    """The communicator for tensors on the devices, and who the ranks are."""
    import torch

    from gpt.runtime.load import device_of_rank, pick_device
    from gpt.runtime.ranks import place_on_gpu, share_processors

    share_processors(ranks)
    chosen = device_of_rank(pick_device(device), ranks)
    on_gpu = chosen.type == "cuda"
    versions = {"gpt": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if on_gpu:
        versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    own = RankFacts(
        rank=ranks.rank,
        machine=socket.gethostname(),
        process=os.getpid(),
        device=str(chosen),
        device_name=torch.cuda.get_device_name(chosen) if on_gpu else platform.machine(),
        free_bytes=torch.cuda.mem_get_info(chosen)[0] if on_gpu else 0,
        threads=torch.get_num_threads(),
        versions={**versions, **ranks.versions()},
    )
    facts: list[RankFacts] = ranks.gather_objects(own)
    comm = place_on_gpu(ranks, chosen if on_gpu else None)
    links = describe_links(facts, ranks) if on_gpu else []
    return comm, RankCheck(facts, _THROUGH[type(comm).__name__], links, problems=different_versions(facts))


def different_versions(facts: list[RankFacts]) -> list[str]:
    """One line for each version that is not the same everywhere."""
    problems = []
    for name in sorted({name for rank in facts for name in rank.versions}):
        ranks_of: dict[str, list[int]] = {}
        for rank in facts:
            ranks_of.setdefault(rank.versions.get(name, "none"), []).append(rank.rank)
        if len(ranks_of) > 1:
            found = ", ".join(f"{version} on rank {', '.join(map(str, on))}" for version, on in ranks_of.items())
            problems.append(f"{name}: {found}")
    return problems


def describe_links(facts: list[RankFacts], ranks: Communicator) -> list[str]:
    """What lies between the GPUs of each pair of ranks that share a machine, as nvidia-smi names it."""
    import torch

    from gpt.runtime.gpu_links import own_links

    own = facts[ranks.rank]
    here = [rank for rank in facts if rank.machine == own.machine]
    uuids = ranks.gather_objects(str(torch.cuda.get_device_properties(torch.device(own.device)).uuid))
    lines = own_links(own, here, uuids)
    return [line for of_rank in ranks.gather_objects(lines) for line in of_rank]


def _sums(comm: Communicator, device: str) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """(what, function that returns problems) of every comparison with sums computed plainly."""
    import torch

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 1000, 100_003):
            name = f"sum of {count} {dtype_name(dtype)}"
            yield name, lambda dtype=dtype, count=count, name=name: _wrong_sum(comm, device, dtype, count, name)  # type: ignore[misc]


def _wrong_sum(comm: Communicator, device: str, dtype: Any, count: int, name: str) -> list[str]:
    """Whole numbers whose sums every dtype holds exactly, whatever the order: any difference is a wrong byte."""
    import torch

    index = torch.arange(count, device=device)
    values = [((7 * index + 5 * rank) % 9 - 4).to(dtype) for rank in range(comm.size)]
    found = values[comm.rank].clone()
    comm.all_reduce(found)
    expected = torch.stack([value.double() for value in values]).sum(0).to(dtype)
    num_wrong = int((found != expected).sum())
    gathered = comm.all_gather(values[comm.rank], 0)
    num_misplaced = int((gathered != torch.cat(values)).sum())
    return [
        f"rank {rank}, {name}: {wrong} sums and {misplaced} gathered values are wrong"
        for rank, (wrong, misplaced) in enumerate(comm.gather_objects((num_wrong, num_misplaced)))
        if wrong or misplaced
    ]


def _speed(comm: Communicator, device: str, num_bytes: int) -> Speed:
    import torch

    x = torch.zeros(num_bytes // 4, device=device)
    comm.all_reduce(x)  # the first of a size makes connections
    with _timed(device) as elapsed:
        comm.all_reduce(x)
    once = max(comm.gather_objects(elapsed()))
    num_sums = max(_MIN_SUMS, min(_MAX_SUMS, int(_SECONDS_PER_SIZE / max(once, 1e-9))))
    with _timed(device) as elapsed:
        for _ in range(num_sums):
            comm.all_reduce(x)
    seconds = max(comm.gather_objects(elapsed())) / num_sums
    algbw = num_bytes / seconds
    return Speed(num_bytes, seconds, num_sums, algbw, algbw * 2 * (comm.size - 1) / comm.size)


@contextmanager
def _timed(device: str) -> Iterator[Callable[[], float]]:
    """Gives a function that tells the seconds of the block, the device's work included."""
    import torch

    def settle() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    settle()
    times = [time.perf_counter()]
    yield lambda: times[1] - times[0]
    settle()
    times.append(time.perf_counter())


def as_text(check: RankCheck) -> str:
    """The report, with the verdict as its last line."""
    first = check.ranks[0]
    machines = len({rank.machine for rank in check.ranks})
    lines = [f"{len(check.ranks)} ranks on {machines} machine{'s' * (machines > 1)}, {check.through}"]
    for rank in check.ranks:
        free = f", {human_bytes(rank.free_bytes)} free" if rank.free_bytes else f", {rank.threads} threads"
        lines.append(
            f"  rank {rank.rank}: {rank.device} ({rank.device_name}{free}), process {rank.process} on {rank.machine}"
        )
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in first.versions.items()))
    lines += [f"link: {link}" for link in check.links]
    lines.append(f"{'all-reduce':>12} {'time us':>10} {'algbw GB/s':>11} {'busbw GB/s':>11} {'sums':>5}")
    for speed in check.speeds:
        lines.append(
            f"{human_bytes(speed.num_bytes):>12} {speed.seconds * 1e6:>10.1f} {speed.algbw / 1e9:>11.2f} "
            f"{speed.busbw / 1e9:>11.2f} {speed.num_sums:>5}"
        )
    lines += [f"problem: {problem}" for problem in check.problems]
    verdict = f"{len(check.problems)} problems" if check.problems else "sums and versions are right on all ranks"
    return "\n".join([*lines, f"verdict: {verdict}"])
