"""Weights on their way into a plan, without a copy of their own in memory.

The library copies every constant while it builds; a second copy of a large model is what a machine may not have.  So
the weights are written to a file beside the plan, one at a time, and mapped: their pages come from the file when the
library reads them and can go again at once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_ALIGNMENT = 64  # the bytes of a vector load
_RELEASE_INTERVAL_S = 0.02


class MappedWeights:
    """tensors: by name, on the pages of a file."""

    def __init__(self, tensors: dict[str, torch.Tensor], pages: mmap.mmap | None):
        self.tensors = tensors
        self._pages = pages

    @contextmanager
    def releasing_memory(self) -> Iterator[None]:
        """Inside, pages that were read go back to the system after a moment; whoever reads them again finds them in the
        file, as a rule still in the system's cache of it."""
        done = threading.Event()
        thread = threading.Thread(target=self._release, args=(done,), daemon=True, name="release weights")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _release(self, done: threading.Event) -> None:
        if self._pages is None or not hasattr(self._pages, "madvise"):  # Windows has its own way with mapped pages
            return
        while not done.wait(_RELEASE_INTERVAL_S):
            self._pages.madvise(mmap.MADV_DONTNEED)


@contextmanager
def weights_in_file(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[MappedWeights]:
    """Writes the tensors, CPU and contiguous, to `path` one by one and maps it; the file is gone afterwards.

    Raises OSError where the disk is full.
    """
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
    try:
        with open(path, "wb") as file:
            for name, tensor in tensors:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                places[name] = file.tell(), tensor.dtype, tuple(tensor.shape)
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield _map(path, places)
    finally:
        path.unlink(missing_ok=True)


def _map(path: Path, places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]) -> MappedWeights:
    if path.stat().st_size == 0:
        return MappedWeights({}, None)
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, since torch asks for that
    tensors = {
        name: torch.frombuffer(pages, dtype=dtype, count=torch.Size(shape).numel(), offset=offset).view(shape)
        for name, (offset, dtype, shape) in places.items()
    }
    return MappedWeights(tensors, pages)
