"""The first process of a container: it starts a stage, hears SIGTERM for it, and tells the truth.

A stage may be several ranks below a launcher, and launchers hide how these ended: torchrun turns
every failure into exit code 1, deepspeed ends with 0 where its helper was killed. But the retry policy
of a Job reads the code. So ranks say theirs in a file, a stop is passed on to all of them, and 0 means
that the sealed artifact is there. Any other command replaces this process.

How many nodes there are and which one this is: PET_NNODES, PET_NODE_RANK (or the index of the pod in
its Indexed Job), PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE. torchrun reads these itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

FAILED, USAGE, NOT_FOUND, BAD_RECIPE, KILLED, STOPPED = 1, 64, 127, 78, 137, 143
STATUS_FILE, SEALED_FILE = "UNTAXED_STATUS_FILE", "UNTAXED_SEALED_FILE"
REVISION, LAUNCHED = "UNTAXED_REVISION", "UNTAXED_LAUNCHED_REVISION"
CHANGED = "-dirty"
GRACE = "UNTAXED_GRACE_SECONDS"
GRACE_SECONDS = 240.0
LAST_WORDS = Path("/dev/termination-log")
LOOK_SECONDS = 0.05
NO_MEMORY = "out of memory"
# Of the control group of this container, version 2 and 1: lines of a name and a count.
OUT_OF_MEMORY = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)


class Usage(Exception):
    """The environment says something that cannot be."""


def main(command: list[str]) -> int:
    """Run ``command``; returns its exit code, or never for one that is no stage."""
    if not command:
        print("entrypoint: no command; give one, such as: untaxed --help", file=sys.stderr)
        return USAGE
    try:
        if any(word.startswith("pipeline/") for word in command):
            if other_code(os.environ):
                print(f"entrypoint: {other_code(os.environ)}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                return Stage(with_nodes(command, os.environ, Path(folder)), Path(folder)).run()
        os.execvp(command[0], command)
    except Usage as error:
        print(f"entrypoint: {error}", file=sys.stderr)
        return BAD_RECIPE
    except OSError as error:
        print(f"entrypoint: {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


def other_code(said: Mapping[str, str]) -> str:
    """What there is to say where this image may hold other code than was launched."""
    launched, here = said.get(LAUNCHED, ""), said.get(REVISION, "unknown")
    changed = CHANGED in launched + here
    if not launched or (here == launched and not changed):
        return ""
    image = "an image of " + ("unknown revision" if here == "unknown" else short(here))
    same = launched.removesuffix(CHANGED) == here.removesuffix(CHANGED)
    return (
        f"other code: {image} runs, launched from {short(launched)}"
        + (", not known to be the same" if same else "")
        + ("; commit, build" if changed else "; build")
        + " and push the image under a new tag, and name that in the overlay"
        + ("" if changed else "; or launch from the checkout that it was built from")
    )


def short(revision: str) -> str:
    """Two trees with changes that no revision has may differ, whatever commit they began at."""
    changes = " with uncommitted changes" if revision.endswith(CHANGED) else ""
    return revision.removesuffix(CHANGED)[:12] + changes


def with_nodes(command: Sequence[str], said: Mapping[str, str], folder: Path) -> list[str]:
    """``command`` with what deepspeed has to know of the nodes; a host file goes below ``folder``.

    It reaches no host by that: each pod starts its own ranks, and only the length of the file counts.
    """
    words = list(command)
    script = next(i for i, word in enumerate(words) if word.startswith("pipeline/"))
    if Path(words[0]).name != "deepspeed":
        return words
    nodes, ranks = whole(said, "PET_NNODES", 1), whole(said, "PET_NPROC_PER_NODE", 0)
    options: list[str] = []
    if nodes > 1:
        index = "JOB_COMPLETION_INDEX" if "PET_NODE_RANK" not in said else "PET_NODE_RANK"
        node, address = whole(said, index, 0), said.get("PET_MASTER_ADDR")
        if not address or not ranks:
            missing = "PET_NPROC_PER_NODE" if address else "PET_MASTER_ADDR"
            raise Usage(f"PET_NNODES={nodes} and no {missing}; set it in the manifest")
        if node >= nodes:
            raise Usage(f"{index}={node}: wanted less than PET_NNODES={nodes}")
        hosts = folder / "hosts"
        hosts.write_text("".join(f"node-{i} slots={ranks}\n" for i in range(nodes)))
        options += ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)]
        options += ["--master_addr", address]
        options += ["--master_port", str(whole(said, "PET_MASTER_PORT", 29500))]
    elif ranks and "--num_accelerators" not in words and "--num_gpus" not in words:
        options += ["--num_accelerators", str(ranks)]
    return [*words[:script], *options, *words[script:]]


def whole(said: Mapping[str, str], name: str, default: int) -> int:
    """A variable that is a count, or not there."""
    text = said.get(name, str(default))
    if not text.isdigit():
        raise Usage(f"{name}={text!r}: wanted a whole number; mend it in the manifest")
    return int(text)


class Stage:
    """One stage and all its processes, which are a group of their own."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.status, self.sealed = command, folder / "status", folder / "sealed"
        self.group = 0
        self.asked = False  # to stop, from outside
        self.until: float | None = None  # all processes are gone by then
        self.killed_before = killed_for_memory()

    def run(self) -> int:
        """To its end; OSError for a command that cannot be started."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        own = {STATUS_FILE: str(self.status), SEALED_FILE: str(self.sealed)}
        child = subprocess.Popen(self.command, env=os.environ | own, start_new_session=True)
        self.group = child.pid
        if self.asked:  # before there was anyone to tell
            self.pass_on(signal.SIGTERM)
        child.returncode = self.wait(child.pid)
        return self.told(child.returncode)

    def hear(self, number: int, frame: object) -> None:
        self.asked = True
        self.stop()

    def stop(self) -> None:
        """Once: all processes hear it, and have so long to save their place."""
        if self.until is None:
            self.until = time.monotonic() + float(os.environ.get(GRACE, GRACE_SECONDS))
            self.pass_on(signal.SIGTERM)

    def pass_on(self, number: int) -> None:
        if self.group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, number)

    def wait(self, launcher: int) -> int:
        """Until no process of the stage is left; the launcher's exit code. As the first process of a
        container this one also buries what others leave."""
        code: int | None = None
        while code is None or any(self.living()):
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == launcher:
                    code = os.waitstatus_to_exitcode(status)
                    self.stop_what_is_left(code)
                if pid:
                    continue
            if self.until is not None and time.monotonic() > self.until:
                self.pass_on(signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        return code

    def stop_what_is_left(self, code: int) -> None:
        """Ranks whose launcher has gone are of no use, but where they still save their place."""
        if self.until is None and any(self.living()):
            print(f"entrypoint: the launcher ended ({code}) before its ranks", file=sys.stderr)
            self.stop()

    def living(self) -> Iterator[int]:
        """Processes of the group, other than those that are only waited for."""
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.group and state not in "ZX":
                    yield int(entry.parent.name)

    def told(self, code: int) -> int:
        """The exit code: what a rank said, or what became of the launcher."""
        sealed = Path(self.sealed.read_text()) if self.sealed.exists() else None
        if sealed is not None and (sealed / "manifest.json").exists():
            other = other_code(os.environ)
            last_words(f"sealed {sealed.name}" + (f"; {other}" if other else ""))
            return 0
        said = int(self.status.read_text()) if self.status.exists() else None
        if self.asked and said in (None, STOPPED):
            return STOPPED
        if said not in (None, STOPPED):
            return int(said or FAILED)
        if (killed := killed_for_memory() - self.killed_before) > 0:
            last_words(f"{NO_MEMORY}: the kernel killed {killed} process(es) of this stage")
            return KILLED
        if code == 0:
            print("entrypoint: ended without an error and sealed nothing", file=sys.stderr)
        return FAILED


def last_words(text: str) -> None:
    """What the pod's status shows; also printed where it is no success."""
    if not text.startswith("sealed"):
        print(f"entrypoint: {text}", file=sys.stderr)
    with contextlib.suppress(OSError):
        LAST_WORDS.write_text(text)


def killed_for_memory(files: Sequence[Path] = OUT_OF_MEMORY) -> int:
    """How many processes of this container the kernel has killed for its limit; 0 where it does not
    say. The runtime tells only of the first process, and ranks are others."""
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
