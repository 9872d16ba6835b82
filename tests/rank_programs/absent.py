"""check.py --ranks, but rank 1 is not where it should be:  absent.py WHERE <arguments of check.py>"""

from __future__ import annotations

import sys
import time

import check
from gpt.comm_mpi import MpiCommunicator
from gpt.launch import read_launch
from gpt.runtime import rank_check

where = sys.argv.pop(1)
right = MpiCommunicator.all_reduce


def hang(*_: object, **__: object) -> None:
    time.sleep(1000)


def wrong(comm: MpiCommunicator, tensor: object) -> None:
    right(comm, tensor)  # type: ignore[arg-type]
    tensor[-1] += 1  # type: ignore[index]


if read_launch().rank == 1:
    if where == "start":
        hang()
    if where == "roll call":
        MpiCommunicator.roll_call = hang  # type: ignore[assignment, method-assign]
    if where == "sums":
        MpiCommunicator.all_reduce = hang  # type: ignore[method-assign]
    if where == "versions":
        rank_check.__version__ = "0.0.1"
    if where == "wrong sums":
        MpiCommunicator.all_reduce = wrong  # type: ignore[assignment, method-assign]
sys.exit(check.main(["--ranks", *sys.argv[1:]]))
