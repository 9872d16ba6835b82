"""Who started the ranks, what they say to each other, and what is said where they do not hear each other."""

from __future__ import annotations

import os
import shlex
import threading
import time

import pytest
import torch
from ranks import PROGRAMS, mpirun, without_mpi, without_nccl

from gpt import comm, comm_nccl
from gpt.comm import NullCommunicator, Watch, describe_rank, summable, time_limit_s
from gpt.comm_gloo import first_host
from gpt.errors import ConfigError
from gpt.launch import Launch, launch_command, read_launch, singletons, speaking_for_all

SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, Launch(2, 4, "PMI_SIZE", True)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Launch(1, 2, "OMPI_COMM_WORLD_SIZE", True)),
        (SLURM, Launch(5, 8, "SLURM_STEP_NUM_TASKS", False)),
        ({**SLURM, "PMIX_RANK": "5"}, Launch(5, 8, "SLURM_STEP_NUM_TASKS", True)),
        ({**SLURM, "PMI_FD": "9"}, Launch(5, 8, "SLURM_STEP_NUM_TASKS", True)),
        # mpirun inside a Slurm job starts one servant per machine through srun.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "16", "PMI_RANK": "9"}, Launch(9, 16, "PMI_SIZE", True)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, Launch()),
        ({"PMI_SIZE": "many", "PMI_RANK": "0"}, Launch()),
        # The script of an sbatch job is not a step of it.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, Launch()),
    ],
)
def test_the_environment_tells_the_launch(environ: dict[str, str], expected: Launch) -> None:
    assert read_launch(environ) == expected


STEP = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_LAUNCHER_PORT": "4711",
    "SLURM_STEP_NUM_TASKS": "3",
}


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, node: int = 0, **more: str) -> None:
    for name, value in {**STEP, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), **more}.items():
        monkeypatch.setenv(name, value)


def test_the_first_rank_to_come_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun ends rank 0 when a faster one leaves: without this nobody has said why."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    on_rank(monkeypatch, 2)
    with speaking_for_all() as first:
        for rank, node, expected in ((0, 0, False), (1, 0, False), (0, 1, False), (1, 1, False)):
            on_rank(monkeypatch, rank, node)
            with speaking_for_all() as other:
                assert other is expected, (rank, node)
        on_rank(monkeypatch, 1, SLURM_STEP_ID="1")  # the ranks of another step have messages of their own
        with speaking_for_all() as elsewhere:
            assert elsewhere
        assert waits == [1.5] * 3  # on the other machine, until one of the first has come; of the other step's
        on_rank(monkeypatch, 2, SLURM_STEP_ID="0")
    assert first
    assert waits == [1.5] * 4  # the others come within this time, and keep quiet
    with speaking_for_all() as again:  # the next command of the same step begins anew
        assert again


@pytest.mark.parametrize(
    ("slurm", "variable", "library", "told"),
    [
        (True, "SLURM_STEP_NUM_TASKS", "MPICH Version: 5.0.2", ["srun --mpi=pmi2 for MPICH", "--mpi=none"]),
        (True, "PMI_SIZE", "Open MPI v5.0.11, package", ["srun --mpi=pmix for Open MPI"]),
        (False, "OMPI_COMM_WORLD_SIZE", "MPICH Version: 5.0.2", ["another library's", "-np 4", "MPI4PY_MPIABI"]),
        (False, "PMI_SIZE", "Open MPI v5.0.11, package", ["another library's", "-np 4"]),
        (False, "PMI_SIZE", "MPICH Version: 5.0.2", ["belongs to MPICH", "-np 4"]),
    ],
)
def test_singletons_are_told_how_to_start(
    slurm: bool, variable: str, library: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if slurm:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    message = str(singletons(Launch(0, 4, variable, True), 1, library))
    for text in [f"{variable} says 4 ranks", "counts 1", *told]:
        assert text in message


def test_launch_command() -> None:
    words = shlex.split(launch_command(3, ["run.py", "--input_text", "a b"]))
    assert words[0].endswith("mpirun")
    assert words[1:3] == ["-np", "3"]
    assert words[4:] == ["run.py", "--input_text", "a b"]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("gpu[03-05,9],login", "gpu03"),
        ("one", "one"),
        ("a,b", "a"),
        ("rack1-n[10-12]", "rack1-n10"),
        ("n[2,4]x", "n2x"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_one_rank_needs_nobody() -> None:
    alone = NullCommunicator()
    x = torch.ones(3)
    alone.all_reduce(x)
    alone.barrier()
    assert torch.equal(x, torch.ones(3))
    assert alone.all_gather(x, 0) is x
    assert (alone.broadcast_object(5), alone.gather_objects(5), alone.size) == (5, [5], 1)
    assert comm.start() is comm.active()
    assert describe_rank(alone) == ""


def test_what_is_summed_in_place() -> None:
    x = torch.ones(4, 4)
    assert summable(x) is x
    for other in (x.t()[1:, :2], x.half(), x.bfloat16().t()):
        copy = summable(other)
        assert copy.dtype == torch.float32
        assert copy.is_contiguous()
        assert copy.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "inf"])
def test_a_time_limit_is_a_positive_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_RANK_TIMEOUT", text)
    with pytest.raises(ConfigError, match="GPT_RANK_TIMEOUT"):
        time_limit_s()
    monkeypatch.setenv("GPT_RANK_TIMEOUT", "2.5")
    assert time_limit_s() == 2.5


class Recorder(NullCommunicator):
    """Whose end is an event."""

    size = 2

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def abort(self, code: int) -> None:
        self.ended.set()
        threading.Event().wait()  # as the real ones do not return


@pytest.mark.parametrize(
    ("stages", "ends"),
    [
        (["waiting for prompts", "new token 0", "new token 1"], True),
        (["new token 0", "new token 1", ""], False),
        (["new token 0", "waiting for prompts"], False),
    ],
)
def test_a_step_on_gpus_takes_no_longer_than_a_wait(
    stages: list[str], ends: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT_RANK_TIMEOUT", "0.2")
    monkeypatch.setattr(Watch, "interval_s", 0.05)
    control = Recorder()
    gpus = without_nccl()
    gpus._control, gpus.size, gpus._watch = control, 2, Watch(gpus)
    for stage in stages:
        gpus.stage = stage
    assert control.ended.wait(1.0) == ends
    assert (
        "rank 0, new token 1: no answer from the other ranks for 0.2 s in this step" in capsys.readouterr().err
    ) == ends


def test_exchanges_of_gpu_ranks_end_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = without_nccl()
    for exchange in (lambda: gpus.broadcast_object(1), lambda: gpus.gather_objects(1), gpus.barrier):
        gpus.stage = "step 3"
        assert gpus._watch._since is not None
        exchange()
        assert gpus._watch._since is None


class Graphs:
    """What a session holds, or has let go."""

    def __init__(self, events: list[str]):
        self.events = events

    def release(self) -> None:
        self.events.append("graphs released")


class Groups:
    """Of torch.distributed, only the end."""

    def __init__(self, events: list[str]):
        self.events = events
        self.ends = threading.Event()

    def destroy_process_group(self, group: None) -> None:
        assert self.ends.wait(10)
        self.events.append("NCCL ended")


def test_graphs_go_before_nccl() -> None:
    """NCCL waits for the last graph that holds one of its sums."""
    events: list[str] = []
    groups = Groups(events)
    groups.ends.set()
    gpus = without_nccl(groups)
    alive, gone = Graphs(events), Graphs(events)
    for graphs in (alive, gone):
        gpus.before_leaving(graphs.release)
    del graphs, gone
    gpus._leave()
    assert events == ["graphs released", "NCCL ended"]


def test_nccl_that_does_not_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    groups, codes = Groups([]), []

    def end(code: int) -> None:
        codes.append(code)
        groups.ends.set()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(comm_nccl, "LEAVING_TIME_S", 0.1)
    gpus = without_nccl(groups)
    threading.Thread(target=gpus._end_late, daemon=True).start()
    gpus._leave()
    assert codes == [1]
    assert capsys.readouterr().err == "error: rank 0: NCCL has not ended within 0.1 s; all work was done before\n"


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_exchange_over_mpi(num_ranks: int) -> None:
    result = mpirun(num_ranks, PROGRAMS / "exchange.py")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"rank {rank} of {num_ranks}: good" for rank in range(num_ranks)]


@pytest.mark.mpi
def test_exchange_without_mpi() -> None:
    results = without_mpi(2, PROGRAMS / "exchange.py")
    assert [(result.returncode, result.stdout) for result in results] == [
        (0, "rank 0 of 2: good\n"),
        (0, "rank 1 of 2: good\n"),
    ], results
