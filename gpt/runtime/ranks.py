"""From an engine's number of ranks to ranks that run: started, counted, given a device and their share of the
processors."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt import lifeline
from gpt.comm import Communicator, active, start
from gpt.console import log
from gpt.engine.folder import EngineInfo, open_engine
from gpt.errors import ConfigError, EngineError
from gpt.launch import find_mpirun, launch_command, read_launch

if TYPE_CHECKING:
    import torch


def join_ranks(info: EngineInfo) -> Communicator:
    """The communicator of this process among the ranks of an engine; costs nothing for an engine of one rank.

    Raises ConfigError for a launch of another number of ranks, EngineError where ranks see different engines.
    """
    ranks = start()
    if ranks.size != info.build.world_size:
        raise _wrong_number(info, ranks.size)
    if ranks.size == 1:
        return ranks
    build_ids = ranks.gather_objects(info.build_id)
    if len(set(build_ids)) > 1:
        raise EngineError(
            f"the ranks see different engines in {info.folder}",
            found=[f"rank {rank}: build {build_id}" for rank, build_id in enumerate(build_ids)],
            hint="give all machines the same folder, or copy it to each again",
        )
    share_processors(ranks)
    if lifeline.hold(ranks):
        processes = ranks.gather_objects(f"{os.getpid()} on {socket.gethostname()}")
        log.info("Ranks: %s", ", ".join(f"{rank} is process {process}" for rank, process in enumerate(processes)))
    return ranks


def check_same_input(ranks: Communicator, rows: Sequence[object]) -> None:
    """Raises ConfigError where files of one name hold different rows on the ranks' machines: all compute what rank 0
    asks for, but would end after different numbers of batches."""
    if ranks.size == 1:
        return
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    found = ranks.gather_objects(f"{len(rows)} rows, checksum {digest}")
    if len(set(found)) > 1:
        raise ConfigError(
            "the ranks read different input",
            found=[f"rank {rank}: {own}" for rank, own in enumerate(found)],
            hint="give all machines the same input file and tokenizer",
        )


def _wrong_number(info: EngineInfo, num_started: int) -> ConfigError:
    needed = info.build.world_size
    what = f"the engine in {info.folder} has {needed} {'rank' if needed == 1 else 'ranks'}, {num_started} "
    what += "was started" if num_started == 1 else "were started"
    if needed == 1:
        hint = "start it without mpirun or srun, or build with --world_size " + str(num_started)
    elif read_launch().by_slurm:
        hint = f"srun --ntasks {needed} ..."
    else:
        hint = launch_command(needed)
        if Path(sys.argv[0]).name == "run.py":
            hint += "\n           or add --spawn, which does that"
    return ConfigError(what, hint=hint)


def share_processors(ranks: Communicator) -> None:
    """Every rank computes with its part of the processors that it shares with others, unless OMP_NUM_THREADS says
    otherwise: more threads than processors wait for each other."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    own = _usable_processors()
    sharing = sum(other == (socket.gethostname(), own) for other in ranks.gather_objects((socket.gethostname(), own)))
    torch.set_num_threads(max(1, len(own) // sharing))


def _usable_processors() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def place_on_gpu(ranks: Communicator, device: torch.device | None) -> Communicator:
    """The communicator for tensors on `device`, or for CPU tensors where it is None.

    Raises ConfigError where some ranks have a GPU and others none, or two share one.
    """
    import torch

    used = None if device is None else f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    all_used = ranks.gather_objects(used)
    if all(other is None for other in all_used):
        return ranks
    if device is None or None in all_used or len(set(all_used)) < ranks.size:
        shown = [f"rank {rank}: {other or 'no GPU'}" for rank, other in enumerate(all_used)]
        raise ConfigError(
            "each rank needs a GPU of its own",
            found=shown,
            hint="start fewer ranks per machine, or use --device cpu on all of them",
        )
    from gpt.comm_nccl import NcclCommunicator
    from gpt.runtime.peer_memory import connect_peers

    torch.cuda.set_device(device)
    gpus = NcclCommunicator(ranks, device)
    gpus.small_sum = connect_peers(ranks, gpus.group, device)
    return gpus


def spawn_ranks(engine_dir: Path, script: str, arguments: Sequence[str]) -> int | None:
    """Starts `script` again on all ranks of an engine, on this machine, and returns the exit code of the whole; None
    in a process that is one of several ranks already, and for an engine of one rank.

    Raises ConfigError where there is no mpirun, EngineError for a bad engine.
    """
    if active().size > 1 or read_launch().size > 1:
        return None
    num_ranks = open_engine(engine_dir).build.world_size
    if num_ranks == 1:
        return None
    command = [find_mpirun(), "-n", str(num_ranks), sys.executable, script, *arguments]
    log.info("Starting %d ranks: %s", num_ranks, " ".join(command[:5]))
    # Inside a job mpirun would let srun start them, which waits for the processors that this process has.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
    return subprocess.run(command, check=False, env=own).returncode
