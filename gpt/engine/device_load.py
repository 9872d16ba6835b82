"""A file's bytes on a GPU, several pieces at a time through page-locked memory.

Copies from a memory map fault in every page and wait for each piece in turn: a few GB/s.  Reading with several threads
into page-locked buffers, from which the device fetches while the next pieces are read, keeps the bus busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from gpt.errors import EngineError

_PIECE_BYTES = 8 << 20
_MAX_THREADS = 8


def read_into_device(path: Path, device: torch.device, piece_bytes: int = _PIECE_BYTES) -> torch.Tensor:
    """The whole file as uint8 [size] on `device`.  Raises EngineError where it is cut short meanwhile."""
    size = path.stat().st_size
    data = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the memory may have been another stream's
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pieces = iter(range(0, size, piece_bytes))  # shared: each thread takes the next one
    with ThreadPoolExecutor(num_threads) as pool:
        for work in [pool.submit(_read_pieces, path, pieces, data, piece_bytes) for _ in range(num_threads)]:
            work.result()
    return data


def _read_pieces(path: Path, pieces: Iterator[int], data: torch.Tensor, piece_bytes: int) -> None:
    """Two buffers in turn: one is read into while the device fetches the other."""
    on_gpu = data.device.type == "cuda"
    buffers = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    stream = torch.cuda.Stream(data.device) if on_gpu else None
    fetched = [torch.cuda.Event() if on_gpu else None for _ in buffers]
    turn = 0
    with open(path, "rb", buffering=0) as file, torch.cuda.stream(stream) if stream is not None else nullcontext():
        for start in pieces:
            buffer, event = buffers[turn], fetched[turn]
            if event is not None:
                event.synchronize()
            target = data[start : start + piece_bytes]
            file.seek(start)
            filled = 0
            while filled < len(target):
                count = file.readinto(buffer.numpy().data[filled : len(target)]) or 0
                if count == 0:
                    raise EngineError(f"{path} ends early", found=f"{start + filled} bytes of {len(data)}")
                filled += count
            target.copy_(buffer[: len(target)], non_blocking=True)
            if event is not None:
                event.record()
            turn = 1 - turn
        if stream is not None:
            stream.synchronize()
