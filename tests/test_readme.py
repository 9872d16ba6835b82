"""The README's commands: the quickstart really runs, and every other one names scripts and flags that exist."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]{2,}\b")
ASSIGNMENT = re.compile(r"[A-Z]+=.*")


def sh_blocks(text: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language == "sh"]


def commands(block: str) -> list[list[str]]:
    """The words of each command; continued lines are one command, comments none."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def problem_of(words: list[str]) -> str | None:
    """What a reader who types this command would stumble over; None where nothing."""
    while ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if words[:4] == ["python", "-m", "pip", "install"]:
        missing = [word for word in words if word.endswith(".txt") and not (ROOT / word).is_file()]
        return f"no such file: {missing}" if missing else None
    if words[0] in ("mpirun", "srun"):
        starts = [place for place, word in enumerate(words) if word in ("python", "python3")]
        words = ["python", *words[starts[0] + 1 :]] if starts else words
    if words[0] == "sbatch":
        return None if any((ROOT / word).is_file() for word in words[1:]) else f"no such script: {words}"
    if words[0] not in ("python", "sh") or not (ROOT / words[1]).is_file():
        return f"unknown command: {words[:2]}"
    if words[0] == "sh" or "/" in words[1]:
        return None
    try:
        importlib.import_module(Path(words[1]).stem).build_parser().parse_args(words[2:])
    except SystemExit as ended:
        return None if ended.code == 0 else f"not accepted by {words[1]}: {shlex.join(words[2:])}"
    return None


def test_the_first_two_blocks_are_all_a_newcomer_types() -> None:
    assert [block.strip() for block in sh_blocks(README)[:2]] == ["sh quickstart.sh", "sh test.sh"]


def test_continuous_integration_runs_the_test_command() -> None:
    runner = ROOT / ".ci" / "run"
    assert os.access(runner, os.X_OK)
    assert ["sh", "test.sh"] in commands(runner.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_exists(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = sh_blocks(path.read_text(encoding="utf-8"))
    problems = [problem for block in blocks for words in commands(block) if (problem := problem_of(words))]
    assert problems == []
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["python build.py --no_such_flag", "python no_such_script.py", "make all", "python build.py --dtype int7"],
)
def test_a_wrong_command_is_seen(command: str) -> None:
    assert problem_of(shlex.split(command)) is not None


def test_every_placeholder_is_explained() -> None:
    words = [word for block in sh_blocks(README) for command in commands(block) for word in command]
    used = {name for word in words if " " not in word for name in PLACEHOLDER.findall(word)}
    assert "MODEL" in used
    prose = FENCE.sub("", README)
    assert {name for name in used if f"`{name}`" not in prose} == set()


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    names = re.findall(r"`((?:gpt|tests|docs|benchmarks|assets)/[\w./-]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []


@dataclass(frozen=True)
class Quickstart:
    folder: Path
    output: str


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """`sh quickstart.sh` with this interpreter: in a copy, below a folder with a space, called from another folder."""
    folder = tmp_path_factory.mktemp("quick") / "a project"
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.sh")):
        shutil.copy(path, folder)
    for name in ("gpt", "assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        ["sh", str(folder / "quickstart.sh"), "--no-install"],
        cwd=folder.parent,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return Quickstart(folder / "quickstart", result.stdout)


def shown_commands(output: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("$ ")]


def test_the_quickstart_shows_what_it_runs(quickstart: Quickstart) -> None:
    shown = shown_commands(quickstart.output)
    assert [words[1] for words in shown] == ["hf_gpt_convert.py", "build.py", "run.py", "summarize.py"]
    assert [problem_of(["python", *words[1:]]) for words in shown] == [None] * 4


def test_the_readme_shows_the_commands_of_the_quickstart(quickstart: Quickstart) -> None:
    documented = [words for block in sh_blocks(README) for words in commands(block)]
    for words in shown_commands(quickstart.output):
        assert ["python", *words[1:]] in documented


def test_the_quickstart_converts_and_builds(quickstart: Quickstart) -> None:
    checkpoint = quickstart.folder / "c-model" / "1-gpu"
    assert {"config.ini", "manifest.json", "model.wte.bin", "tokenizer.json"} <= {p.name for p in checkpoint.iterdir()}
    engine = quickstart.folder / "engine"
    assert (engine / "config.json").is_file()
    assert (engine / "gpt_float32_tp1_rank0.engine").is_file()


def test_the_quickstart_writes_a_synopsis(quickstart: Quickstart) -> None:
    texts = re.findall(r'^Output: "(.*)"$', quickstart.output, re.MULTILINE)
    assert texts == [" Python 3 bindings for the Babeltrace2 library"]


def test_the_quickstart_scores_both_sides_alike(quickstart: Quickstart) -> None:
    """In float32 both sides choose the same tokens, so that every score is the same."""
    for key in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        ours, theirs = (float(value) for value in re.findall(rf"^  {key} : (\S+)$", quickstart.output, re.MULTILINE))
        assert ours == theirs
        assert ours > {"rouge2": 5.0}.get(key, 20.0)


def test_the_quickstart_reports_every_article_in_one_file(quickstart: Quickstart) -> None:
    report = (quickstart.folder / "report.html").read_text(encoding="utf-8")
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert re.findall(r"""(?:src|href)=["'](?!data:|#).*""", report) == []
    text = html.unescape(report)
    for line in (ROOT / "assets" / "articles.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["highlights"] in text
