"""check.py --ranks: what it says about ranks that are well, differ, are wrong, missing or hang."""

from __future__ import annotations

import json
import time

import pytest
from ranks import PROGRAMS, mpirun, without_mpi

import check
from gpt.runtime.gpu_links import describe, read_matrix
from gpt.runtime.rank_check import SIZES, RankFacts, different_versions

CHECK = ("check.py", "--ranks", "--device", "cpu")
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tPHB\tSYS\t0-15\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \tSYS\t16-31\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe\n"
)


@pytest.mark.mpi
def test_ranks_that_are_well() -> None:
    result = mpirun(2, *CHECK)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "2 ranks on 1 machine, CPU tensors over MPI"
    assert sum(line.startswith("  rank ") for line in lines) == 2
    assert lines[-1] == "verdict: sums and versions are right on all ranks"
    table = lines.index(next(line for line in lines if "busbw" in line)) + 1
    assert [line.split()[:2] for line in lines[table : table + len(SIZES)]][::7] == [["4.0", "KiB"], ["64.0", "MiB"]]


@pytest.mark.mpi
def test_the_report_as_json() -> None:
    result = mpirun(3, *CHECK, "--json")
    assert result.returncode == 0, result.stderr
    assert "no effect" not in result.stderr
    report = json.loads(result.stdout)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2]
    assert report["problems"] == []
    for speed, num_bytes in zip(report["speeds"], SIZES, strict=True):
        assert speed["num_bytes"] == num_bytes
        assert speed["algbw"] == num_bytes / speed["seconds"]
        assert speed["busbw"] == pytest.approx(speed["algbw"] * 4 / 3)  # 2 (R - 1) / R


def test_ranks_without_mpi() -> None:
    first, second = without_mpi(2, *CHECK)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), (first, second)
    assert first.stdout.startswith("2 ranks on 1 machine, CPU tensors over gloo\n")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("start", "rank 0: the ranks do not find each other in 10 s: one of 2 is missing"),
        ("roll call", "nothing from rank 1 in 5 s"),
        ("sums", "no answer from the other ranks for 10 s in all-reduce"),
    ],
)
def test_a_rank_that_is_missing(where: str, told: str) -> None:
    begin = time.monotonic()
    result = mpirun(2, PROGRAMS / "absent.py", where, "--device", "cpu", "--timeout", "10")
    assert time.monotonic() - begin < 60
    assert result.returncode != 0
    assert "verdict" not in result.stdout
    assert told in result.stderr
    assert result.stderr.count("error:") == 1, result.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("versions", "problem: gpt: 0.1.0 on rank 0, 0.0.1 on rank 1"),
        ("wrong sums", "problem: rank 1, sum of 1000 float16: 1 sums and 0 gathered values are wrong"),
    ],
)
def test_ranks_that_are_not_alike(where: str, told: str) -> None:
    result = mpirun(2, PROGRAMS / "absent.py", where, "--device", "cpu")
    assert result.returncode == 1, result.stderr
    assert told in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1].endswith(" problems")


def test_bad_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        ([], "nothing to check"),
        (["--ranks"], "-np 2 "),
        (["--ranks", "folder", "--timeout", "0"], "--ranks looks at machines"),
    ):
        assert check.main(arguments) == 2
        assert told in capsys.readouterr().err
    assert check.main(["--ranks", "--timeout", "nan"]) == 2


def test_versions_that_differ() -> None:
    def facts(rank: int, **versions: str) -> RankFacts:
        return RankFacts(rank, "m", 1, "cpu", "x86", 0, 1, versions)

    same = [facts(rank, torch="2.11", mpi="a") for rank in range(3)]
    assert different_versions(same) == []
    assert different_versions([*same, facts(3, torch="2.12")]) == [
        "mpi: a on rank 0, 1, 2, none on rank 3",
        "torch: 2.11 on rank 0, 1, 2, 2.12 on rank 3",
    ]


def test_links_in_words() -> None:
    matrix = read_matrix(TOPOLOGY)
    assert matrix["GPU0", "GPU1"] == "NV18"
    assert matrix["GPU2", "GPU1"] == "PHB"
    assert [describe(code) for code in ("NV18", "NV1", "SYS", "")] == [
        "18 NVLinks",
        "1 NVLink",
        "PCIe and the link between processors",
        "unknown link",
    ]
    assert read_matrix("") == {}
