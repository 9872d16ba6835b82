"""run.py, but rank 1 comes to harm at its third generation step:  die.py HOW <arguments of run.py>"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import run
from gpt.launch import read_launch
from gpt.runtime.torch_session import TorchSession

how = sys.argv.pop(1)
step = 0
generation = TorchSession.generation


def harmed(self: TorchSession, ids: torch.Tensor) -> torch.Tensor:
    global step
    step += 1
    if step == 3 and read_launch().rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hung":
            time.sleep(1000)
        raise RuntimeError("a cosmic ray")
    return generation(self, ids)


TorchSession.generation = harmed  # type: ignore[method-assign]
sys.exit(run.main())
