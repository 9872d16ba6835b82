"""Imports go one way, and nothing heavy is loaded before the command line has been read."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = "base"
# Left may not import right: a module imports its own level or what stands to the left of it.
LEVELS = (BASE, "kernels", "checkpoint", "network", "engine", "runtime", "text", "scripts")
SLOW = ("torch", "transformers", "datasets", "matplotlib", "triton")
OPTIONAL = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "mpi4py", "triton", "matplotlib", "sentencepiece")


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_load: bool  # executed when the module is loaded: not in a function, not for type checkers only


def modules() -> dict[str, Path]:
    """Dotted name -> file, for the package and the scripts beside it."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for path in (ROOT / "gpt").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports_of(source: str) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(source), at_load=True))


def _walk(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_load)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        # `from gpt.text import tokenizer` names a module too; where it names a function, nothing of that name exists.
        for alias in node.names:
            yield Import(f"{node.module}.{alias.name}", node.lineno, at_load)
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for statement in node.body:
            yield from _walk(statement, at_load=False)
        for statement in node.orelse:
            yield from _walk(statement, at_load=at_load)
    else:
        inside = at_load and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, at_load=inside)


def level(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "gpt":
        return "scripts"
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else BASE


def own_module(name: str, known: dict[str, Path]) -> str | None:
    """The module of this project that `name` lies in, or None for other packages."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def wrong_imports(sources: dict[str, str]) -> list[str]:
    known = {name: Path() for name in sources}
    wrong = []
    for module, source in sources.items():
        for found in imports_of(source):
            target = own_module(found.module, known)
            if target is None or target == module:
                continue
            if level(target) == "scripts":
                wrong.append(f"{module}:{found.line} imports the script {target}")
            elif LEVELS.index(level(target)) > LEVELS.index(level(module)):
                wrong.append(f"{module}:{found.line} ({level(module)}) imports {target} ({level(target)})")
    return wrong


def read_sources() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules().items()}


def test_every_folder_of_the_package_has_a_level() -> None:
    folders = {path.name for path in (ROOT / "gpt").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(LEVELS)


def test_imports_go_one_way() -> None:
    assert wrong_imports(read_sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("gpt.errors", "from gpt.checkpoint import layout"),
        ("gpt.engine.folder", "import gpt.runtime.session"),
        ("gpt.network.gpt", "def f():\n    from gpt.engine.step import Step"),
        ("gpt.text.rouge", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import run"),
        ("summarize", "from run import main"),
    ],
)
def test_a_wrong_import_is_seen(module: str, line: str) -> None:
    sources = {**read_sources(), module: line}
    assert [entry for entry in wrong_imports(sources) if entry.startswith(f"{module}:")]


def loaded_with(module: str, sources: dict[str, str]) -> dict[str, str]:
    """Every package of others that loading `module` loads, with the module of ours that does it."""
    known = {name: Path() for name in sources}
    seen: set[str] = set()
    outside: dict[str, str] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        waiting += [current.rpartition(".")[0]] if "." in current else []
        for found in imports_of(sources[current]):
            if not found.at_load:
                continue
            target = own_module(found.module, known)
            if target is None:
                outside.setdefault(found.module.split(".")[0], current)
            else:
                waiting.append(target)
    return outside


def test_scripts_and_base_load_nothing_heavy() -> None:
    sources = read_sources()
    light = [name for name in sources if level(name) in (BASE, "scripts")]
    assert "gpt.cli" in light
    assert "build" in light
    loaded = {name: loaded_with(name, sources) for name in light}
    heavy = (*SLOW, *OPTIONAL)
    assert [
        f"{name}: {package} by {outside[package]}"
        for name, outside in loaded.items()
        for package in heavy
        if package in outside
    ] == []


def test_optional_packages_are_loaded_only_where_they_are_used() -> None:
    at_load = [
        f"{name}:{found.line} {found.module}"
        for name, source in read_sources().items()
        for found in imports_of(source)
        if found.at_load
        and found.module.split(".")[0] in OPTIONAL
        # A kernel is Triton at load; who uses one loads its file where it is used.
        and (level(name), found.module.split(".")[0]) != ("kernels", "triton")
    ]
    assert at_load == []


def test_what_loading_loads_is_followed_through_our_own_modules() -> None:
    sources = {
        "gpt": "",
        "gpt.text": "",
        "gpt.text.a": "def f():\n    import matplotlib\nimport torch.nn",
        "run": "from gpt.text.a import f",
    }
    assert loaded_with("run", sources) == {"torch": "gpt.text.a"}
