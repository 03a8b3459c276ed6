"""Where a training run keeps what can be made again, and what of this machine decides its bits."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.train.prefix_cache import room
from pipeline.train.world import device, gather_objects

if TYPE_CHECKING:
    from pipeline.stage import Context

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
        "threads": 0 if on_gpu else torch.get_num_threads(),
    }


def digest_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the lengths and bytes of some tensors on the CPU."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(len(tensor).to_bytes(8, "little"))
        hashed.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
