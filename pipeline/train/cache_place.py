"""Where a training run keeps what can be made again, and what of this machine decides its bits."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.artifact import canonical
from pipeline.model.products import replaced
from pipeline.train.world import device, gather_objects

if TYPE_CHECKING:
    from pipeline.stage import Context

KINDS = ("prefix", "reference")  # what folders of caches begin with
IDENTITY = "identity.json"
KEY = 16  # hexadecimal digits
LIBRARIES = ("torch", "transformers", "bitsandbytes", "flash-attn")


def place(context: Context) -> tuple[Path, list[int], int]:
    """(folder, ranks that share it, bytes that all caches in it may take together); the bytes are
    the same on every rank."""
    hosts = gather_objects(socket.gethostname())
    # machines never share a file: a network file system does not keep their maps alike
    own = hosts[context.world.rank]
    root = context.cache / own if len(set(hosts)) > 1 else context.cache
    here = [rank for rank, host in enumerate(hosts) if host == own]
    budget = min(gather_objects(room(root)))
    return root, here, min(budget, int(context.execution.prefix_cache_gb * 1e9))


def machine() -> dict[str, Any]:
    """Libraries, threads and processor: the same product may round otherwise with others."""
    own = device()
    on_gpu = own.type == "cuda"
    return {
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if on_gpu else None,
        "processor": torch.cuda.get_device_name(own) if on_gpu else _cpu_name(),
        "products": "fp32" if replaced() and not on_gpu else None,
        "threads": 0 if on_gpu else torch.get_num_threads(),
    }


def digest_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the lengths and bytes of some tensors on the CPU."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(len(tensor).to_bytes(8, "little"))
        hashed.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def key_of(identity: Mapping[str, Any]) -> str:
    """What the folder's name ends in: a hash of all that decides a bit of the content."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:KEY]


def caches(root: Path) -> list[Path]:
    """The folders of caches below ``root``, of either kind, and no other folder."""
    named = (f for kind in KINDS for f in root.glob(f"{kind}-" + "[0-9a-f]" * KEY))
    return [folder for folder in named if (folder / IDENTITY).is_file()]


def room(root: Path) -> int:
    """Bytes that caches below ``root`` may take in all: those they have, and four fifths of what is
    free."""
    root.mkdir(parents=True, exist_ok=True)
    return sum(_size(folder) for folder in caches(root)) + shutil.disk_usage(root).free * 4 // 5


def make_room(root: Path, folder: Path, size: int, budget_bytes: int) -> None:
    """Remove the caches that were used longest ago until ``folder`` may have ``size`` bytes; who
    still reads one that is mapped keeps its memory."""
    others = [other for other in caches(root) if other != folder]
    others.sort(key=lambda other: other.stat().st_mtime)
    total = size + sum(_size(other) for other in others)
    for other in others:
        if total <= budget_bytes:
            return
        total -= _size(other)
        shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One process at a time makes, maps and removes folders below ``root``."""
    with (root / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _size(folder: Path) -> int:
    """Bytes of its files; another process may be removing or replacing them."""
    size = 0
    with contextlib.suppress(FileNotFoundError):
        for file in folder.iterdir():
            size += file.stat().st_size
    return size


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
