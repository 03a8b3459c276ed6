"""Keeping freed memory of the CPU, so that the next step finds its pages ready."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
LARGEST = 2**31 - 1  # bytes; mallopt takes an int
GROW = 2**26  # bytes that the heap grows by, at least


def keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the kernel when they are freed.

    By default it maps every block above 32 MiB anew and the kernel fills it with zeros, page by page:
    for the logits and a gathered head, in every step. Other C libraries are left as they are, and so
    is glibc where the environment tells it what to do (``MALLOC_MMAP_THRESHOLD_``).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_TOP_PAD, GROW)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
