"""A real Slurm on this machine, with two virtual nodes: `sh tests/slurm/test.sh` (see docs/parallelism.md)."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import engines_of_ranks
from ranks import LIMIT_S, PROGRAMS, ROOT, environment

from gpt.engine.folder import EngineInfo

pytestmark = pytest.mark.slurm

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
BATCH = ROOT / "slurm" / "run.sbatch"
NUM_RANKS = 4
# The virtual nodes have no names that resolve, and all share one machine.
ON_ONE_MACHINE = {"MASTER_ADDR": "127.0.0.1"}
OPEN_MPI = {"MPI4PY_MPIABI": "openmpi"}
PROMPTS = ["--input_text", "the end", "a", "in the north"]


def four_free_ports() -> int:
    """The first of four neighbours that nobody has."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            for port in range(first, first + 4):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch talk to a cluster of this test's own."""
    folder = tmp_path_factory.mktemp("slurm")
    settings = {**os.environ, "PORT": str(four_free_ports())}
    subprocess.run(["sh", str(CLUSTER), "start", str(folder)], check=True, env=settings, timeout=LIMIT_S)
    variables = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    yield {**variables, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
    subprocess.run(["sh", str(CLUSTER), "stop", str(folder)], check=True, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, EngineInfo]:
    return engines_of_ranks(tmp_path_factory.mktemp("engines"), 1, NUM_RANKS)


def run_words(info: EngineInfo, *flags: str) -> list[str]:
    return ["--engine_dir", str(info.folder), "--max_output_len", "8", "--device", "cpu", *PROMPTS, *flags]


@pytest.fixture(scope="module")
def expected(engines: dict[int, EngineInfo]) -> str:
    """What one rank prints."""
    words = [sys.executable, "run.py", *run_words(engines[1])]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout


def sbatch(
    slurm: dict[str, str], options: list[str], arguments: list[str], log: Path, **variables: str
) -> tuple[int, str]:
    """Exit status of the job, and everything that it printed."""
    words = ["sbatch", "--parsable", "--output", str(log), *options, str(BATCH), *arguments]
    settings = {**slurm, **variables}
    job = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:  # sbatch --wait looks every ten seconds only
        words = ["scontrol", "show", "job", "--oneliner", job.stdout.strip()]
        told = subprocess.run(words, env=settings, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
        if re.search(r"JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING) ", told) is None:
            return int(re.search(r"ExitCode=(\d+):", told)[1]), log.read_text()  # type: ignore[index]
        time.sleep(0.2)
    raise TimeoutError(told)


def srun(slurm: dict[str, str], *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["srun", "--kill-on-bad-exit=1", *map(str, words)],
        cwd=ROOT,
        env={**slurm, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


NODES = {1: ["--nodes", "1", "--ntasks-per-node", "4"], 2: ["--nodes", "2", "--ntasks-per-node", "2"]}


@pytest.mark.parametrize(
    ("mpi", "num_nodes", "variables"),
    [
        ("pmi2", 1, {}),
        ("pmi2", 2, {}),
        ("none", 1, ON_ONE_MACHINE),
        ("none", 2, ON_ONE_MACHINE),
        # Slurm's PMIx wants a machine per node, which two virtual ones are not.
        ("pmix", 1, OPEN_MPI),
    ],
)
def test_a_job_prints_what_one_rank_prints(
    mpi: str,
    num_nodes: int,
    variables: dict[str, str],
    slurm: dict[str, str],
    engines: dict[int, EngineInfo],
    expected: str,
    tmp_path: Path,
) -> None:
    arguments = run_words(engines[NUM_RANKS])
    code, printed = sbatch(slurm, NODES[num_nodes], arguments, tmp_path / "job.log", MPI=mpi, **variables)
    assert (code, printed) == (0, expected)


def test_the_cluster_is_checked_first_when_asked(
    slurm: dict[str, str], engines: dict[int, EngineInfo], expected: str, tmp_path: Path
) -> None:
    arguments = run_words(engines[NUM_RANKS])
    code, printed = sbatch(slurm, NODES[2], arguments, tmp_path / "job.log", CHECK="1")
    assert code == 0, printed
    assert printed.endswith(expected)
    assert "4 ranks on 1 machine" in printed


@pytest.mark.parametrize("late", [0, 3], ids=["together", "rank 0 late"])
@pytest.mark.parametrize(
    ("mpi", "variables", "hint"),
    [("pmix", {}, "--mpi=pmi2 for MPICH"), ("pmi2", OPEN_MPI, "--mpi=pmix for Open MPI")],
)
def test_the_wrong_mpi_names_the_right_one(
    mpi: str, variables: dict[str, str], hint: str, late: int, slurm: dict[str, str], engines: dict[int, EngineInfo]
) -> None:
    """MPICH is refused before it ends the process in its own words; of Open MPI 4 there are builds for both.

    Both end the step as soon as one rank has found out, so that rank 0 may never get there.
    """
    words = [sys.executable, "run.py", *run_words(engines[NUM_RANKS], "--log_level", "warning")]
    start = ["sh", "-c", f'[ "$SLURM_PROCID" = 0 ] && sleep {late}; exec "$@"', "sh"]
    result = srun(slurm, *NODES[1], f"--mpi={mpi}", *start, *words, **variables)
    assert result.returncode != 0
    assert result.stderr.count(hint) == 1, result.stderr
    assert result.stdout == ""


def test_singletons_name_the_right_mpi(slurm: dict[str, str], engines: dict[int, EngineInfo]) -> None:
    """A step without a process manager, in which something has left a rank of MPI's: MPI counts one."""
    words = ["env", "OMPI_COMM_WORLD_RANK=0", sys.executable, "run.py", *run_words(engines[NUM_RANKS])]
    result = srun(slurm, *NODES[1], "--mpi=none", *words)
    assert result.returncode != 0  # srun's is the highest of all ranks, and those that are ended have one as well
    assert result.stderr.count("error: MPI did not connect the ranks") == 1
    assert "SLURM_STEP_NUM_TASKS says 4 ranks, MPI (MPICH) counts 1" in result.stderr
    assert "srun --mpi=pmi2 for MPICH" in result.stderr


@pytest.mark.parametrize(("mpi", "variables"), [("pmi2", {}), ("none", ON_ONE_MACHINE), ("pmix", OPEN_MPI)])
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_lost_rank_ends_the_job(
    how: str, mpi: str, variables: dict[str, str], slurm: dict[str, str], engines: dict[int, EngineInfo]
) -> None:
    begin = time.monotonic()
    words = [sys.executable, PROGRAMS / "die.py", how, *run_words(engines[NUM_RANKS])]
    result = srun(slurm, *NODES[1], f"--mpi={mpi}", *words, **variables)
    assert result.returncode != 0
    assert time.monotonic() - begin < 30
    assert "Output" not in result.stdout
    if how == "raises":
        assert result.stderr.count("error: rank ") == 1, result.stderr
        assert "error: rank 1, new token 3: unexpected RuntimeError: a cosmic ray" in result.stderr


def test_a_killed_rank_is_missed_where_srun_would_not_mind(
    slurm: dict[str, str], engines: dict[int, EngineInfo]
) -> None:
    words = [sys.executable, PROGRAMS / "die.py", "killed", *run_words(engines[NUM_RANKS])]
    begin = time.monotonic()
    result = srun(slurm, *NODES[2], "--mpi=pmi2", "--kill-on-bad-exit=0", *words)
    assert result.returncode != 0
    assert time.monotonic() - begin < 30
    assert result.stderr.count("error: rank ") == 1, result.stderr
    assert "error: rank 0, new token 3: rank 1 is gone" in result.stderr


def test_ranks_are_spawned_inside_a_job(slurm: dict[str, str], engines: dict[int, EngineInfo], expected: str) -> None:
    """By mpirun itself: srun would wait for the processors that run.py has."""
    result = srun(slurm, "--ntasks", "1", sys.executable, "run.py", *run_words(engines[NUM_RANKS]), "--spawn")
    assert (result.returncode, result.stdout) == (0, expected), result.stderr


def test_a_wrong_number_of_ranks(slurm: dict[str, str], engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    code, printed = sbatch(
        slurm, ["--nodes", "1", "--ntasks-per-node", "3"], run_words(engines[NUM_RANKS]), tmp_path / "job.log"
    )
    assert code != 0
    assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1
    assert "has 4 ranks, 3 were started" in printed
    assert "srun --ntasks 4" in printed
