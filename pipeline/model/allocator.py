"""Keeping freed memory of the CPU, so that the next step finds its pages ready."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
GROW = 2**26  # bytes that the heap grows by, at least
LARGEST = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the kernel when they are freed.

    By default it maps every block above 32 MiB anew and the kernel fills it with zeros, page by page:
    for the logits and a gathered head, in every step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TOP_PAD, GROW)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
