"""The strongest sandbox that holds on this machine, found by trying each on a program that attacks it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.evals.sandbox import NoSandboxError, Sandbox
from pipeline.evals.seccomp import ARCHITECTURES

TRIAL = """
import json, os, socket, sys
def leaks(attempt):
    try:
        attempt()
        return True
    except OSError:
        return False
def in_child(attempt):
    child = os.fork()
    if child == 0:
        os._exit(leaks(attempt))
    return os.waitpid(child, 0)[1] != 0
print(json.dumps({
    "opens a socket": leaks(lambda: socket.socket().close()),
    "reads the host": leaks(lambda: open(%(secret)r).read()),
    "writes to the host": leaks(lambda: open(%(target)r, "w").close()),
    "is root": os.getuid() == 0,
    "signals the host": leaks(lambda: os.kill(%(pid)d, 0)),
    "sees the host's variables": bool(set(os.environ) - {"PATH", "LANG", "LC_CTYPE", "PWD"}),
    "leaves its session": in_child(os.setsid),
    "cuts files short": leaks(lambda: os.truncate(%(secret)r, 0)),
    "cannot write its own": not leaks(lambda: open("own", "w").close()),
}))
"""


def find_sandbox() -> Sandbox:
    """The strongest sandbox that holds here, tried out on a program that attacks it.

    Raises:
        NoSandboxError: none holds; each way is named with what was wrong.
    """
    if platform.machine() not in ARCHITECTURES:
        raise NoSandboxError(
            f"generated code cannot be contained on {platform.machine()}; wanted one of"
            f" {', '.join(ARCHITECTURES)}; leave the code suites out"
        )
    wrong = []
    for bubblewrap in dict.fromkeys((shutil.which("bwrap"), None)):
        for python in dict.fromkeys(
            (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3")
        ):
            if not os.access(python, os.X_OK):
                continue
            sandbox = Sandbox(python, bubblewrap)
            problem = try_out(sandbox)
            if problem is None:
                return sandbox
            wrong.append(f"{'bubblewrap' if bubblewrap else 'Landlock'} with {python}: {problem}")
    raise NoSandboxError(
        f"generated code cannot be contained on this machine ({'; '.join(wrong)}); install bubblewrap,"
        " use Linux 6.2 or later with Landlock, or leave the code suites out"
    )


def try_out(sandbox: Sandbox) -> str | None:
    """What does not hold, or None."""
    with tempfile.TemporaryDirectory(prefix="untaxed-host-") as host:
        Path(host).chmod(0o777)
        secret = Path(host) / "secret"
        secret.write_text("secret")
        secret.chmod(0o666)
        told = {"secret": str(secret), "target": f"{host}/written", "pid": os.getpid()}
        try:
            ended = sandbox.run(TRIAL % told)
        except (OSError, subprocess.SubprocessError, NoSandboxError) as error:
            return str(error)
    if ended.status != "passed":
        lines = ended.output.strip().splitlines() or [f"exit code {ended.exit_code}"]
        return lines[-1]
    held = json.loads(ended.output.strip().splitlines()[-1])
    return ", ".join(f"a program {what}" for what, true in held.items() if true) or None
