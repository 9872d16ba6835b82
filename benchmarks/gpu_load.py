"""From the start of a process to the first token: run.py on an engine with stored weights, as a user starts it."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_cases import Shape, limits
from gpu_peers import save_hf
from gpu_systems import Setup

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadTiming:
    """Wall seconds of each run.py process, imports and exit included; files are in the page cache."""

    seconds: list[float]
    num_bytes: int


def measure_load(setup: Setup, shape: Shape, prompts: list[list[int]], *, repeat: int, timeout_s: float) -> LoadTiming:
    """Converts and builds the model with the scripts, runs run.py for one token once uncounted, then `repeat` times.

    Raises subprocess.TimeoutExpired where a process would outlast `timeout_s` seconds from now.
    """
    end = time.perf_counter() + timeout_s
    engine = build_stored(setup, shape, end)
    ids = setup.scratch / "prompts.csv"
    ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts), encoding="utf-8")
    files = ["--engine_dir", engine, "--input_tokens", ids, "--output_npy", setup.scratch / "out.npy"]
    command = ["run.py", "--max_output_len", "1", *files, "--device", setup.device]
    seconds = [run_script(command, end) for _ in range(1 + repeat)][1:]
    return LoadTiming(seconds, sum(path.stat().st_size for path in engine.glob("*.engine")))


def build_stored(setup: Setup, shape: Shape, end: float) -> Path:
    """An engine folder with the weights in its file, through a Hugging Face folder, hf_gpt_convert.py and build.py."""
    build = setup.info.build
    source, converted, engine = save_hf(setup), setup.scratch / "ft", setup.scratch / "stored"
    run_script(["hf_gpt_convert.py", "-i", source, "-o", converted, "-t", build.dtype, "-p", "8"], end)
    sizes = [part for name, value in limits([shape]).items() for part in (f"--{name}", value)]
    flags = ["--model_dir", converted / "1-gpu", "--output_dir", engine, "--use_gpt_attention_plugin", *sizes]
    run_script(["build.py", *flags], end)
    return engine


def run_script(command: list[object], end: float) -> float:
    """Seconds of a script of this project in a process of its own; raises CalledProcessError where it fails."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=max(1.0, end - begin),
    )
    return time.perf_counter() - begin
