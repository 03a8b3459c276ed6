"""One file of a merged model in one pass: summed, written, read back, held to the base and hashed.

Block by block, a few megabytes in memory. What is hashed is what the file gives back, so nothing has
to be read a second time to be sealed. Hashing runs beside the rest, in a thread of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import DataError
from pipeline.model import shards
from pipeline.model.merging import Plan
from pipeline.model.shards import FLOATS, NARROW, Shard, as_bytes, as_tensor, read_shard, widened
from pipeline.model.survival import Survival

WAITING = 1  # blocks between the writer and the hashing thread
SEND_BYTES = 1 << 25  # to disk at a time, while the rest is still being written


@dataclass
class Rewritten:
    """What one pass has shown: digest and size in bytes of the file, how much of each update is in
    it, and how many tensors (and bytes) are those of the base."""

    size: int
    sha256: str = ""
    tensors: dict[str, Survival] = field(default_factory=dict)
    unchanged: int = 0
    unchanged_bytes: int = 0


class Hasher:
    """SHA-256 in a thread of its own, over blocks that wait in a queue of ``WAITING``.

    ``buffer`` lends memory for a block and gets it back when the block is hashed: memory that is
    new for every block costs more than reading the block does.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.queue: queue.Queue[Any] = queue.Queue(WAITING)
        self.free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(WAITING + 2):
            self.free.put(bytearray(shards.BLOCK_BYTES))
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (given := self.queue.get()) is not None:
            block, lent = given
            self.digest.update(block)
            if lent is not None:
                self.free.put(lent)

    def buffer(self) -> bytearray:
        """``BLOCK_BYTES`` to fill and give to ``update``."""
        return self.free.get()

    def update(self, block: Any, lent: bytearray | None = None) -> None:
        """Take bytes that nobody changes until they are hashed; ``lent``: the buffer they are in."""
        self.queue.put((block, lent))

    def close(self) -> str:
        """The digest of everything that was given."""
        self.queue.put(None)
        self.thread.join()
        return self.digest.hexdigest()


@contextmanager
def _hashers(count: int) -> Iterator[list[Hasher]]:
    """Hashers whose threads end with the block, whatever happens."""
    made = [Hasher() for _ in range(count)]
    try:
        yield made
    finally:
        for hasher in made:
            hasher.close()


def rewrite(
    source: Shard,
    plan: Plan,
    target: Path,
    *,
    widen: bool = False,
    load_dtype: torch.dtype | None = None,
    sha256: str | None = None,
) -> Rewritten:
    """Write ``source`` with the plan's updates to ``target``; sealing forces it to disk.

    ``target`` must not exist: an existing file may be a hard link to a sealed one. ``widen`` makes
    16-bit floats F32. ``load_dtype``: what loading casts to (None: nothing). ``sha256``: what the
    bytes of ``source`` must hash to (None: that is known already).

    Updated tensors must read back as the fp32 sum rounded once, through the reader that loading
    uses; all others must have the base's bytes (its values, where they are widened). DataError
    where they do not.
    """
    raw = widened(source) if widen else source.raw
    size = len(raw) + sum(
        e.size_bytes * (2 if widen and e.dtype in NARROW else 1) for e in source.entries.values()
    )
    found = Rewritten(size)
    with (
        source.path.open("rb", buffering=0) as base,
        target.open("xb+", buffering=0) as file,
        _hashers(1 if sha256 is None else 2) as hashers,
    ):
        file.truncate(size)  # whole from the start, so that readers open it
        one = _Pass(source, plan, target, base.fileno(), file.fileno(), hashers)
        one.header(raw)
        for name in source.in_file_order():
            if name in plan.updates:
                found.tensors[name] = one.update(name, load_dtype)
                continue
            back = one.written.entries[name]
            (one.copy if back.dtype == source.entries[name].dtype else one.widen)(name)
            found.unchanged += 1
            found.unchanged_bytes += back.size_bytes
        found.sha256, *of_source = [hasher.close() for hasher in hashers]
    if of_source and of_source != [sha256]:
        raise DataError(
            f"{source.path}: content changed since it was sealed (sha256 {of_source[0][:12]}, sealed"
            f" {str(sha256)[:12]}); adopt the base again"
        )
    return found


class _Pass:
    """The steps of ``rewrite``; ``hashers`` are those of the target and, where wanted, the source."""

    def __init__(
        self, source: Shard, plan: Plan, target: Path, base: int, file: int, hashers: list[Hasher]
    ) -> None:
        self.source, self.plan, self.target = source, plan, target
        self.base, self.file = base, file
        self.hashers = hashers
        self.spare = bytearray(shards.BLOCK_BYTES)
        self.sent = 0

    def _write(self, content: Any, at: int) -> None:
        """Write, and have the system begin with what lies before: less is left to wait for."""
        _write(self.file, content, at)
        if at - self.sent >= SEND_BYTES:
            os.posix_fadvise(self.file, self.sent, at - self.sent, os.POSIX_FADV_DONTNEED)
            self.sent = at

    def _hash(self, written: Any, read: Any) -> None:
        for hasher, block in zip(self.hashers, (written, read), strict=False):
            hasher.update(block)

    def header(self, raw: bytes) -> None:
        _write(self.file, raw, 0)
        self.written = read_shard(self.target)
        if list(self.written.entries) != list(self.source.entries):
            raise DataError(
                f"{self.target}: reads back with other tensors than were written; run again"
            )
        self._hash(self.written.raw, self.source.raw)

    def copy(self, name: str) -> None:
        """The base's bytes, compared with what the file gives back."""
        entry, at = self.source.entries[name], self.written.entries[name].start
        for start in range(entry.start, entry.stop, shards.BLOCK_BYTES):
            size = min(shards.BLOCK_BYTES, entry.stop - start)
            lent = [hasher.buffer() for hasher in self.hashers]
            got, wanted = (memoryview(b)[:size] for b in (lent[0], [*lent, self.spare][1]))
            if os.preadv(self.base, [wanted], start) != size:
                raise DataError(f"{self.source.path}: {name} ends early; fetch it again")
            self._write(wanted, at)
            if os.preadv(self.file, [got], at) != size or not _same(got, wanted):
                raise self._differs(name)
            for hasher, block, buffer in zip(self.hashers, (got, wanted), lent, strict=False):
                hasher.update(block, buffer)
            at += size

    def widen(self, name: str) -> None:
        """The base's values as F32, compared with what the file gives back."""
        entry, at = self.source.entries[name], self.written.entries[name].start
        for _, _, wanted in self.source.blocks(name):
            self._write(as_bytes(as_tensor(wanted, entry).float()), at)
            got = bytearray(os.pread(self.file, 2 * len(wanted), at))
            narrow = as_tensor(got, self.written.entries[name]).to(FLOATS[entry.dtype])
            if not _same(as_bytes(narrow), wanted):
                raise self._differs(name)
            self._hash(got, wanted)
            at += len(got)

    def _differs(self, name: str) -> DataError:
        return DataError(f"{self.target}: {name} differs from the base; nothing was sealed")

    def update(self, name: str, load_dtype: torch.dtype | None) -> Survival:
        """The sum in fp32, rounded once; what is read back is compared and weighed."""
        from safetensors import safe_open

        entry, back = self.source.entries[name], self.written.entries[name]
        rows, at = self.plan.updates[name].opened(), back.start
        survival = Survival()
        with safe_open(self.target, framework="pt") as reader:  # the reader that loading uses
            stored = reader.get_slice(name) if entry.shape else reader.get_tensor(name).reshape(1)
            for start, stop, buffer in self.source.blocks(name):
                base = as_tensor(buffer, entry)
                delta, wanted = rows(base.float(), start, stop)
                sent = wanted.to(FLOATS[back.dtype])
                rounded = sent.float()
                if not math.isfinite(float(rounded.sum())):
                    raise DataError(
                        f"{self.source.path}: {name} is not finite as {sent.dtype} after the"
                        " merge; lower merge.scale or train at a lower learning rate"
                    )
                content = as_bytes(sent)
                self._write(content, at)
                got = stored[start:stop]
                if not _same(as_bytes(got), content):
                    raise DataError(
                        f"{self.target}: {name} reads back differently from what was sent"
                    )
                self._hash(as_bytes(got), buffer)
                if load_dtype is not None and load_dtype != sent.dtype:
                    rounded = sent.to(load_dtype).float()
                before = base if load_dtype is None else base.to(load_dtype)
                survival.add(rounded - before.float(), delta)
                at += len(content)
        return survival


def _same(left: Any, right: Any) -> bool:
    """Equal bytes; eight at a time."""
    a, b = np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)
    whole = len(a) // 8 * 8
    return (
        len(a) == len(b)
        and np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64))
        and np.array_equal(a[whole:], b[whole:])
    )


def _write(file: int, content: Any, at: int) -> None:
    """All of ``content`` at byte ``at``; the system may take less at a time."""
    left = memoryview(content)
    while left:
        done = os.pwrite(file, left, at)
        left, at = left[done:], at + done
