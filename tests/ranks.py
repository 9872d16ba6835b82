"""Starting programs of tests on several ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpt.comm import NullCommunicator, Watch
from gpt.comm_nccl import NcclCommunicator
from gpt.engine.folder import EngineInfo
from gpt.launch import find_mpirun

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "rank_programs"
# Far above what any of them needs on a busy machine; a test that runs into it has found a hang.
LIMIT_S = 120


def run_arguments(info: EngineInfo, *flags: object) -> list[object]:
    return ["run.py", "--engine_dir", info.folder, "--max_output_len", 8, "--device", "cpu", *flags]


def environment(**more: str) -> dict[str, str]:
    """This process's, with one thread per rank and the project importable."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def run_program(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program from the project's folder and returns what it wrote as it wrote it.

    Python's text mode would turn each carriage return, which a model may well say, into a newline.
    """
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, timeout=LIMIT_S, check=False)
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


def mpirun(num_ranks: int, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python *command` on all ranks, from the project's folder."""
    words = [find_mpirun(), "-n", str(num_ranks), sys.executable, *map(str, command)]
    return run_program(words, environment(**variables))


def without_mpi(num_ranks: int, *command: object, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """The same as `srun --mpi=none` starts it: no more than numbers in the environment.  One result per rank."""
    words = [sys.executable, *map(str, command)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(num_ranks):
        step = {"SLURM_STEP_NUM_TASKS": str(num_ranks), "SLURM_PROCID": str(rank), "MASTER_PORT": port, **variables}
        processes.append(
            subprocess.Popen(words, cwd=ROOT, env=environment(**step), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    results = []
    deadline = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            results.append(subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode()))
    finally:
        for process in processes:
            process.kill()
    return results


def without_nccl(dist: Any = None) -> NcclCommunicator:
    """The communicator of a GPU rank that is alone and exchanges nothing.  dist: instead of torch.distributed."""
    gpus = NcclCommunicator.__new__(NcclCommunicator)
    gpus._control, gpus._watch, gpus._releases = NullCommunicator(), Watch(NullCommunicator()), []
    gpus.rank, gpus.size, gpus.small_sum = 0, 1, None
    gpus._dist, gpus.group = dist, None
    gpus._leaving, gpus._left = threading.Event(), threading.Event()
    return gpus
