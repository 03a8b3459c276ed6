"""Kept memory, by the pages that the kernel has to make ready (minor faults) in a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

BYTES, TIMES = 1 << 26, 8  # above the 32 MiB from which glibc always maps a block anew
WORK = f"""
import ctypes, resource, sys
from pipeline.model.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    block = libc.malloc({BYTES})
    ctypes.memset(block, 1, {BYTES})
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")


def faults(how: str, **environment: str) -> int:
    """Page faults while ``TIMES`` blocks are filled and freed, one after another."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", WORK, how]
    done = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@needs_glibc
def test_a_block_of_the_next_step_finds_its_pages_ready() -> None:
    default = faults("default")
    if default < TIMES * BYTES / os.sysconf("SC_PAGE_SIZE") / 2:
        pytest.skip("huge pages: the kernel makes many ready at once")
    assert faults("keep") < 0.3 * default


@needs_glibc
def test_the_environment_has_the_say() -> None:
    told = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    assert faults("keep", **told) > 0.7 * faults("default", **told)
