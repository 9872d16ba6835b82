"""From the start of a process to the first token: run.py on an engine with stored weights, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from gpu_systems import Setup

from gpt.engine.builder import build_engine

ROOT = Path(__file__).resolve().parent.parent
# run.py with the time told whenever a stage ends, the first stage having begun with the process.
STAGES_SCRIPT = """
import json, sys, time
marks = [float(sys.argv[1]), time.time()]
import torch
marks.append(time.time())
sys.path.insert(0, ".")
import run
from gpt.runtime import load
load_session = load.load_session
def told(*args):
    marks.append(time.time())
    session = load_session(*args)
    marks.append(time.time())
    return session
load.load_session = told
code = run.main(sys.argv[2:])
print(json.dumps([*marks, time.time()]))
sys.exit(code)
"""
STAGES = ("python", "torch", "imports", "weights", "tokens")


@dataclass(frozen=True)
class LoadTiming:
    """seconds: wall time of each run.py process for one token, imports and exit included; files are in the page cache.
    cold_s: of the first one, whose kernels had to be compiled.  stages_s: of one more, how long starting Python,
    importing PyTorch, importing the rest and reading the command line, loading the weights, and making the tokens took;
    two_tokens_s: the last of these stages with a generation step in it, which is recorded first."""

    seconds: list[float]
    cold_s: float
    stages_s: dict[str, float]
    two_tokens_s: float
    num_bytes: int


def measure_load(setup: Setup, prompts: list[list[int]], *, repeat: int, timeout_s: float) -> LoadTiming:
    """Builds the setup's engine, which has room for two new tokens, with its weights stored; runs run.py `repeat` times
    and four times more.

    Raises subprocess.TimeoutExpired where a process would outlast `timeout_s` seconds from now.
    """
    end = time.perf_counter() + timeout_s
    engine = build_stored(setup)
    ids = setup.scratch / "prompts.csv"
    ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts), encoding="utf-8")
    files = ["--engine_dir", engine, "--input_tokens", ids, "--output_npy", setup.scratch / "out.npy"]
    flags = [str(flag) for flag in (*files, "--device", setup.device)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(setup.scratch / "kernels")}

    def run(*command: str) -> tuple[float, str]:
        begin = time.perf_counter()
        left = max(1.0, end - begin)
        words = [sys.executable, *command, *flags]
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=left, env=environment)
        return time.perf_counter() - begin, done.stdout.decode()

    def stages(num_tokens: int) -> dict[str, float]:
        marks = json.loads(run("-c", STAGES_SCRIPT, str(time.time()), "--max_output_len", str(num_tokens))[1])
        return {name: after - before for name, (before, after) in zip(STAGES, pairwise(marks), strict=True)}

    seconds = [run("run.py", "--max_output_len", "1")[0] for _ in range(1 + repeat)]
    stages(2)  # compiles what a generation step needs
    size = sum(path.stat().st_size for path in engine.glob("*.engine"))
    return LoadTiming(seconds[1:], seconds[0], stages(1), stages(2)["tokens"], size)


def build_stored(setup: Setup) -> Path:
    """An engine folder with the weights in its file."""
    folder = setup.scratch / "stored"
    build_engine(setup.info.model, replace(setup.info.build, seed=None), None, folder)
    return folder
