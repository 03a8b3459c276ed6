"""The base's predictions on the anchor rows of one split, in one checked file.

The folder's name is a hash of all that decides a bit of them, as with the frozen prefix, so later
runs and resumes read what an earlier one computed, and a lost or damaged file is computed again to
the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.train.cache_place import IDENTITY, alone, key_of, machine, make_room, place
from pipeline.train.loss import Reference
from pipeline.train.world import gather_objects

if TYPE_CHECKING:
    from pipeline.stage import Context

ROWS = "rows.bin"  # SHA-256 of what follows, ids int32 [M, k], log-probabilities float32 [M, k]
VERSION = 3  # of the code that computes them; raise it when it gives other bits
ROW_BYTES = 8  # of one of the k predictions of a row
HASH_BYTES = 32


class ReferenceCache:
    """``rows`` rows of ``top_k`` predictions, kept where the caches of ``context`` are.

    All ranks call each method. Nothing is kept without room in ``execution.prefix_cache_gb``, and
    nothing where machines differ in what decides a bit.
    """

    def __init__(
        self, context: Context, identity: Mapping[str, Any], rows: int, top_k: int
    ) -> None:
        self.context, self.shape = context, (rows, top_k)
        self.root, here, self.budget = place(context)
        self.writes = here[0] == context.world.rank
        self.identity = {**identity, **machine(), "rows": rows, "top_k": top_k, "version": VERSION}
        alike = len(set(gather_objects(key_of(self.identity)))) == 1
        self.usable = alike and rows * top_k * ROW_BYTES <= self.budget
        self.folder = self.root / f"reference-{key_of(self.identity)}"

    def load(self) -> Reference | None:
        """What is stored, if every rank can read it whole; else None on every rank."""
        found = self._read() if self.usable else None
        return found if all(gather_objects(found is not None)) else None

    def _read(self) -> Reference | None:
        path = self.folder / ROWS
        try:
            stored = memoryview(path.read_bytes())
            os.utime(self.folder)
        except OSError:
            return None  # not there, or just making room for another
        content, size = stored[HASH_BYTES:], self.shape[0] * self.shape[1]
        if len(content) != size * ROW_BYTES or _hash(content) != stored[:HASH_BYTES]:
            self.context.log(f"sft: {path} is damaged; computing it again")
            return None
        ids = np.frombuffer(content, np.int32, size).astype(np.int64)
        log_probs = np.frombuffer(content, np.float32, size, offset=size * 4).copy()
        return Reference(
            torch.from_numpy(ids).view(self.shape), torch.from_numpy(log_probs).view(self.shape)
        )

    def save(self, reference: Reference) -> None:
        """Store it, one rank on each machine; a disk that fails costs later runs some time."""
        if not (self.usable and self.writes):
            return
        ids = reference.ids.to(torch.int32).numpy().tobytes()
        content = ids + reference.log_probs.numpy().tobytes()
        temporary = self.folder / f".{ROWS}.tmp"
        try:
            with alone(self.root):
                make_room(self.root, self.folder, len(content) + HASH_BYTES, self.budget)
                self.folder.mkdir(exist_ok=True)
                text = json.dumps(self.identity, indent=1) + "\n"
                (self.folder / IDENTITY).write_text(text, encoding="utf-8")
                with temporary.open("wb") as stream:
                    stream.write(_hash(content))
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(self.folder / ROWS)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.context.log(f"sft: {self.folder} is not kept: {error}")


def reference_bytes(rows: int, top_k: int) -> int:
    """Bytes that the predictions on ``rows`` anchor tokens take on disk."""
    return rows * top_k * ROW_BYTES + HASH_BYTES if rows else 0


def _hash(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()
