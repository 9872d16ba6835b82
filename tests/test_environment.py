"""What quickstart.sh and test.sh do before the first command: find a Python, make an environment, install once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = "-m pip install --disable-pip-version-check -r"


def make_interpreter(path: Path, body: str) -> Path:
    """An executable sh script; "$@" are the interpreter's arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts and requirements alone, in a folder with a space; nothing can be converted here."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("environment.sh", "quickstart.sh", "test.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def start(script: Path, *args: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(
        ["sh", str(script), *args], cwd=script.parents[1], env=environment, capture_output=True, text=True, check=False
    )


def test_an_interpreter_that_is_too_old_is_told(project: Path) -> None:
    old = make_interpreter(project / "old", 'case "$2" in *exit*) exit 1 ;; *) echo 3.8.10 ;; esac')
    result = start(project / "quickstart.sh", PYTHON=old)
    assert result.returncode == 2
    assert "error: Python 3.10 or newer is needed" in result.stderr
    assert f"found:   {old}, which is Python 3.8.10" in result.stderr
    assert not (project / ".venv").exists()


def test_no_interpreter_is_told(project: Path) -> None:
    result = start(project / "test.sh", PYTHON=project / "nothing")
    assert result.returncode == 2
    assert f"found:   none of: {project / 'nothing'}" in result.stderr


def test_a_python_without_venv_is_told(project: Path) -> None:
    python = make_interpreter(
        project / "python", f'case "$2" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
    )
    result = start(project / "quickstart.sh", PYTHON=python)
    assert result.returncode == 2
    assert "apt install python3-venv" in result.stderr
    assert not (project / ".venv").exists()


def test_a_folder_of_another_kind_is_left_alone(project: Path) -> None:
    taken = project.parent / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("dear reader", encoding="utf-8")
    result = start(project / "quickstart.sh", VENV="taken")  # relative to where the user stands
    assert result.returncode == 2
    assert f"error: {taken} is no virtual environment" in result.stderr
    assert [path.name for path in taken.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_packages_are_installed_once_until_the_requirements_change(project: Path, script: str) -> None:
    log = project / "log"
    python = f'echo "$*" >>"{log}"\ncase "$2" in *sys.version*) echo 3.12.1 ;; esac'
    make_interpreter(project / ".venv" / "bin" / "python", python)
    installs = []
    for change in ("", "", "six==1.17.0\n", ""):
        with open(project / "requirements.txt", "a", encoding="utf-8") as requirements:
            requirements.write(change)
        assert start(project / script).returncode == 0
        installs.append(log.read_text(encoding="utf-8").count(INSTALLED))
    assert installs == [1, 1, 2, 2]


def test_a_failed_installation_is_tried_again(project: Path) -> None:
    fails = 'case "$*" in *"pip install"*) exit 1 ;; esac'
    make_interpreter(project / ".venv" / "bin" / "python", fails)
    for _ in range(2):
        result = start(project / "quickstart.sh")
        assert result.returncode == 2
        assert "error: the packages could not be installed" in result.stderr


def test_arguments_of_the_test_command_go_to_pytest(project: Path) -> None:
    python = make_interpreter(project / "python", 'echo "$*"')
    result = start(project / "test.sh", "--no-install", "-k", "two words", PYTHON=python)
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("-m pytest -n 2 --dist loadfile -k two words")
    assert "pip install" not in result.stdout


def test_an_unknown_argument_of_the_quickstart_is_refused(project: Path) -> None:
    result = start(project / "quickstart.sh", "--fast")
    assert result.returncode == 2
    assert "--fast" in result.stderr
