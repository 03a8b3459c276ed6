"""Starting one stage as a child: a fork, or ``deepspeed`` / ``torchrun`` / python for training."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.errors import RecipeError, Stopped
from pipeline.stage import ROOT, STATUS_FILE, main

Started = tuple[int, Callable[[], int | None]]  # process id (it leads its group), and how to wait
ENGINES = ("zero3", "zero2", "zero1", "zero3-offload", "fsdp", "ddp", "single")


def engine_of(options: argparse.Namespace) -> str:
    """The engine that trains; RecipeError for a count of processes that it cannot have."""
    if options.nproc < 1:
        raise RecipeError(f"--nproc {options.nproc}: wanted at least 1")
    engine: str = options.engine or ("zero3" if options.nproc > 1 else "single")
    if engine == "single" and options.nproc > 1:
        raise RecipeError(f"--engine single with --nproc {options.nproc}; use fsdp, ddp or zero3")
    return engine


def command_of(name: str, job: Path, options: argparse.Namespace) -> list[str]:
    """The command line of one stage, as a person would type it."""
    script = str(ROOT / "pipeline" / f"{name}.py")
    arguments = ["--job", str(job), "--runs", str(options.runs)]
    for assignment in options.set:
        arguments += ["--set", assignment]
    if options.rebuild:
        arguments.append("--rebuild")
    if name != "sft":
        return [sys.executable, script, *arguments]
    engine = engine_of(options)
    if engine == "single":
        return [sys.executable, script, *arguments, "--engine", "single"]
    launcher = Path(sys.executable).parent
    port = str(_free_port())
    if engine.startswith("zero"):
        config = str(ROOT / "ds_configs" / f"{engine}.json")
        count = ["--num_accelerators", str(options.nproc), "--master_port", port]
        return [str(launcher / "deepspeed"), *count, script, *arguments, "--ds", config]
    count = ["--nproc-per-node", str(options.nproc), "--master-port", port]
    return [str(launcher / "torchrun"), *count, script, *arguments, "--engine", engine]


def launch_stage(name: str, job: Path, options: argparse.Namespace) -> int:
    """Run one stage to its end; returns its exit code (0, 65, 78, 143 or 1).

    A stop (SIGTERM, Ctrl-C) is passed on to every process of the stage, and waits for all of them:
    ``deepspeed`` itself dies of it while its ranks still write a checkpoint. The ranks say their
    exit code in a file, since launchers replace it by their own.
    """
    environment = os.environ.copy()
    cores = len(os.sched_getaffinity(0))
    processes = options.nproc if name == "sft" else 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        environment[STATUS_FILE] = str(status)
        running: list[int] = []
        asked: list[int] = []

        def forward(number: int, frame: object) -> None:
            asked.append(number)
            for group in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGTERM)

        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            start = _spawn if name == "sft" or _accelerators() else _fork
            pid, wait = start(name, command_of(name, job, options), environment)
            running.append(pid)
            if asked:  # while it was starting
                forward(asked[0], None)
            code = wait()
            while _lives(pid):
                time.sleep(0.05)
        except (EOFError, OSError):
            if not asked:
                raise
            return Stopped.exit_code  # Ctrl-C reached the process that forks
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if status.exists():
            return int(status.read_text())
        if asked:  # also where the stage had just come to its end, or had not begun
            return Stopped.exit_code
        return 0 if code == 0 else 1


def _lives(group: int) -> bool:
    """Whether a process of this group is left, other than one that nobody has waited for."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own = entry.read_text().rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                return True
    return False


def _spawn(name: str, command: list[str], environment: dict[str, str]) -> Started:
    """A process of its own, and of its own group."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    return child.pid, child.wait


def _fork(name: str, command: list[str], environment: dict[str, str]) -> Started:
    """The same, forked from a process that has imported what stages import (``pipeline/warm.py``)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.warm"])
    ready, there = context.Pipe(duplex=False)
    child = context.Process(target=_stage, args=(name, command[2:], environment, there))
    stated = dict(os.environ)
    os.environ.update(environment)  # the server is started with the first stage; OpenMP reads it
    try:
        child.start()
    finally:
        os.environ.clear()
        os.environ.update(stated)
    there.close()
    with contextlib.suppress(EOFError):  # it died at once; its exit code says so
        ready.recv()  # it leads its own group now

    def wait() -> int | None:
        child.join()
        return child.exitcode

    assert child.pid is not None
    return child.pid, wait


def _stage(name: str, argv: list[str], environment: dict[str, str], ready: Connection) -> None:
    """What ``python pipeline/NAME.py ARGV`` does, in a fork."""
    os.setsid()
    ready.send(None)
    ready.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(name, importlib.import_module(f"pipeline.{name}").run, argv))


def _accelerators() -> bool:
    """True where there is a GPU: libraries may touch it when imported, and no fork survives that."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
