"""Files that need not be read or written again: stamps, clones and links. Torch-free.

A stamp (inode, size, time of the last write) tells whether anybody wrote to a file since it was
hashed. It does not tell of a disk that forgets, nor of a time that was set back on purpose.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

STAMPS = ".stamps.json"
FICLONE = 0x40049409  # linux/fs.h; not in Python's fcntl before 3.12

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """Inode, size in bytes and time of the last write in nanoseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_stamps(folder: Path) -> dict[str, Stamp]:
    """Stamps of a sealed folder's files; nothing where they are absent or unreadable, as after a
    copy by other means: such files are then hashed."""
    try:
        tree = json.loads((folder / STAMPS).read_text(encoding="utf-8"))
        return {name: (int(a), int(b), int(c)) for name, (a, b, c) in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_stamps(folder: Path, stamps: Mapping[str, Stamp]) -> None:
    """Keep the stamps beside the files that they are of."""
    (folder / STAMPS).write_text(json.dumps(stamps, sort_keys=True) + "\n", encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> bool:
    """Put ``source`` at ``target``; True if the file system shares the bytes, as a clone (a file of
    its own) or a hard link, and False if they were copied."""
    source = source.resolve()
    if _clone(source, target):
        return True
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def _clone(source: Path, target: Path) -> bool:
    """A new file ``target`` that shares the bytes of ``source`` until either is written to (Btrfs,
    XFS); False, and no file, where the file system cannot."""
    with source.open("rb") as original, target.open("xb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), FICLONE, original.fileno())
        except OSError:
            target.unlink()
            return False
    return True
