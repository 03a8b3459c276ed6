"""The inside of the code sandbox: give up what a generated program must not have, then become it.

Run as ``python -I -S -c SOURCE SPEC``, already under its own uid and in its own session; standard
library alone, since nothing of this project can be read in there. ``SPEC`` is JSON: ``limits`` (name
of an rlimit to its value), ``read`` and ``write`` (paths), ``landlock`` (the version that it has to be
of, at least), ``parent`` (who must live; 0 where that is seen to), ``hello`` (what it says first, so
that the caller knows that it began), ``filter`` (see ``seccomp.py``) and ``run`` (the command).

Three layers, each of which no process can take off again: rlimits, Landlock (paths, and signals from
its sixth version on) and a seccomp filter (no sockets but pairs of streams, no signals, no new session
or namespace, no memory outside of processes). Linux on x86-64 and arm64. An honest program may miss
multiprocessing, signals (also to itself and to what it has started), and setting modes and times of
files, as shutil.copy does.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SIGNALS = {signal.SIGTERM, signal.SIGCHLD}
BROKEN = 125  # exit code: it is the jail that failed

# What Landlock calls files: bits of include/uapi/linux/landlock.h.
ALL_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights a version knows
ON_FILES = 0b1100_0000_0000_0111  # those that a single file can have
EXECUTE, READ_FILE, READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
MAKE_DEVICES = 1 << 6 | 1 << 11


def call(number: int, *arguments: object) -> int:
    """A system call; OSError when it fails."""
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *whole)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number}: {os.strerror(code)}")
    return int(result)


def landlock_version() -> int:
    """Which version of Landlock the kernel has; 0 where there is none."""
    try:
        return call(444, None, 0, 1)
    except OSError:
        return 0


def restrict_paths(read: list[str], write: list[str]) -> None:
    """From now on read and run only below ``read``, write only below ``write`` (files: themselves)."""
    version = landlock_version()
    rights = (1 << ALL_RIGHTS.get(version, 16)) - 1
    # no right to connect or bind is given out, and no signal or abstract socket leaves this domain
    attributes = struct.pack(
        "=QQQ", rights, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = call(444, ctypes.c_char_p(attributes), size, 0)
    for path, wanted in (
        *((path, EXECUTE | READ_FILE | READ_FOLDER) for path in read),
        *((path, rights & ~MAKE_DEVICES & ~EXECUTE) for path in write),
    ):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.stat(place).st_mode):
            wanted &= ON_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", wanted & rights, place))
        call(445, rules, 1, rule, 0)
        os.close(place)
    call(446, rules, 0)
    os.close(rules)


def filter_calls(program: bytes) -> None:
    """From now on the system calls that ``program`` (instructions of classic BPF) refuses fail."""
    held = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(held))
    if LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(described), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def become(spec: "dict[str, Any]") -> None:
    """Shed everything and become the program."""
    for name, value in spec["limits"].items():
        # a second more before the kernel kills: the first signal says which limit it was
        more = 1 if name == "RLIMIT_CPU" else 0
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value + more if hard == resource.RLIM_INFINITY else min(value + more, hard)
        resource.setrlimit(kind, (min(value, most), most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as first:
        first.write("1000")
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    version = landlock_version()
    if version < spec["landlock"]:
        raise OSError(f"Landlock of version {spec['landlock']} is needed, the kernel has {version}")
    if version:
        restrict_paths(spec["read"], spec["write"])
    filter_calls(bytes.fromhex(spec["filter"]))
    os.execv(spec["run"][0], spec["run"])


def supervise(program: int, cpu_seconds: int) -> int:
    """Bury what ends, and on SIGTERM kill the program; its exit code, as a shell has it.

    Nobody else may bury orphans, and dead ones count against the limit on processes until somebody
    does. SIGTERM also comes when the caller dies. Both signals are blocked, and taken from here.
    """
    while True:
        if signal.sigwait(SIGNALS) == signal.SIGTERM:
            kill_all(program)
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == program:
                kill_all(program)  # before its number may be another's
                _, status, used = os.wait4(program, 0)
                with contextlib.suppress(ChildProcessError):
                    while True:
                        os.wait()
                code = os.waitstatus_to_exitcode(status)
                if code == -signal.SIGKILL and used.ru_utime + used.ru_stime >= cpu_seconds:
                    code = -signal.SIGXCPU  # it did not listen to that one
                return code if code >= 0 else 128 - code
            os.waitpid(ended.si_pid, 0)


def kill_all(group: int) -> None:
    """Kill a process group, if there is any of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main(text: str) -> int:
    """Start the program in a group of its own and see it to its end; BROKEN if it cannot be jailed."""
    spec = json.loads(text)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if spec["parent"] and os.getppid() != spec["parent"]:
        return BROKEN
    os.write(1, spec["hello"].encode())
    told, tell = os.pipe()  # closed when it becomes the program
    program = os.fork()
    if program == 0:
        try:
            os.setpgid(0, 0)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            become(spec)
        except BaseException as error:
            os.write(tell, repr(error).encode())
        os._exit(BROKEN)
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # its memory is nobody's, of whatever uid
    os.close(tell)
    with contextlib.suppress(OSError):
        os.setpgid(program, program)  # whoever is first
    failed = os.read(told, 4096)
    code = supervise(program, spec["limits"]["RLIMIT_CPU"])
    if failed:
        os.write(1, failed)
        return BROKEN
    return 1 if code == BROKEN else code


if __name__ == "__main__":
    ended = BROKEN
    try:
        ended = main(sys.argv[1])
    except BaseException as error:
        os.write(1, repr(error).encode())
    os._exit(ended)
