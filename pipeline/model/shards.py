"""Safetensors checkpoints as headers and byte ranges: planned without loading, read a few megabytes
at a time.

Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors). Only what a header promises is read; a file that does
not keep its promise is a DataError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NARROW = ("F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype in safetensors' spelling, shape, and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """How many equal pieces it can be read in: its first dimension, or one."""
        first = self.shape[0] if self.shape else 1
        return first if first and self.size_bytes % first == 0 else 1

    @property
    def block_rows(self) -> int:
        """Rows in one block of about ``BLOCK_BYTES``."""
        return max(1, BLOCK_BYTES * self.rows // max(1, self.size_bytes))


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its path, the exact header bytes, and its tensors in header order."""

    path: Path
    raw: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def in_file_order(self) -> list[str]:
        """Tensor names by position of their bytes."""
        return sorted(
            self.entries, key=lambda name: (self.entries[name].start, self.entries[name].stop)
        )

    def blocks(self, name: str) -> Iterator[tuple[int, int, bytearray]]:
        """(first row, last row + 1, bytes) of a tensor, ``BLOCK_BYTES`` at a time."""
        entry = self.entries[name]
        step = entry.block_rows
        with self.path.open("rb") as stream:
            stream.seek(entry.start)
            for start in range(0, entry.rows, step):
                stop = min(entry.rows, start + step)
                yield start, stop, _exactly(stream, entry, stop - start, self.path, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start``..``stop`` of a floating tensor [rows, ...] (all of it by default)."""
        entry = self.entries[name]
        stop = entry.rows if stop is None else stop
        with self.path.open("rb") as stream:
            stream.seek(entry.start + start * (entry.size_bytes // max(1, entry.rows)))
            tensor = as_tensor(_exactly(stream, entry, stop - start, self.path, name), entry)
        return tensor.reshape(entry.shape) if (start, stop) == (0, entry.rows) else tensor


def _exactly(stream: Any, entry: Entry, rows: int, path: Path, name: str) -> bytearray:
    buffer = bytearray(rows * (entry.size_bytes // max(1, entry.rows)))
    got = stream.readinto(buffer)
    if got != len(buffer):
        raise DataError(f"{path}: {name} ends early ({got} of {len(buffer)} bytes); fetch it again")
    return buffer


def as_tensor(buffer: bytearray, entry: Entry) -> Tensor:
    """The floating rows in ``buffer`` as a tensor [rows, ...] that shares its memory."""
    if not buffer:
        return torch.empty((0, *entry.shape[1:]), dtype=FLOATS[entry.dtype])
    flat = torch.frombuffer(buffer, dtype=FLOATS[entry.dtype])
    return flat.reshape(-1, *entry.shape[1:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, row-major, in its own memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_shard(path: Path) -> Shard:
    """Parse and check the header of one file; DataError names the file and what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"header length {length} in a file of {size} bytes")
            body = stream.read(length)
    except FileNotFoundError:
        raise DataError(f"{path}: no such weights file; fetch the model again") from None
    try:
        tree = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, UnicodeDecodeError) as error:
        raise _damaged(path, f"header is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise _damaged(path, "header is not a JSON object")
    metadata = tree.pop("__metadata__", {})
    entries = {name: _entry(path, name, value, 8 + length) for name, value in tree.items()}
    shard = Shard(path, prefix + body, entries, metadata)
    at = 8 + length
    for name in shard.in_file_order():
        if entries[name].start != at:
            raise _damaged(path, f"{name} starts at byte {entries[name].start}, wanted {at}")
        at = entries[name].stop
    if at != size:
        raise _damaged(path, f"{size} bytes, its header promises {at}")
    return shard


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: damaged or cut short ({problem}); fetch or write it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return tree


def _entry(path: Path, name: str, value: Any, offset: int) -> Entry:
    try:
        dtype, shape = value["dtype"], tuple(int(n) for n in value["shape"])
        start, stop = (int(n) + offset for n in value["data_offsets"])
        bits = BITS[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"entry of {name} is not understood: {error!r}") from error
    if stop - start != (bits + 7) // 8 or start < offset:
        raise _damaged(path, f"{name} has {stop - start} bytes for {dtype} {list(shape)}")
    return Entry(dtype, shape, start, stop)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder: its files by name, and which file holds each tensor."""

    folder: Path
    shards: dict[str, Shard]
    where: dict[str, str]
    indexed: bool

    def shard_of(self, tensor: str) -> Shard:
        """The file that holds ``tensor``; DataError when none does."""
        if tensor not in self.where:
            raise DataError(f"{self.folder}: holds no tensor {tensor}")
        return self.shards[self.where[tensor]]

    def entry(self, tensor: str) -> Entry:
        return self.shard_of(tensor).entries[tensor]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """``Shard.read`` from the file that holds the tensor."""
        return self.shard_of(name).read(name, start, stop)

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(math.prod(self.entry(name).shape) for name in self.where)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Headers of ``model.safetensors``, or of the files its index names; no tensor is read."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise DataError(f"{folder}: has both {SINGLE} and {INDEX}; keep the one that is meant")
    if single.exists():
        shard = read_shard(single)
        return Checkpoint(folder, {SINGLE: shard}, dict.fromkeys(shard.entries, SINGLE), False)
    if not index.exists():
        raise DataError(f"{folder}: has neither {SINGLE} nor {INDEX}; convert the model first")
    try:
        mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(mapped.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not a safetensors index ({error!r}); fetch it again") from error
    shards: dict[str, Shard] = {}
    where: dict[str, str] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{index}: names {file!r}, wanted a file of its own folder")
        shards[file] = read_shard(folder / file)
        for name in shards[file].entries:
            if name in where:
                raise DataError(f"{folder}: {name} is in both {where[name]} and {file}")
            where[name] = file
    for name, file in mapped.items():
        if where.get(name) != file:
            raise DataError(f"{index}: {name} should be in {file}, found in {where.get(name)}")
    return Checkpoint(folder, shards, where, True)


def widened(shard: Shard) -> bytes:
    """Header bytes of ``shard`` with its 16-bit floats as F32: same names, order and metadata."""
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name in shard.in_file_order():
        entry = shard.entries[name]
        size = entry.size_bytes * (2 if entry.dtype in NARROW else 1)
        offsets[name] = (at, at + size)
        at += size
    tree: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    for name, entry in shard.entries.items():
        dtype = "F32" if entry.dtype in NARROW else entry.dtype
        tree[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": offsets[name]}
    body = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
