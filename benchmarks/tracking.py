"""What a tracking server that is down costs a training, and whether it then gets all of it.

python benchmarks/tracking.py [--json FILE] [--rounds 3]

A tiny training by the real sft stage, in a process of its own, with the server down from before its
start until after its end: at its address nobody listens (closed), or something accepts and never
answers (silent). Counted is all time inside calls of tracking on the thread that trains, with the wait
for the recorder at the end; and how much of it this thread waited for a processor that others had.
Then a real MLflow server starts there, the same command is run again, which replays the spool, and the
server must hold what it holds of the same training with the server up (whose digest and speed are its
own). The worst of all rounds is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rounds import ROOT

TIMES = ("seconds", "tokens_per_second")
OWN_TAGS = ("untaxed.digest",)  # over the times above, among others
GOAL_SECONDS = 0.1
ROWS, EPOCHS = 40, 10


def cell(result: Path, arguments: list[str]) -> None:
    """The stage as it is started by hand, with a clock around each call of tracking."""
    from pipeline import sft
    from pipeline.recorder import Recorder
    from pipeline.tracking import Tracker

    spent: dict[str, float] = {}

    def clocked(owner: type, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any) -> Any:
            began, before = time.perf_counter(), queued()
            try:
                return call(*given)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
                spent["queued"] = spent.get("queued", 0.0) + queued() - before

        setattr(owner, name, timed)

    for owner, name in ((Tracker, "start"), (Tracker, "finish"), (Tracker, "fail")):
        clocked(owner, name)
    clocked(Recorder, "close")
    sys.argv = ["pipeline/sft.py", *arguments]
    code = sft.start()
    result.write_text(json.dumps(spent))
    sft.leave(code)


def queued() -> float:
    """Seconds that this thread has waited for a processor that others had."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def train(place: Path, uri: str) -> dict[str, float]:
    """Seconds by call; the stage says its own lines."""
    result = place / "spent.json"
    command = [sys.executable, __file__, "--cell", str(result), "--engine", "single"]
    command += ["--job", str(place / "job.yaml"), "--runs", str(place / "runs")]
    environment = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the training failed\n{done.stderr[-3000:]}")
    spent: dict[str, float] = json.loads(result.read_text())
    return spent


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Accepts (the system does) and never answers."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(64)
        yield


def held(runs: Path, uri: str) -> Any:
    """What the server holds: runs, parameters, tags, metrics by step, data sets, names of files."""
    from tracked import Records

    os.environ["MLFLOW_TRACKING_URI"] = uri
    records = Records(runs)
    found = json.loads(records.without_ids(records.runs()))
    for _, _, tags, _, metrics, _ in found:
        for tag in OWN_TAGS:
            tags.pop(tag, None)
        for name in metrics.keys() & set(TIMES):
            metrics[name] = [step for step, _ in metrics[name]]
    return {"runs": found, "files": sorted(records.files("sft"))}


def measure(folder: Path, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, what it cost and whether all is there); the control run goes first."""
    from killable import prepare
    from mlflow_server import Server

    (folder / "place").mkdir()
    place = prepare(folder / "place", ROWS, epochs=EPOCHS)
    shutil.rmtree(place / "runs" / ".mlflow-spool")  # what was recorded in the file beside it
    control: Any = None
    for number in range(-1, rounds):
        for case in ("up",) if number < 0 else ("closed", "silent"):
            runs = place / "runs"  # the same paths, which parameters and data sets may name
            shutil.copytree(runs, folder / "kept")
            server = Server(folder / f"server-{case}-{number}")
            if case == "up":
                server.start()
            with silent(server.port) if case == "silent" else contextlib.nullcontext():
                spent = train(place, server.uri)
            waits = len(list((runs / ".mlflow-spool").glob("*.json")))
            if case != "up":
                server.start()
                train(place, server.uri)
            found = held(runs, server.uri)
            left = len(list((runs / ".mlflow-spool").glob("*.json")))
            server.stop()
            control = found if control is None else control
            waited = spent.pop("queued")
            total = sum(spent.values())
            yield (
                case,
                {"seconds": spent, "total": total, "queued": waited, "spooled": waits}
                | {"left": left, "alike": found == control, "held": counts(found)},
            )
            shutil.rmtree(runs)
            (folder / "kept").rename(runs)


def counts(found: Any) -> dict[str, int]:
    return {
        "runs": len(found["runs"]),
        "params": sum(len(run[3]) for run in found["runs"]),
        "metric_points": sum(len(p) for run in found["runs"] for p in run[4].values()),
        "files": len(found["files"]),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_argument("--json", type=Path)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    given, more = options.parse_known_args()
    if given.cell:
        cell(given.cell, more)
        return
    if more:
        options.error(f"unknown: {' '.join(more)}")
    sys.path.insert(0, str(ROOT / "tests"))
    data: dict[str, Any] = {"goal_seconds": GOAL_SECONDS, "nice": os.nice(0), "cells": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case, one in measure(Path(folder), given.rounds):
            data["cells"].setdefault(case, {"runs": []})["runs"].append(one)
            print(
                f"{case}: {one['total']:.3f} s inside tracking, {one['queued']:.3f} s of them waiting for a"
                f" processor ({one['spooled']} events in the spool);"
                f" afterwards {one['left']} left, the server holds"
                f" {'the same as' if one['alike'] else 'NOT WHAT'} the control run has: {one['held']}",
                flush=True,
            )
    for cell_ in data["cells"].values():
        cell_["worst_seconds"] = max(one["total"] for one in cell_["runs"])
        cell_["worst_seconds_without_queue"] = max(o["total"] - o["queued"] for o in cell_["runs"])
    if given.json:
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    if not all(one["alike"] for cell_ in data["cells"].values() for one in cell_["runs"]):
        raise SystemExit("the server does not hold what the control run has")


if __name__ == "__main__":
    main()
