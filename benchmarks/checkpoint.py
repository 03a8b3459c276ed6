"""What checkpoints cost the step loop: real training with a checkpoint every few seconds, and without.

python benchmarks/checkpoint.py --json FILE --runs RUNS [--engine zero3 fsdp] [--rounds 3]
    [--steps 15] [--every 5] [--job JOB]

RUNS holds the sealed base and pack of JOB (default: the quickstart, as ``make demo`` leaves them).
Two processes, one training: a round is ``--steps`` steps with checkpoints and as many without, every
other round the other way about. "Stopped" is the time inside Checkpoints.save, on the rank where that
is longest, over the time of the loop. FILE is added to engine by engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rounds import ROOT, run_ranks, spread

NEVER = 1e9
WARM = 3  # steps before the first round


class EnoughStepsError(Exception):
    """All rounds have been measured."""


def plan(spec: dict[str, Any]) -> list[float]:
    """``checkpoint_seconds`` of each window of steps."""
    pairs = ((spec["every"], NEVER), (NEVER, spec["every"]))
    return [every for number in range(spec["rounds"]) for every in pairs[number % 2]]


def cell(path: Path) -> None:
    """One rank of one engine."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rich.console import Console

    from pipeline import sft
    from pipeline.graph import Workspace, plan_job
    from pipeline.jobfile import load_job
    from pipeline.recipes import Execution
    from pipeline.stage import Context
    from pipeline.train.checkpoint import Checkpoints

    spec = json.loads(path.read_text())
    world = sft.join(always=True)
    assert world is not None
    stage = plan_job(load_job(Path(spec["job"])), Workspace(Path(spec["runs"])), adopt=False)["sft"]
    ends: list[float] = []
    windows: list[dict[str, Any]] = []
    save = Checkpoints.save

    class Timed(Context):
        def metric(self, step: int, values: Any) -> None:
            ends.append(time.monotonic())
            measured = len(ends) - WARM
            if windows and measured % spec["steps"] == 0:
                windows[-1]["seconds"] = ends[-1] - ends[-1 - spec["steps"]]
            if measured >= 0 and measured % spec["steps"] == 0:
                if len(windows) == len(plan(spec)):
                    raise EnoughStepsError
                every = plan(spec)[len(windows)]
                windows.append({"every": every, "stopped": []})
                self.execution = Execution(checkpoint_seconds=every)

    def timed_save(self: Checkpoints, position: Any) -> None:
        began = time.monotonic()
        save(self, position)
        windows[-1]["stopped"].append(time.monotonic() - began)

    Checkpoints.save = timed_save  # type: ignore[method-assign]
    zero = spec["engine"].startswith("zero")
    context = Timed(
        scratch=path.parent,
        execution=Execution(checkpoint_seconds=NEVER),
        world=world,
        options={
            "ds": ROOT / "ds_configs" / f"{spec['engine']}.json" if zero else None,
            "engine": None if zero else spec["engine"],
        },
        console=Console(quiet=True),
    )
    (path.parent / "out").mkdir(exist_ok=True)
    with contextlib.suppress(EnoughStepsError):
        sft.run(stage.recipe, stage.open_inputs(), path.parent / "out", context)
    world.barrier()
    files = [file for f in path.parent.glob("checkpoint-*") for file in f.iterdir()]
    size = sum(f.stat().st_size for f in files) // max(1, len({f.parent for f in files}))
    result = {"windows": windows, "bytes": size}
    (path.parent / f"result-{world.rank}.json").write_text(json.dumps(result))
    world.close()


def summary(ranks: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Medians over the rounds of one engine."""
    pairs = list(zip(*(rank["windows"] for rank in ranks), strict=True))
    slowest = [max(pair, key=lambda window: sum(window["stopped"])) for pair in pairs]
    with_ = [window for window in slowest if window["every"] != NEVER]
    without = [window for window in slowest if window["every"] == NEVER]
    shares = [sum(window["stopped"]) / window["seconds"] for window in with_]
    single = [seconds for window in with_ for seconds in window["stopped"]]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(with_, without, strict=True)]
    return {
        "rounds": len(with_),
        "steps_a_round": steps,
        "checkpoints": len(single),
        "bytes": ranks[0]["bytes"],
        "stopped_share": spread(shares),
        "stopped_ms_each": spread([1e3 * seconds for seconds in single]),
        "seconds_a_step_without": spread([window["seconds"] / steps for window in without]),
        "step_ratio": spread(ratios),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path)
    options.add_argument("--runs", type=Path, default=Path("runs/demo"))
    options.add_argument("--job", type=Path, default=ROOT / "jobs" / "quickstart.yaml")
    options.add_argument("--engine", nargs="+", default=["zero3", "fsdp"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=15)
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
        spec = {"engine": engine, "job": str(given.job.resolve())}
        spec["runs"] = str(given.runs.resolve())
        spec |= {n: getattr(given, n) for n in ("rounds", "steps", "every")}
        ranks = run_ranks([__file__, "--cell"], spec, 2)
        found = data["cells"][engine] = summary(ranks, given.steps)
        given.json.write_text(json.dumps(data, indent=1) + "\n")
        print(
            f"{engine}: the loop stood still {found['stopped_share']['median']:.2%} of its time"
            f" ({found['checkpoints']} checkpoints of {found['bytes'] / 1e6:.2f} MB,"
            f" {found['stopped_ms_each']['median']:.0f} ms each); a step takes"
            f" {found['step_ratio']['median']:.3f} x as long as without"
        )


if __name__ == "__main__":
    main()
