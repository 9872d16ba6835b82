"""benchmarks/bench_node.py: steps end in time, failures are told and end nothing else, the plans name real flags."""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT
from test_readme import problem_of

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_node
from bench_node import Runner
from node_steps import Plan, Step


def step(name: str, program: str, limit_s: float = 20.0, gpus: tuple[int, ...] = ()) -> Step:
    return Step(name, ([sys.executable, "-c", program],), limit_s, gpus)


def test_failures_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "log.txt", 60)
    shows = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'], os.environ['NCCL_NVLS_ENABLE'])"
    runner.run_group([step("bad", "raise SystemExit('broken')"), step("good", shows, gpus=(2, 3))])
    assert sorted(result[:2] for result in runner.results) == [("bad", "exit code 1"), ("good", "done")]
    assert runner.failed
    log = (tmp_path / "log.txt").read_text()
    assert "broken" in log
    assert "sees 2,3 0" in log


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    program = "import os, subprocess, sys, time\n"
    program += (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    )
    program += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    runner = Runner(tmp_path / "log.txt", 60)
    begin = time.monotonic()
    runner.run_group([step("long", program, 1.5)])
    assert time.monotonic() - begin < 15
    assert runner.results[0][:2] == ("long", "too long")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_later_steps_do_without_what_has_failed(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "log.txt", 60)
    runner.run_group([Step("sums", ([sys.executable, "-c", "raise SystemExit(1)"],), 20, instead=("SUMS", "0"))])
    runner.run_group([step("later", "import os; print('SUMS is', os.environ['SUMS'])")])
    assert "SUMS is 0" in (tmp_path / "log.txt").read_text()


def test_what_the_budget_does_not_allow_is_left_out(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "log.txt", 1.0)
    runner.run_group([step("late", "print('never')")])
    assert runner.results[0][:2] == ("late", "left out")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_command_of_a_plan_is_accepted(ranks: int, tmp_path: Path) -> None:
    args = bench_node.build_parser().parse_args(["--ranks", str(ranks)])
    plan = Plan(args, tmp_path, tmp_path)
    groups = [plan.engines(), *plan.groups()]
    for group in groups[1:]:
        gpus = [gpu for one in group for gpu in one.gpus]
        assert len(set(gpus)) == len(gpus) <= ranks  # no two steps on one GPU
    names = {one.name for group in groups for one in group}
    assert {f"starcoder_{n} measured" for n in (1, 2, 4, 8) if n <= ranks} < names
    for words in (list(command) for group in groups for one in group for command in one.commands):
        if words[0] == "env":
            words = words[2:]
        if "mpirun" in Path(words[0]).name:
            words = words[3:]
        if len(words) < 2 or words[1] in ("-c", "-m"):
            continue
        assert problem_of(["python", *words[1:]]) is None


def test_table_shows_what_files_hold(tmp_path: Path) -> None:
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["a", "b", "c"], ["1", "", "x"], ["22", "3", "y"]])
    assert bench_node.columns(tmp_path / "x.csv", ("a", "b"), {}) == [" a  b", " 1  -", "22  3"]
    assert bench_node.columns(tmp_path / "x.csv", ("a",), {"c": {"y"}}) == [" a", "22"]
    assert bench_node.columns(tmp_path / "none.csv", ("a",), {}) == []
