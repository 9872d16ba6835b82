"""Packed weights in huge pages: reading them end to end then misses the processor's page tables less often."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_LARGE = 4 << 20  # bytes of a mapping that is worth it
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # madvise's numbers for them


def use_huge_pages() -> None:
    """Asks Linux to move this process's large anonymous memory into huge pages.  Nothing happens where the system gives
    them anyway or never, does not know the request (before 6.1), or is another one."""
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        with open("/proc/self/maps", encoding="utf-8") as file:
            mappings = [line.split() for line in file]
        for addresses, permissions, _, _, inode, *path in mappings:
            first, last = (int(address, 16) for address in addresses.split("-"))
            anonymous = inode == "0" and path in ([], ["[heap]"])
            if anonymous and permissions == "rw-p" and last - first >= _LARGE:
                for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                    madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
