"""Huge pages: the right memory is named, and it keeps what is in it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from gpt.engine.huge_pages import use_huge_pages

WEIGHT = torch.arange(1 << 20, dtype=torch.int64)  # 8 MiB


def test_large_memory_is_named_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice 14 is MADV_HUGEPAGE, 25 MADV_COLLAPSE; mapped files are left alone."""
    named: list[tuple[int, int, int]] = []

    class Library:
        def madvise(self, first: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            named.append((first.value or 0, size.value, advice))
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    use_huge_pages()
    inside = [
        advice
        for first, size, advice in named
        if first <= WEIGHT.data_ptr() and WEIGHT.data_ptr() + WEIGHT.nbytes <= first + size
    ]
    assert inside == [14, 25]
    assert min(size for _, size, _ in named) >= 4 << 20


def test_contents_stay() -> None:
    use_huge_pages()
    assert torch.equal(WEIGHT, torch.arange(1 << 20))


def test_other_systems_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    use_huge_pages()
