"""Who started this process, and beside how many others: read from the environment, before any library is asked.

mpirun of MPICH (and everything else that speaks PMI) sets PMI_*, Open MPI's sets OMPI_*, srun sets SLURM_* and, under
--mpi=pmi2 or pmix, PMI_* or PMIX_* too.  A process that none of them started is alone, and needs none of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import ConfigError

# (variable with the number of ranks, with the rank), most specific first: mpirun inside a Slurm job starts its ranks
# through srun, so that Slurm's own numbers may count mpirun's servants.
_STARTERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# Any of these means that a process manager for MPI is at work.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_FD", "PMIX_RANK")
# Ranks that fail alike come within this time of each other; the lowest one speaks for all.
_SPEAKING_TIME_S = 0.5
_NUM_WAITING = 8  # higher ranks wait no longer than this one
# mpirun forwards what its ranks print, and drops what it has not yet read when it ends them.
_FORWARDING_TIME_S = 0.2


@dataclass(frozen=True)
class Launch:
    """`variable` is what said `size`, "" for a process that was started alone."""

    rank: int = 0
    size: int = 1
    variable: str = ""
    has_mpi: bool = False

    @property
    def by_slurm(self) -> bool:
        return "SLURM_STEP_NUM_TASKS" in os.environ


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """What the environment says; numbers that are none count as absent."""
    environ = os.environ if environ is None else environ
    for size_name, rank_name in _STARTERS:
        size, rank = environ.get(size_name, ""), environ.get(rank_name, "")
        if size.isdecimal() and rank.isdecimal() and int(size) > 1:
            has_mpi = any(name in environ for name in _MPI_VARIABLES)
            return Launch(int(rank), int(size), size_name, has_mpi)
    return Launch()


def let_lower_ranks_speak() -> None:
    """Called by a rank that is about to report a failure: a lower rank with the same one ends the job meanwhile, and
    with it the repetition."""
    time.sleep(speaking_turn_s(read_launch().rank))


def speaking_turn_s(rank: int) -> float:
    """When a rank says what others may say, too: the lowest first."""
    return min(rank, _NUM_WAITING) * _SPEAKING_TIME_S


@contextlib.contextmanager
def speaking_for_all() -> Iterator[bool]:
    """Around a message that all ranks have alike before they could join: whether this rank says it.

    That is rank 0.  In a step of Slurm's it is whichever rank of the first machine comes first, since srun may end
    rank 0 when a faster one leaves with an error; that one then stays until the others have come and kept quiet, and
    ranks of other machines stay until it has come.
    """
    own = read_launch()
    names = [os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "STEP_LAUNCHER_PORT")]
    if own.size == 1 or not all(name.isdecimal() for name in names):
        yield own.rank == 0
        return
    if os.environ.get("SLURM_NODEID") != "0":
        yield False
        time.sleep(speaking_turn_s(own.size))
        return
    # A name of Linux's own, in no folder, which is free again when its owner ends.
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind("\0" + "-".join(["gpt-ranks", *names]))
        except OSError:
            yield False
            return
        yield True
        time.sleep(speaking_turn_s(own.size))


def let_mpirun_forward() -> None:
    """Called between the last message of a rank and the end of the job."""
    sys.stderr.flush()
    time.sleep(_FORWARDING_TIME_S)


def launch_command(num_ranks: int, argv: list[str] | None = None) -> str:
    """The command line that starts this script on `num_ranks` ranks of this machine."""
    python = sys.executable
    found = shutil.which("python3")
    if found is not None and Path(found).absolute() == Path(python).absolute().with_name("python3"):
        python = "python3"
    mpirun = own_mpirun()
    if mpirun is None or shutil.which("mpirun") == mpirun:
        mpirun = "mpirun"
    return shlex.join([mpirun, "-np", str(num_ranks), python, *(sys.argv if argv is None else argv)])


def own_mpirun() -> str | None:
    """The mpirun that came with this Python's packages, which is the one that its mpi4py finds."""
    path = Path(sys.prefix) / "bin" / "mpirun"
    return str(path) if path.is_file() else None


def find_mpirun() -> str:
    """Raises ConfigError where there is none."""
    found = own_mpirun() or shutil.which("mpirun")
    if found is None:
        raise ConfigError(
            "no mpirun to start the ranks with",
            found=f"none in {Path(sys.prefix) / 'bin'} and none on the PATH",
            hint="python -m pip install mpich mpi4py, or load the cluster's MPI module",
        )
    return found


def singletons(launch: Launch, mpi_size: int, library: str) -> ConfigError:
    """The error for processes that were started together and do not know of each other."""
    name = _short_name(library)
    if launch.by_slurm:
        hint = _slurm_hint(library)
    elif _is_mpich(library) == launch.variable.startswith("OMPI"):
        hint = f"this mpirun is another library's: {launch_command(launch.size)}, or MPI4PY_MPIABI chooses the library"
    else:
        hint = f"start with the mpirun that belongs to {name}: {launch_command(launch.size)}"
    return ConfigError(
        "MPI did not connect the ranks",
        found=f"{launch.variable} says {launch.size} ranks, MPI ({name}) counts {mpi_size}",
        allowed="the same number from both",
        hint=hint,
    )


def check_wire(library: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Before MPI_Init, where libraries end the process, each rank with a message of its own: raises ConfigError for an
    srun --mpi=... that this MPI cannot join, and returns a warning where it depends on how the library was built.

    library: its version text, in which MPICH tells its build options.
    """
    environ = os.environ if environ is None else environ
    over_pmi = bool({"PMI_FD", "PMI_RANK"} & environ.keys())
    over_pmix = "PMIX_RANK" in environ
    if "SLURM_STEP_NUM_TASKS" not in environ or "OMPI_COMM_WORLD_RANK" in environ or over_pmi == over_pmix:
        return None
    name, wire = _short_name(library), "PMI-2" if over_pmi else "PMIx"
    version = re.search(r"Open MPI v(\d+)", library)
    if over_pmi and version is not None:
        unfit, known = True, int(version.group(1)) >= 5  # from 5 on it has nothing but PMIx
    else:
        unfit = over_pmix and "MPICH" in library and "pmix" not in library.lower()
        known = "mpich configure:" in library.lower()
    if not unfit:
        return None
    if not known:
        return f"ranks started over {wire}, which {name} speaks in some builds only; {_slurm_hint(library)}"
    raise ConfigError(
        "MPI cannot connect the ranks",
        found=f"ranks started over {wire}, which this {name} was built without",
        hint=_slurm_hint(library),
    )


def _is_mpich(library: str) -> bool:
    return "MPICH" in library or "Intel" in library


def _short_name(library: str) -> str:
    return "MPICH" if _is_mpich(library) else "Open MPI" if "Open MPI" in library else library.split("\n")[0][:40]


def _slurm_hint(library: str) -> str:
    wire = "pmi2" if _is_mpich(library) else "pmix"
    return f"srun --mpi={wire} for {_short_name(library)}; srun --mpi=none does without MPI"
