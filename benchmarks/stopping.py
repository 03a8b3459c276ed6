"""Seconds from SIGTERM to the end of ``untaxed run``, while it trains.

python benchmarks/stopping.py --json FILE --runs RUNS [--job JOB] [--engine zero3 fsdp] [--times 5]

RUNS holds all sealed stages before the training of JOB (default: the quickstart, as ``make demo``
leaves them); nothing there is changed. Two processes; the signal comes at a random moment of the five
seconds after a checkpoint was written, and the same command goes on from there. A time ends when no
process of the run is left: a checkpoint of the last step is written by then, and the exit code is 143.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import ROOT, spread

WAIT_SECONDS = 300.0
EVERY = 5.0  # checkpoint_seconds
AFTER = ("sft", "merge", "baseline", "eval")


def link_inputs(runs: Path, job: Path, folder: Path) -> None:
    """A workspace of links to what was sealed before training."""
    from pipeline.graph import Workspace, plan_job
    from pipeline.jobfile import load_job

    planned = plan_job(load_job(job), Workspace(runs), adopt=False)
    wanted = {path for stage in planned.values() for path in stage.upstream.values()}
    for path in wanted - {stage.folder for name, stage in planned.items() if name in AFTER}:
        shutil.copytree(path, folder / path.name, copy_function=os.link)


def checkpoints(runs: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):  # the run renames it when training has ended
        return {path.name for path in runs.glob(".sft-*.scratch/checkpoint-*")}
    return set()


def stop_once(command: list[str], runs: Path, random_: random.Random) -> float:
    """Start, wait for a new checkpoint and a moment more, stop; seconds from signal to end."""
    before, log = checkpoints(runs), runs / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        try:
            give_up = time.monotonic() + WAIT_SECONDS
            while not checkpoints(runs) - before:
                if child.poll() is not None or time.monotonic() > give_up:
                    raise SystemExit(f"no checkpoint was written; said:\n{log.read_text()[-3000:]}")
                time.sleep(0.02)
            time.sleep(random_.uniform(0.0, EVERY))
            began = time.monotonic()
            child.send_signal(signal.SIGTERM)
            code = child.wait(WAIT_SECONDS)
            seconds = time.monotonic() - began
        finally:
            if child.poll() is None:  # its ranks are in sessions of their own: it ends them
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(WAIT_SECONDS)
                child.kill()
    said = log.read_text()
    last = re.search(r"stopped on request after step (\d+)", " ".join(said.split()))
    if code != 143 or last is None:
        raise SystemExit(f"exit code {code}, wanted 143; said:\n{said[-3000:]}")
    if not any(name.startswith(f"checkpoint-{int(last[1]):08d}-") for name in checkpoints(runs)):
        raise SystemExit(f"no checkpoint of step {last[1]}, the last; said:\n{said[-3000:]}")
    return seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--runs", type=Path, default=Path("runs/demo"))
    options.add_argument("--job", type=Path, default=ROOT / "jobs" / "quickstart.yaml")
    options.add_argument("--engine", nargs="+", default=["zero3", "fsdp"])
    options.add_argument("--times", type=int, default=5)
    given = options.parse_args()
    data: dict[str, dict[str, object]] = {"cells": {}}
    for engine in given.engine:
        with tempfile.TemporaryDirectory(dir=given.runs.resolve().parent) as folder:
            runs = Path(folder)
            link_inputs(given.runs, given.job, runs)
            command = [sys.executable, "-m", "pipeline.cli", "run", "--runs", str(runs)]
            command += ["--job", str(given.job.resolve()), "--nproc", "2", "--engine", engine]
            command += ["--set", f"execution.checkpoint_seconds={EVERY}"]
            times: list[float] = []
            for number in range(given.times):
                times.append(stop_once(command, runs, random.Random(number)))
                print(f"{engine} {number + 1}: {times[-1]:.2f} s", flush=True)
        data["cells"][engine] = {"seconds": spread(times), "stops": len(times)}
        given.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
