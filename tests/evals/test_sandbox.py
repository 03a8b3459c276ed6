"""The code sandbox holds what generated programs try, and lets honest ones work."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from escapes import HUNGRY, REACHING, START

from pipeline.evals import jail, seccomp
from pipeline.evals import sandbox as module
from pipeline.evals.sandbox import Limits, NoSandboxError, Sandbox
from pipeline.evals.trial import find_sandbox, try_out

TIGHT = Limits(
    wall_seconds=3,
    cpu_seconds=1,
    memory_bytes=512 << 20,
    scratch_bytes=24 << 20,
)
# For those that only wait: nothing but the clock can end them.
BRIEF = replace(TIGHT, wall_seconds=1)
WAITING = {"print a little now and then", "sleep without end", "close its output and go on"}
# Where another limit has to be met first, however slow or busy the machine is.
PATIENT = replace(TIGHT, wall_seconds=60, cpu_seconds=60)


@dataclass
class Host:
    """What the programs are told of the machine around them."""

    folder: Path
    port: int
    abstract: str

    def program(self, source: str) -> str:
        told = {"HOST": str(self.folder), "PORT": self.port, "ABSTRACT": self.abstract}
        told["PARENT"] = os.getpid()
        lines = [f"{name} = {value!r}" for name, value in told.items()]
        return "\n".join([*lines, START, source])


@pytest.fixture(scope="module", autouse=True)
def own_place() -> Iterator[None]:
    """Scratch folders in a place of their own, where anybody may go: other tests make some too."""
    before, folder = tempfile.tempdir, Path(tempfile.mkdtemp(prefix="untaxed-test-"))
    folder.chmod(0o755)
    tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = before
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["Landlock", "bubblewrap"])
def held(request: pytest.FixtureRequest) -> Sandbox:
    bubblewrap = shutil.which("bwrap") if request.param == "bubblewrap" else None
    if request.param == "bubblewrap" and bubblewrap is None:
        pytest.skip("bubblewrap is not installed")
    if request.param == "Landlock" and jail.landlock_version() < module.LEAST_LANDLOCK:
        pytest.skip("the kernel has no Landlock, or an old one")
    sandbox = Sandbox(find_sandbox().python, bubblewrap)
    problem = try_out(sandbox)
    if problem and problem.startswith("bwrap:"):
        pytest.skip(f"no namespaces here: {problem}")
    assert problem is None
    return sandbox


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="untaxed-host-"))  # where anybody may go
    folder.chmod(0o777)
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o666)
    name = f"untaxed-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        yield Host(folder, server.getsockname()[1], name)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", REACHING)
def test_nothing_outside_is_reached(held: Sandbox, host: Host, name: str) -> None:
    ended = held.run(host.program(REACHING[name]))
    assert "ESCAPED" not in ended.output, ended
    assert "held" in ended.output, ended  # it was tried
    assert (host.folder / "secret").read_text() == "secret"
    assert sorted(path.name for path in host.folder.iterdir()) == ["secret"]
    assert not Path("/dev/shm/untaxed-escape").exists()
    nothing_is_left(held)


@pytest.mark.parametrize("name", HUNGRY)
def test_nothing_is_used_up(held: Sandbox, host: Host, name: str) -> None:
    source, ways = HUNGRY[name]
    limits = BRIEF if name in WAITING else TIGHT if "time" in ways else PATIENT
    ended = held.run(host.program(source), limits)
    assert ended.status in ways, ended
    assert len(ended.output) <= TIGHT.output_bytes
    nothing_is_left(held)


def nothing_is_left(sandbox: Sandbox) -> None:
    """No scratch folder, and no process under a sandbox's uid, or at work in there; nor a dead one
    that this process should have buried. bubblewrap's own first process is left to the system.
    """
    assert not list(Path(tempfile.gettempdir()).glob("untaxed-code-*"))
    give_up = time.monotonic() + 10
    while found := left(sandbox):
        assert time.monotonic() < give_up, found
        time.sleep(0.02)


def left(sandbox: Sandbox) -> list[str]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                at = "" if sandbox.uids else str(Path(entry.path, "cwd").readlink())
                if entry.stat().st_uid in sandbox.uids or at.startswith(tempfile.gettempdir()):
                    stat = Path(entry.path, "stat").read_text()
                    state, parent = stat.rpartition(")")[2].split()[:2]
                    if state != "Z" or int(parent) == os.getpid():
                        found.append(stat)
    return found


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_refuses_what_it_lists_and_no_more(machine: str) -> None:
    """Run on paper: every refused call on both architectures, and those that Python lives on."""
    at = seccomp.NUMBERS[machine]
    for name, entry in seccomp.REFUSED.items():
        number = entry if isinstance(entry, int) else entry[at]
        if number is not None:
            assert verdict(machine, number) == seccomp.ERROR | errno.EPERM, name
    lived_on = {"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "execve": (59, 221)}
    lived_on |= {"openat": (257, 56), "futex": (202, 98), "exit_group": (231, 94)}
    for name, numbers in lived_on.items():
        assert verdict(machine, numbers[at]) == seccomp.ALLOW, name
    clone, limit, pair, control = ((56, 220), (302, 261), (53, 199), (72, 25))
    no = seccomp.ERROR | errno.EPERM
    for numbers, arguments, want in (
        (clone, (0x3D0F00, 0), seccomp.ALLOW),  # a thread
        (clone, (0x10000011, 0), no),
        (clone, (0x20000011, 0), no),
        (limit, (0, 7), seccomp.ALLOW),
        (limit, (1, 7), no),
        (pair, (1, 0x80001), seccomp.ALLOW),
        (pair, (1, 2), no),
        (pair, (2, 1), no),
        (control, (3, 2), seccomp.ALLOW),
        *((control, (3, command), no) for command in (8, 10, 15, 1026)),
        ((16, 29), (0, 0x5401), seccomp.ALLOW),
        ((16, 29), (0, 0x8902), no),
    ):
        assert verdict(machine, numbers[at], *arguments) == want, (numbers, arguments)
    assert verdict(machine, seccomp.CLONE3) == seccomp.ERROR | errno.ENOSYS
    assert verdict("other", 0, program=machine) == seccomp.KILL
    if machine == "x86_64":
        assert verdict(machine, seccomp.X32 + 1) == no


def verdict(machine: str, number: int, *arguments: int, program: str | None = None) -> int:
    """What a filter answers: classic BPF, as the kernel runs it."""
    architecture = seccomp.ARCHITECTURES.get(machine, 0x40000003)
    words = list(arguments) + [0] * (6 - len(arguments))
    data = struct.pack("=iIQ6Q", number, architecture, 0, *words)
    code = seccomp.filter_program(program or machine)
    steps = list(struct.iter_unpack("=HBBI", code))
    accumulator, at = 0, 0
    while True:
        kind, yes, no, value = steps[at]
        at += 1
        if kind == seccomp.RETURN:
            return int(value)
        if kind == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif kind == seccomp.MASK:
            accumulator &= value
        else:
            met = accumulator == value if kind == seccomp.EQUAL else accumulator >= value
            at += yes if met else no


def test_an_honest_program_passes_and_a_wrong_one_fails(held: Sandbox) -> None:
    source = """
import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, tempfile
from typing import List, Optional
def largest(numbers: List[int]) -> Optional[int]:
    return max(numbers, default=None)
with tempfile.TemporaryFile() as f:
    f.write(b"scratch works")
assert largest([3, 1, 2]) == %d
print("said")
"""
    good, bad = held.run(source % 3), held.run(source % 4)
    assert (good.status, good.exit_code, good.output) == ("passed", 0, "said")
    assert bad.status == "failed"
    assert "AssertionError" in bad.output


def test_many_at_a_time(held: Sandbox) -> None:
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(held.run, [f"print({n})" for n in range(12)]))
    assert [e.output for e in ended] == [str(n) for n in range(12)]
    assert {e.status for e in ended} == {"passed"}


def test_a_sandbox_that_leaks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a jail that takes nothing away, the trial names what got through."""
    monkeypatch.setattr(module, "JAIL", Path(__file__).with_name("open_jail.py"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NoSandboxError, match="opens a socket") as caught:
        find_sandbox()
    assert "install bubblewrap" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_jail_that_fails_is_no_verdict_on_the_program(
    held: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_LANDLOCK", 99)
    if held.bubblewrap:
        pytest.skip("namespaces do without Landlock")
    with pytest.raises(NoSandboxError, match="Landlock of version 99 is needed"):
        held.run("print('fine')")
