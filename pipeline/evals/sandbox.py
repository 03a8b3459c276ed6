"""Run generated Python where it can change nothing: no network, no file and no process but its own.

HumanEval and MBPP run what a model wrote. Each program gets a process group under a uid that is not
root's and not the caller's (when the caller is root), an empty environment, one scratch folder, and
limits; ``jail.py`` takes the rest away. Where bubblewrap runs, namespaces stand around that. A sandbox
that cannot be had, or that leaks in its own trial, is an error before anything is generated.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from pipeline.errors import UntaxedError
from pipeline.evals.jail import landlock_version
from pipeline.evals.seccomp import filter_program
from pipeline.evals.usage import Process, proportional, session, stored, tasks_of

JAIL = Path(__file__).with_name("jail.py")
FIRST_UID, UIDS, SLOTS = (
    60_706,
    16,
    29,
)  # above people's and services', below systemd's dynamic ones
BROKEN = 125  # the jail's exit code where it fails itself
LEAST_LANDLOCK = 3  # earlier versions let files be cut short
LOOK_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
OWN_PROCESSES = 4  # bubblewrap's two, the supervisor, and one that is about to go
OWN_BYTES = 256 << 20  # their address space
SLACK_TASKS = 16 * 20  # what its neighbours may have
READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
INSIDE = "/scratch"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

Status = Literal["passed", "failed", "time", "memory", "output", "disk", "processes"]


class NoSandboxError(UntaxedError):
    """Generated code cannot be contained on this machine."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. ``memory_bytes`` binds each process (address space) and all of
    them together (resident; about twice that in address space); ``scratch_bytes`` all files,
    ``file_bytes`` each; ``processes`` counts threads too, and a few that are the sandbox's."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 16
    open_files: int = 64
    file_bytes: int = 16 << 20
    scratch_bytes: int = 64 << 20
    output_bytes: int = 1 << 20


STANDARD = Limits()


@dataclass(frozen=True)
class Ended:
    """How a program ended. ``passed``: it ran to its last line and returned 0; ``time``, ``memory``,
    ``output``, ``disk`` and ``processes``: it went over that limit and was killed with all of them."""

    status: Status
    exit_code: int
    output: str
    seconds: float


class Sandbox:
    """Runs programs; see ``trial.py``. Thread-safe: every run has its own folder and uid, and as
    many run at once as there are uids; others wait."""

    def __init__(self, python: str, bubblewrap: str | None) -> None:
        self.python, self.bubblewrap = python, bubblewrap
        first = FIRST_UID + UIDS * (os.getpid() % SLOTS)
        self.uids = range(first, first + UIDS) if os.geteuid() == 0 else range(0)
        self._free: SimpleQueue[int | None] = SimpleQueue()
        for uid in self.uids or [None] * UIDS:
            self._free.put(uid)

    @property
    def layers(self) -> str:
        """What holds a program, for reports."""
        around = "bubblewrap, " if self.bubblewrap else ""
        around += "Landlock, " if landlock_version() else ""
        return f"{around}seccomp, rlimits, {'own uid' if os.geteuid() == 0 else 'same uid'}"

    def run(self, source: str, limits: Limits = STANDARD) -> Ended:
        """Run ``source`` as a file of its own; it passes when it gets to its end.

        A program that leaves early, even with exit code 0, has failed: the last line says a word that
        is made for this run alone.
        """
        uid = self._free.get()
        try:
            with _scratch(uid) as folder:
                return self._run(source, limits, folder, uid)
        finally:
            self._free.put(uid)

    def _run(self, source: str, limits: Limits, folder: Path, uid: int | None) -> Ended:
        word, hello = secrets.token_hex(16), secrets.token_hex(16)
        program = folder / "program.py"
        program.write_text(
            f"{source}\n\n__import__('os').write(1, {word.encode()!r})\n",
            encoding="utf-8",
            errors="surrogatepass",
        )
        program.chmod(0o644)
        started = time.monotonic()
        child = subprocess.Popen(
            self._command(folder, limits, uid, hello),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=[] if uid is not None else None,
        )
        try:
            over, output = _watch(child, folder, limits)
        finally:
            self._end(child)
        said, code = output.decode("utf-8", errors="replace"), child.returncode
        if over is None and (code == BROKEN or hello not in said):
            what = " ".join(said.replace(hello, "").split()) or f"exit code {code}"
            raise NoSandboxError(f"the sandbox failed ({self.layers}): {what}")
        if over is None and code == 128 + signal.SIGXCPU:
            over = "time"
        status: Status = over or ("passed" if word in said and code == 0 else "failed")
        said = said.replace(hello, "").replace(word, "").rstrip()
        return Ended(status, code, said, time.monotonic() - started)

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """See every process of the program gone, then reap the one that was started.

        The jail's supervisor kills the program and buries all of it. It is what was started, or in
        bubblewrap's group beside two that do not mind: killed, they would leave a dead process of
        this uid to a system that may be slow to bury it.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        beside = [p.pid for p in session(child.pid) if p.group == child.pid != p.pid]
        for pid in beside if self.bubblewrap else [child.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while left := session(child.pid):
            if time.monotonic() > give_up:
                for group in {
                    process.group for process in left
                }:  # whole groups: none can fork away
                    with suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGKILL)
            if time.monotonic() > 2 * PATIENCE_SECONDS + give_up:
                raise NoSandboxError(f"generated code survives SIGKILL: {left}")
            time.sleep(0.005)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()

    def _command(self, folder: Path, limits: Limits, uid: int | None, hello: str) -> list[str]:
        wanted = (*READABLE, *_installation(self.python), *DEVICES)
        read = [path for path in wanted if Path(path).exists()]
        # as the caller's own uid the limit counts all of the caller's threads, now and soon
        others = 0 if uid is not None else tasks_of(os.geteuid()) + SLACK_TASKS
        spec = {
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_NPROC": limits.processes + OWN_PROCESSES + others,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
            },
            "read": read,
            "write": [str(folder) if self.bubblewrap is None else INSIDE, "/dev/null"],
            "landlock": LEAST_LANDLOCK if self.bubblewrap is None else 0,
            "parent": os.getpid() if self.bubblewrap is None else 0,
            "hello": hello,
            "filter": filter_program(platform.machine()).hex(),
            "run": [self.python, "-I", "program.py"],
        }
        jail = [self.python, "-I", "-S", "-c", JAIL.read_text(encoding="utf-8"), json.dumps(spec)]
        if self.bubblewrap is None:
            return jail
        return [self.bubblewrap, *_walls(folder, read), "--", *jail]


def _watch(
    child: subprocess.Popen[bytes], folder: Path, limits: Limits
) -> tuple[Status | None, bytes]:
    """Read what it says until it ends or goes over a limit; which limit, and what it said.

    The child is not reaped here: as long as it is a zombie nobody else gets its number.
    """
    assert child.stdout is not None
    pipe, said = child.stdout.fileno(), bytearray()
    os.set_blocking(pipe, False)
    deadline, look = time.monotonic() + limits.wall_seconds, 0.0
    while True:
        readable = select.select([pipe], [], [], LOOK_SECONDS)[0]
        chunk = _read(pipe) if readable else None
        said += chunk or b""
        if len(said) > limits.output_bytes:
            return "output", bytes(said[: limits.output_bytes])
        now = time.monotonic()
        if now > deadline:
            return "time", bytes(said)
        if now >= look:
            look = now + LOOK_SECONDS
            over = _over(session(child.pid), folder, limits)
            if over:
                return over, bytes(said)
        if chunk:
            continue
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None, bytes(said + (_read(pipe) or b""))
        if chunk == b"":  # it closed its output and goes on
            time.sleep(LOOK_SECONDS)


def _over(processes: Sequence[Process], folder: Path, limits: Limits) -> Status | None:
    """Which limit all processes together are over."""
    if sum(process.threads for process in processes) > limits.processes + OWN_PROCESSES:
        return "processes"
    most = limits.memory_bytes
    if sum(process.resident for process in processes) > most < sum(map(proportional, processes)):
        return "memory"  # the second sum counts pages that forked processes share once
    # shared memory that no process shows as resident is at least mapped
    if sum(process.virtual for process in processes) > 2 * limits.memory_bytes + OWN_BYTES:
        return "memory"
    if stored(folder, processes, limits.file_bytes) > limits.scratch_bytes:
        return "disk"
    return None


def _read(pipe: int) -> bytes | None:
    """What is there to read; nothing is left to come when empty, nothing there yet when None."""
    try:
        return os.read(pipe, 65536)
    except BlockingIOError:
        return None


@contextmanager
def _scratch(uid: int | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="untaxed-code-"))
    try:
        if uid is not None:
            os.chown(folder, uid, uid)
        yield folder
    finally:
        # coreutils: the tree may be too deep for Python, and hold folders without permissions
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL, check=False)


def _installation(python: str) -> list[str]:
    """What ``python`` needs of its installation, where that is not below /usr: the home of a user may
    stand above it."""
    prefix = Path(python).parent.parent
    if prefix == Path("/usr"):
        return []
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = sorted(str(path) for path in (prefix / "lib").glob("libpython*"))
    return [python, str(prefix / "lib" / version), *libraries]


def _walls(folder: Path, read: Sequence[str]) -> list[str]:
    """bubblewrap's options: new namespaces, ``read`` read-only, and the scratch folder."""
    options = ["--die-with-parent", "--unshare-all", "--cap-drop", "ALL"]
    for path in read:
        if Path(path).is_symlink():
            options += ["--symlink", str(Path(path).readlink()), path]
        else:
            options += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    options += ["--bind", str(folder), INSIDE]
    return [*options, "--remount-ro", "/", "--chdir", INSIDE]
