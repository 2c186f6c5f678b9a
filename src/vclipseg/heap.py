"""Memory that tensors free is kept for the tensors that come next."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # of glibc's mallopt(3)
FOR_GOOD = -1


@functools.cache
def keep_freed_memory(size: int | None = None) -> None:
    """Let this process keep what it frees, up to `size` bytes, and hold it in large pages.

    Left alone, the C library gives the memory of a large tensor back when that is freed, and the system
    clears the next one's page by page, in every step again. Afterwards there is a heap of `size` bytes that
    is never given back; what exceeds it is, as before. It takes no memory that was not used yet.

    It is for the whole process and cannot be undone. Without glibc it does nothing.

    Args:
        size: half of the machine's memory when left out.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(TRIM_THRESHOLD, FOR_GOOD)
    libc.mallopt(ARENA_MAX, 1)  # threads that are started from now on have it too
    libc.mallopt(MMAP_MAX, 0)
    lengthen(libc, size or os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)
    libc.mallopt(MMAP_MAX, 2**16)
    libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most it takes; counts where the heap is full


def lengthen(libc: ctypes.CDLL, size: int) -> None:
    """Make the heap `size` bytes longer, in large pages, if so many addresses are to be had."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(size)
    if start is None:
        return
    first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(first_page, start + size - first_page, mmap.MADV_HUGEPAGE)
    libc.free(start)
