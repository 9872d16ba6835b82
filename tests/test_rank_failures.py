"""Launches that go wrong: one message, from one rank, and an end of all of them."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from engines import build_engine, engines_of_ranks
from ranks import PROGRAMS, environment, mpirun, run_arguments, run_program, without_mpi

from gpt.engine.folder import EngineInfo, open_engine

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, EngineInfo]:
    return engines_of_ranks(tmp_path_factory.mktemp("text"), 1, 2, 4)


def on_each_rank(*words: object) -> list[str]:
    """A program that runs run.py with `words`, in which RANK is the number of the rank."""
    program = "import os, run, sys; rank = os.environ.get('PMI_RANK') or os.environ['SLURM_PROCID']; "
    program += "sys.exit(run.main([word.replace('RANK', rank) for word in sys.argv[1:]]))"
    return ["-c", program, *map(str, words)]


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("killed", 9, ["Killed (signal 9)"]),
        ("raises", 1, ["error: rank 1, new token 3: unexpected RuntimeError: a cosmic ray"]),
        ("hung", 1, ["error: rank 0, new token 3: no answer from the other ranks for 2 s in all-reduce"]),
    ],
)
def test_a_lost_rank_ends_the_job(how: str, code: int, told: list[str], engines: dict[int, EngineInfo]) -> None:
    begin = time.monotonic()
    result = mpirun(4, PROGRAMS / "die.py", how, *run_arguments(engines[4])[1:], GPT_RANK_TIMEOUT="2")
    assert time.monotonic() - begin < 30
    assert result.returncode == code
    for text in told:
        assert text in result.stdout + result.stderr
    assert result.stderr.count("error:") == (how != "killed")
    assert "Abort" not in result.stderr  # MPI's own
    assert "Output" not in result.stdout


def test_a_lost_rank_is_noticed_without_mpi(engines: dict[int, EngineInfo]) -> None:
    first, second = without_mpi(2, PROGRAMS / "die.py", "raises", *run_arguments(engines[2])[1:])
    assert (first.returncode, second.returncode) == (1, 1)
    assert "error: rank 1, new token 3: unexpected RuntimeError: a cosmic ray" in second.stderr
    assert "error:" not in first.stderr
    first, second = without_mpi(2, PROGRAMS / "die.py", "killed", *run_arguments(engines[2])[1:])
    assert first.returncode == 1
    assert "error: rank 0, new token 3: another rank is gone" in first.stderr


@pytest.mark.parametrize(("needed", "started"), [(2, 1), (2, 4), (1, 2)])
def test_a_wrong_number_of_ranks(needed: int, started: int, engines: dict[int, EngineInfo]) -> None:
    arguments = run_arguments(engines[needed], "--input_text", "a b")
    words = [sys.executable, *map(str, arguments)]
    if started == 1:
        result = run_program(words, environment())
    else:
        result = mpirun(started, *arguments)
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert f"has {needed} rank" in result.stderr
    if needed > 1:
        assert f"mpirun -np {needed} " in result.stderr.replace("'", "")  # quoted in a folder with a space
        assert shlex.join(map(str, arguments)) in result.stderr
        assert "--spawn" in result.stderr
    else:
        assert "start it without mpirun" in result.stderr


def test_one_message_for_what_all_ranks_find(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    for flags, code in (
        (["--input_text", ""], 2),
        (["--input_text", "a", "--input_file", "b.txt"], 2),
        (["--num_beams", "x"], 2),
        (["--engine_dir", tmp_path], 3),
        (["--device", "cuda:77"], 2),
    ):
        result = mpirun(2, *run_arguments(engines[2], *flags))
        assert (result.returncode, result.stdout) == (code, ""), flags
        assert result.stderr.count("error:") == 1, result.stderr


def test_singletons_are_refused(engines: dict[int, EngineInfo]) -> None:
    words = [sys.executable, *map(str, run_arguments(engines[2]))]
    for rank, messages in ((0, 1), (1, 0)):
        alone = environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=str(rank))
        result = run_program(words, alone)
        assert result.returncode == 2
        assert result.stderr.count("error: MPI did not connect the ranks") == messages


def test_a_missing_rank_file(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    shutil.copytree(engines[2].folder, tmp_path / "e")
    info = open_engine(tmp_path / "e")
    info.engine_path(1).unlink()
    result = mpirun(2, *run_arguments(info))
    assert result.returncode == 3
    assert "rank 1: gpt_float32_tp2_rank1.engine is missing" in result.stderr


@pytest.fixture
def two_machines(engines: dict[int, EngineInfo], tmp_path: Path) -> Path:
    """A path with RANK, where the ranks find different engines."""
    build_engine(None, tmp_path / "1", "--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--world_size", "2")
    (tmp_path / "0").symlink_to(engines[2].folder)
    return tmp_path / "RANK"


def test_different_engines_are_noticed(two_machines: Path) -> None:
    words = on_each_rank("--engine_dir", two_machines, "--max_output_len", 2)
    result = mpirun(2, *words)
    assert result.returncode == 3
    assert "error: rank 0: the ranks see different engines" in result.stderr
    shutil.rmtree(two_machines.with_name("1"))
    result = mpirun(2, *words)
    assert result.returncode == 3
    assert "error: rank 1: there is no engine folder" in result.stderr


def test_a_file_that_one_rank_does_not_see(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    """On the disk of one machine.  The others would wait in MPI_Init for a rank that has ended."""
    for name in ("in0.txt", "in0.csv"):
        (tmp_path / name).write_text("1,2\n")
    for flags in (["--input_file", "inRANK.txt"], ["--input_tokens", "inRANK.csv"]):
        words = on_each_rank(*run_arguments(engines[2], flags[0], tmp_path / flags[1])[1:])
        result = mpirun(2, *words)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: rank 1: no such input file\n"), result.stderr
        assert result.stderr.count("error:") == 1
    first, second = without_mpi(2, *words)
    assert (first.returncode, first.stderr) == (2, "")
    assert second.stderr.startswith("error: rank 1: no such input file\n")


def test_a_file_that_differs_between_ranks(engines: dict[int, EngineInfo], tmp_path: Path) -> None:
    """Rank 0 would end after one batch, and rank 1 wait for the second."""
    for rank, text in enumerate(("a\n", "a\n" * 5)):
        (tmp_path / f"in{rank}.txt").write_text(text)
    words = run_arguments(engines[2], "--input_file", tmp_path / "inRANK.txt")[1:]
    for flags in ([], ["--output_file", tmp_path / "out.jsonl"], ["--score_prompts"]):
        result = mpirun(2, *on_each_rank(*words, *flags), GPT_RANK_TIMEOUT="20")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: rank 0: the ranks read different input\n"), result.stderr
        assert "- rank 1: 5 rows, checksum " in result.stderr
        assert not (tmp_path / "out.jsonl").exists()


def test_a_rank_that_never_joins(engines: dict[int, EngineInfo]) -> None:
    """mpirun takes no notice of a process that ends before MPI_Init."""
    program = "import os, run, sys; os.environ.get('PMI_RANK') == '1' and sys.exit(1); sys.exit(run.main(sys.argv[1:]))"
    result = mpirun(3, "-c", program, *run_arguments(engines[2])[1:], GPT_RANK_TIMEOUT="5")
    assert result.returncode != 0
    assert result.stderr.startswith("error: rank 0: the ranks do not find each other in 5 s: one of 3 is missing\n")
    assert result.stderr.count("error:") == 1


def test_a_rank_that_never_joins_without_mpi(engines: dict[int, EngineInfo]) -> None:
    program = "import os, run, sys; os.environ['SLURM_PROCID'] == '1' and sys.exit(1); sys.exit(run.main(sys.argv[1:]))"
    first, _, third = without_mpi(3, "-c", program, *run_arguments(engines[2])[1:], GPT_RANK_TIMEOUT="5")
    assert first.returncode == third.returncode == 1
    assert first.stderr.startswith(
        "error: rank 0: the ranks did not find each other\n  found:   nothing from rank 1 in 5 s"
    )
    assert (first.stderr + third.stderr).count("error:") == 1


@pytest.mark.parametrize("variables", [{"MASTER_ADDR": "no.such.machine.invalid"}, {"MASTER_PORT": "soon"}])
def test_a_meeting_point_that_is_none(variables: dict[str, str], engines: dict[int, EngineInfo]) -> None:
    """Said at once, not after the time that machines have to come."""
    first, second = without_mpi(2, *run_arguments(engines[2]), **variables)
    assert (first.returncode, second.returncode, second.stderr) == (2, 2, "")
    assert first.stderr.startswith("error: the ranks have no place to meet\n")


def test_one_message_without_mpi(engines: dict[int, EngineInfo], two_machines: Path) -> None:
    """Nor does PyTorch tell of connections that break when ranks end."""
    words = on_each_rank("--engine_dir", two_machines, "--max_output_len", 2)
    for num_ranks, command, code, told in (
        (2, words, 3, "error: rank 0: the ranks see different engines"),
        (3, run_arguments(engines[2]), 2, "error: rank 0: the engine in "),
    ):
        results = without_mpi(num_ranks, *command)
        assert [result.returncode for result in results] == [code] * num_ranks
        assert results[0].stderr.startswith(told)
        assert "".join(result.stderr for result in results).count("error:") == 1
        assert all(result.stderr == "" for result in results[1:])


def test_rank_0_that_is_killed_without_mpi() -> None:
    """PyTorch alone would print its stack on every rank."""
    program = "import os, time; from gpt.comm import start; comm = start(); "
    program += "comm.rank == 0 and time.sleep(0.5) or comm.rank or os.kill(os.getpid(), 9); time.sleep(60)"
    first, second, third = without_mpi(3, "-c", program)
    assert (first.returncode, second.returncode, third.returncode) == (-9, 1, 1)
    assert second.stderr.startswith("error: rank 1: rank 0 is gone\n")
    assert second.stderr.count("\n") == 2
    assert third.stderr == ""


def test_an_end_that_is_none_of_an_error_without_mpi() -> None:
    """Of `run.py ... | head`: rank 0 has nothing more to do."""
    program = "from gpt.comm import start; comm = start(); comm.rank or comm.abort(0); comm.barrier()"
    assert [(result.returncode, result.stderr) for result in without_mpi(2, "-c", program)] == [(0, "")] * 2


WAITING = """
import os, socket, sys, time
from gpt import lifeline
from gpt.cli import run_main
from gpt.comm import start

def body():
    comm = start()
    assert (lifeline.hold(comm), lifeline.hold(comm)) == (True, False)
    comm.barrier()
    comm.stage = "loading"
    if comm.rank == 0:  # somebody who looks for open ports
        socket.create_connection(("127.0.0.1", lifeline._held[0]._server.getsockname()[1])).close()
    if sys.argv[1] == "killed":
        if comm.rank == 1:
            os.kill(os.getpid(), 9)
        comm.barrier()
    elif comm.rank != 1:
        time.sleep(lifeline._GRACE_S + 2)

if sys.argv[1] == "killed":
    sys.exit(run_main(body))
body()  # ranks end one after the other
"""


def test_a_rank_that_is_killed_while_others_wait() -> None:
    """Without a limit, as for prompts that somebody types."""
    first, second, third = without_mpi(3, "-c", WAITING, "killed")
    assert (first.returncode, second.returncode, third.returncode) == (1, -9, 1)
    assert first.stderr.startswith("error: rank 0, loading: rank 1 is gone\n")
    assert first.stderr.count("error:") == 1
    assert third.stderr == ""


def test_a_rank_that_ends_before_the_others() -> None:
    results = without_mpi(3, "-c", WAITING, "ends")
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
