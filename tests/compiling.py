"""Compiling kernels in tests, which interpret them where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiling(*arguments: str) -> str:
    """What a Python that compiles kernels, where this one interprets them, prints."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
