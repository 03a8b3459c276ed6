"""Proof that a merged file holds what was meant: read back, compared, and the update weighed.

Survival is the share of the update that is left after rounding to the dtype that loading gives:
the projection <W'_loaded - W, dW> / <dW, dW>.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model.merging import Plan, Rows
from pipeline.model.shards import FLOATS, Shard, as_bytes, as_tensor, read_shard


@dataclass
class Survival:
    """Sums over tensors: <got, dW>, <dW, dW> and <got, got>, with got = W'(as loaded) - W."""

    dot: float = 0.0
    wanted: float = 0.0
    got: float = 0.0

    def add(self, got: Tensor, delta: Tensor) -> None:
        x, d = got.double().flatten(), delta.double().flatten()
        self.dot += float(x @ d)
        self.wanted += float(d @ d)
        self.got += float(x @ x)

    def join(self, other: Survival) -> None:
        self.dot += other.dot
        self.wanted += other.wanted
        self.got += other.got

    @property
    def share(self) -> float | None:
        """Projection of what arrived on what was meant; None where nothing was meant."""
        return self.dot / self.wanted if self.wanted else None

    @property
    def norm_ratio(self) -> float | None:
        """Size of what arrived over the size of what was meant."""
        return math.sqrt(self.got / self.wanted) if self.wanted else None


@dataclass
class Proof:
    """What reading the written files back has shown; ``widened``: 16-bit floats became F32."""

    widened: bool = False
    tensors: dict[str, Survival] = field(default_factory=dict)
    unchanged: int = 0
    unchanged_bytes: int = 0

    def total(self) -> Survival:
        total = Survival()
        for survival in self.tensors.values():
            total.join(survival)
        return total


def read_back(
    source: Shard, plan: Plan, target: Path, proof: Proof, *, load_dtype: torch.dtype | None
) -> None:
    """Hold a written file against base and plan, adding to ``proof``; DataError where they differ.

    Updated tensors must be the fp32 sum rounded once; all others must have the base's bytes (its
    values, where the file was widened). ``load_dtype``: what loading casts to (None: nothing).
    """
    written = read_shard(target)
    if list(written.entries) != list(source.entries):
        raise DataError(f"{target}: reads back with other tensors than were written; run again")
    for name, entry in source.entries.items():
        if name in plan.updates:
            survival = _survival(source, written, name, plan.updates[name].opened(), load_dtype)
            proof.tensors[name] = survival
            continue
        back = written.entries[name]
        pairs = zip(source.blocks(name), _aligned(written, name, entry.block_rows), strict=True)
        for (_, _, wanted), got in pairs:
            if back.dtype != entry.dtype:
                same = as_bytes(as_tensor(got, back).to(FLOATS[entry.dtype])) == wanted
            else:
                same = got == wanted
            if not same:
                raise DataError(f"{target}: {name} differs from the base; nothing was sealed")
        proof.unchanged += 1
        proof.unchanged_bytes += back.size_bytes


def _aligned(shard: Shard, name: str, step: int) -> Iterator[bytearray]:
    """Blocks of ``step`` rows, whatever the width of the rows."""
    entry = shard.entries[name]
    row_bytes = entry.size_bytes // max(1, entry.rows)
    with shard.path.open("rb") as stream:
        stream.seek(entry.start)
        for start in range(0, entry.rows, step):
            yield bytearray(stream.read((min(entry.rows, start + step) - start) * row_bytes))


def _survival(
    source: Shard, written: Shard, name: str, rows: Rows, load_dtype: torch.dtype | None
) -> Survival:
    from safetensors import safe_open

    survival = Survival()
    entry = source.entries[name]
    with safe_open(written.path, framework="pt") as reader:  # the reader that loading uses
        stored = reader.get_slice(name) if entry.shape else reader.get_tensor(name).reshape(1)
        for start, stop, buffer in source.blocks(name):
            base = as_tensor(buffer, entry)
            delta, target = rows(base.float(), start, stop)
            got = stored[start:stop]
            if not torch.equal(got, target.to(got.dtype)):
                raise DataError(f"{written.path}: {name} reads back differently from what was sent")
            cast = load_dtype or got.dtype
            survival.add(got.to(cast).float() - base.to(cast).float(), delta)
    return survival
