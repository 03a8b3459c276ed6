"""Starting one stage as a child: plain python, or ``deepspeed`` / ``torchrun`` for training."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.errors import RecipeError, Stopped
from pipeline.stage import ROOT, STATUS_FILE

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
        child = subprocess.Popen(
            command_of(name, job, options), env=environment, start_new_session=True
        )

        asked: list[int] = []

        def forward(number: int, frame: object) -> None:
            asked.append(number)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)

        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
            while _lives(child.pid):
                time.sleep(0.05)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
