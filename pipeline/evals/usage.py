"""What the processes of a program use, read from /proc and from its scratch folder."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_FILES = 2_000
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One process of a session. ``virtual`` also counts memory that is mapped and looks unused."""

    pid: int
    group: int
    threads: int
    virtual: int
    resident: int


def session(leader: int) -> list[Process]:
    """The processes of a session that still run; a program that cannot leave it has no others."""
    found = []
    for pid, fields in _processes():
        threads, zombie = int(fields[17]), fields[0] in "ZX"
        if int(fields[3]) != leader or (zombie and threads <= 1):
            continue
        if zombie:  # its first thread has ended, and the others go on
            fields = next(_threads(pid), fields)
        memory = int(fields[20]), int(fields[21]) * PAGE
        found.append(Process(pid, int(fields[2]), threads, *memory))
    return found


def _threads(pid: int) -> Iterator[list[str]]:
    """The stat fields of the threads of a process that are alive."""
    with suppress(OSError):
        for thread in os.scandir(f"/proc/{pid}/task"):
            with suppress(OSError):
                fields = _stat(f"{thread.path}/stat")
                if fields[0] not in "ZX":
                    yield fields


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), _stat(f"/proc/{entry.name}/stat")


def _stat(path: str) -> list[str]:
    """The fields of a stat file from the state on; a name may hold spaces and brackets."""
    return Path(path).read_text(errors="replace").rpartition(")")[2].split()


def proportional(process: Process) -> int:
    """Bytes of a process, pages that it shares counted in part; what is resident where that is not
    known."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return process.resident


def tasks_of(uid: int) -> int:
    """How many threads of ``uid`` there are: the kernel's limit on processes counts them all."""
    count = 0
    for pid, fields in _processes():
        with suppress(OSError):
            if Path(f"/proc/{pid}").stat().st_uid == uid:
                count += int(fields[17])
    return count


def stored(folder: Path, processes: Sequence[Process], file_bytes: int) -> float:
    """Bytes on disk below ``folder``, and in deleted files that are still open or mapped (of these
    only the most that they can have is known: ``file_bytes``).

    Infinite when there are too many files to look at, or a folder that hides what is in it.
    """
    total, files, waiting = 0.0, 0, [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except FileNotFoundError:  # it is at work there
            continue
        except OSError:
            return math.inf
        files += len(entries)
        if files > MOST_FILES:
            return math.inf
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    gone: dict[str, float] = {}
    for process in processes:
        for inode, size in _deleted(process.pid, file_bytes):
            gone[inode] = max(size, gone.get(inode, 0))
    return total + sum(gone.values())


def _deleted(pid: int, file_bytes: int) -> Iterator[tuple[str, float]]:
    """(inode, bytes) of the deleted files that a process holds; each thread may have its own."""
    with suppress(OSError):
        for thread in list(os.scandir(f"/proc/{pid}/task")):
            with suppress(OSError):
                for entry in os.scandir(f"{thread.path}/fd"):
                    with suppress(OSError):
                        held = entry.stat()
                        if stat.S_ISREG(held.st_mode) and held.st_nlink == 0:
                            yield str(held.st_ino), held.st_blocks * 512
            with suppress(OSError):
                yield from _mapped(Path(thread.path, "maps"), file_bytes)


def _mapped(maps: Path, file_bytes: int) -> Iterator[tuple[str, float]]:
    for line in maps.read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) == 6 else ""
        shared = name.startswith("/dev/zero")  # memory without a file
        if name.startswith("/") and name.endswith("(deleted)") and not shared:
            yield fields[4], file_bytes
