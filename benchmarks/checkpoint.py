"""What checkpoints cost the step loop: real training with a checkpoint every few seconds, and without.

python benchmarks/checkpoint.py --json FILE --runs RUNS [--engine zero3 fsdp] [--rounds 3]
    [--steps 40] [--every 5] [--job JOB]

RUNS holds the sealed base and pack of JOB (default: the quickstart, as ``make demo`` leaves them).
Two processes. One round trains ``--steps`` steps with checkpoints and as many without, in turn (every
other round backwards). "Stopped" is the time inside Checkpoints.save, on the rank where that is longest,
over the time of the loop. FILE is added to engine by engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEVER = 1e9


class EnoughStepsError(Exception):
    """The wanted number of steps has been measured."""


def cell(path: Path) -> None:
    """One rank: all rounds of one engine."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from pipeline import sft
    from pipeline.graph import Workspace, plan_job
    from pipeline.jobfile import load_job
    from pipeline.train.world import init_world

    spec = json.loads(path.read_text())
    world = init_world(always=True, leave=sft.leave_for)
    assert world is not None
    planned = plan_job(load_job(Path(spec["job"])), Workspace(Path(spec["runs"])), adopt=False)
    inputs = planned["sft"].open_inputs()
    runs = []
    for number in range(spec["rounds"]):
        for every in (spec["every"], NEVER)[:: 1 if number % 2 == 0 else -1]:
            folder = path.parent / f"{number}-{every:g}"
            if world.rank == 0:
                (folder / "out").mkdir(parents=True)
            world.barrier()
            runs.append(measure(spec, planned["sft"].recipe, inputs, folder, world, every))
    (path.parent / f"result-{world.rank}.json").write_text(json.dumps(runs))
    world.close()


def measure(
    spec: dict[str, Any], recipe: Any, inputs: Any, folder: Path, world: Any, every: float
) -> dict[str, Any]:
    """One run of ``steps`` steps; the first is not in the measured time."""
    from rich.console import Console

    from pipeline import sft
    from pipeline.recipes import Execution
    from pipeline.stage import Context
    from pipeline.train.checkpoint import Checkpoints

    ends: list[float] = []
    stopped: list[float] = []
    save = Checkpoints.save

    class Timed(Context):
        def metric(self, step: int, values: Any) -> None:
            ends.append(time.monotonic())
            if len(ends) > spec["steps"]:
                raise EnoughStepsError

    def timed_save(self: Checkpoints, position: Any) -> None:
        began = time.monotonic()
        save(self, position)
        stopped.append(time.monotonic() - began)

    zero = spec["engine"].startswith("zero")
    context = Timed(
        scratch=folder,
        cache_at=Path(spec["cache"]),
        execution=Execution(checkpoint_seconds=every),
        world=world,
        options={
            "ds": ROOT / "ds_configs" / f"{spec['engine']}.json" if zero else None,
            "engine": None if zero else spec["engine"],
        },
        console=Console(quiet=True),
    )
    Checkpoints.save = timed_save  # type: ignore[method-assign]
    try:
        sft.run(recipe, inputs, folder / "out", context)
    except EnoughStepsError:
        pass
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    files = [file for f in folder.glob("checkpoint-*") for file in f.iterdir()]
    return {
        "every": every,
        "steps": len(ends) - 1,
        "seconds": ends[-1] - ends[0],
        "stopped_seconds": stopped,
        "bytes": sum(f.stat().st_size for f in files) // max(1, len({f.parent for f in files})),
    }


def summary(ranks: list[list[dict[str, Any]]], every: float) -> dict[str, Any]:
    """Medians over the rounds of one engine."""
    pairs = list(zip(*ranks, strict=True))
    on = [max(pair, key=lambda run: sum(run["stopped_seconds"])) for pair in pairs]
    with_, without = ([run for run in on if run["every"] == e] for e in (every, NEVER))
    shares = [sum(run["stopped_seconds"]) / run["seconds"] for run in with_]
    steps = [[run["seconds"] / run["steps"] for run in runs] for runs in (with_, without)]
    single = [seconds for run in with_ for seconds in run["stopped_seconds"]]
    return {
        "rounds": len(with_),
        "checkpoints": len(single),
        "bytes": with_[0]["bytes"],
        "stopped_share": {
            "median": statistics.median(shares),
            "low": min(shares),
            "high": max(shares),
        },
        "stopped_ms_each": {"median": 1e3 * statistics.median(single), "high": 1e3 * max(single)},
        "seconds_a_step": statistics.median(steps[0]),
        "seconds_a_step_without": statistics.median(steps[1]),
        "step_ratio": statistics.median(a / b for a, b in zip(*steps, strict=True)),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path)
    options.add_argument("--runs", type=Path, default=Path("runs/demo"))
    options.add_argument("--job", type=Path, default=ROOT / "jobs" / "quickstart.yaml")
    options.add_argument("--engine", nargs="+", default=["zero3", "fsdp"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--every", type=float, default=5.0)
    options.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.cell:
        cell(given.cell)
        return
    if given.json is None:
        options.error("--json is missing")
    data = json.loads(given.json.read_text()) if given.json.exists() else {"cells": {}}
    for engine in given.engine:
        with tempfile.TemporaryDirectory() as scratch:
            spec = {"engine": engine, "cache": str(Path(scratch) / "cache")}
            spec |= {"job": str(given.job.resolve()), "runs": str(given.runs.resolve())}
            spec |= {n: getattr(given, n) for n in ("rounds", "steps", "every")}
            path = Path(scratch) / "spec.json"
            path.write_text(json.dumps(spec))
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            done = subprocess.run(
                [sys.executable, *launcher, __file__, "--cell", str(path)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{engine}: failed\n{done.stderr[-3000:]}")
            ranks = [json.loads((path.parent / f"result-{r}.json").read_text()) for r in (0, 1)]
        found = data["cells"][engine] = summary(ranks, given.every)
        given.json.write_text(json.dumps(data, indent=1) + "\n")
        print(
            f"{engine}: the loop stood still {found['stopped_share']['median']:.2%} of its time"
            f" ({found['checkpoints']} checkpoints of {found['bytes'] / 1e6:.2f} MB,"
            f" {found['stopped_ms_each']['median']:.0f} ms each); a step takes"
            f" {found['step_ratio']:.3f} x as long as without"
        )


if __name__ == "__main__":
    main()
