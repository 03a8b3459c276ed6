"""Hidden states below the first adapted layer, by document, in one memory-mapped file.

The folder's name is a hash of all that decides a bit of them: base, cut, precision, tokens, kernel,
libraries, threads, processor; and of how many documents fit. So jobs that agree share the file, and
a lost one is made again with the same bits. A document counts as stored once its checksum is
written after its states.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UntaxedError
from pipeline.train.cache_place import IDENTITY, alone, key_of, make_room

STATES, CHECKSUMS = "hidden.bin", "checksums.bin"
WRITTEN = 1 << 32  # added to a CRC-32, so that zero says "not stored"


class PrefixCache:
    """States [T, width] of each document that fits into ``budget_bytes``, in document order."""

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        budget_bytes: int,
    ) -> None:
        starts = np.cumsum([0, *lengths], dtype=np.int64)
        row_bytes = width * dtype.itemsize
        self.kept = int(np.searchsorted(starts, budget_bytes // row_bytes, side="right")) - 1
        self.starts, self.width, self.dtype = starts[: self.kept + 1], width, dtype
        shape = {"kept": self.kept, "tokens": int(self.starts[-1]), "width": width}
        everything = {**identity, **shape, "dtype": str(dtype)}
        self.folder = root / f"prefix-{key_of(everything)}"
        self.bytes = int(self.starts[-1]) * row_bytes
        root.mkdir(parents=True, exist_ok=True)
        with alone(root):
            if self.kept:
                make_room(root, self.folder, self.bytes, budget_bytes)
            self.folder.mkdir(exist_ok=True)
            self.mapped = _map(self.folder / STATES, self.bytes)
            checksums = _map(self.folder / CHECKSUMS, self.kept * 8)
            (self.folder / IDENTITY).write_text(json.dumps(everything, indent=1) + "\n")
            os.utime(self.folder)
        self.states = torch.frombuffer(self.mapped, dtype=torch.uint8)
        self.checksums = np.frombuffer(checksums, np.uint64)
        self.known: set[int] = set()

    def missing(self) -> list[int]:
        """Documents that have a place but no valid states; a valid one is looked at once."""
        unknown = [d for d in range(self.kept) if d not in self.known]
        written = [d for d in unknown if self.checksums[d]]
        self.known |= {d for d in written if self.checksums[d] == self._checksum(d)}
        return [d for d in unknown if d not in self.known]

    def write(self, document: int, states: Tensor) -> None:
        """Store ``states`` [T, width] on the CPU, then their checksum."""
        self._rows(document).copy_(states)
        self.checksums[document] = self._checksum(document)
        self.known.add(document)

    def read(self, document: int) -> Tensor | None:
        """The states [T, width] of a stored document, as a view of the file; else None."""
        return self._rows(document) if document in self.known else None

    def will_need(self, document: int) -> None:
        """Have the system read a stored document from disk while something else is computed."""
        if document in self.known:
            first, stop = self._place(document)
            first -= first % mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def _rows(self, document: int) -> Tensor:
        first, stop = self._place(document)
        return self.states[first:stop].view(self.dtype).view(-1, self.width)

    def _place(self, document: int) -> tuple[int, int]:
        """Its first byte in the file, and the one after its last."""
        size = self.width * self.dtype.itemsize
        return int(self.starts[document]) * size, int(self.starts[document + 1]) * size

    def _checksum(self, document: int) -> int:
        return WRITTEN + zlib.crc32(self._rows(document).view(torch.uint8).numpy().data)


def _map(path: Path, size: int) -> mmap.mmap:
    """``size`` bytes of ``path`` in memory, shared with other processes; zeros where it is new.

    The blocks are reserved first: a write into a mapped file on a full disk kills the process.
    """
    size = max(size, 8)  # an empty map is not possible
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(opened).st_size < size:
            _reserve(opened, path, size)
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


def _reserve(opened: int, path: Path, size: int) -> None:
    try:
        os.posix_fallocate(opened, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # not known to this file system
            os.ftruncate(opened, size)
            return
        os.ftruncate(opened, 0)
        raise UntaxedError(
            f"{path}: {error.strerror} ({size / 1e9:.2f} GB wanted); set UNTAXED_CACHE to a larger"
            " disk, or lower execution.prefix_cache_gb"
        ) from error
