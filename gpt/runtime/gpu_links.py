"""What connects the GPUs of one machine: PyTorch says whether they reach each other's memory, nvidia-smi over what."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt.runtime.rank_check import RankFacts

# The legend of `nvidia-smi topo -m`.
_NAMES = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "PCIe and the processor",
    "NODE": "PCIe and the processor's internal links",
    "SYS": "PCIe and the link between processors",
}


def own_links(own: RankFacts, here: Sequence[RankFacts], uuids: Sequence[str]) -> list[str]:
    """One line for each rank of this machine behind `own`.  uuids: by rank, of their GPUs."""
    import torch

    matrix = read_matrix(_nvidia_smi("topo", "-m"))
    rows = [line.split(", ") for line in _nvidia_smi("--query-gpu=index,uuid", "--format=csv,noheader").splitlines()]
    index_of = {row[1].removeprefix("GPU-"): f"GPU{row[0]}" for row in rows if len(row) == 2}
    lines = []
    for other in here:
        if other.rank <= own.rank:
            continue
        ours, theirs = (index_of.get(uuids[rank].removeprefix("GPU-"), "") for rank in (own.rank, other.rank))
        link = describe(matrix.get((ours, theirs), ""))
        # A process that sees its own GPU alone numbers it 0, as the others do.
        if own.device == other.device:
            access = "memory access not known to a process that sees one GPU"
        else:
            reachable = torch.cuda.can_device_access_peer(torch.device(own.device), torch.device(other.device))
            access = "peer memory access" if reachable else "no peer memory access"
        lines.append(f"rank {own.rank} and {other.rank}: {link}, {access}")
    return lines


def describe(code: str) -> str:
    """NV18 -> 18 NVLinks."""
    if code.startswith("NV") and code[2:].isdecimal():
        return f"{code[2:]} NVLink{'s' * (code != 'NV1')}"
    return _NAMES.get(code, "unknown link")


def read_matrix(text: str) -> dict[tuple[str, str], str]:
    """(GPU0, GPU1) -> NV18 from the table that `nvidia-smi topo -m` prints."""
    rows = [line.replace("\x1b[4m", "").replace("\x1b[0m", "").split() for line in text.splitlines()]
    rows = [row for row in rows if row and row[0].startswith("GPU")]
    if not rows:
        return {}
    columns = [name for name in rows[0] if name.startswith("GPU") and name[3:].isdecimal()]
    return {(row[0], name): code for row in rows[1:] for name, code in zip(columns, row[1:], strict=False)}


def _nvidia_smi(*arguments: str) -> str:
    """What it prints, "" where there is none or it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
