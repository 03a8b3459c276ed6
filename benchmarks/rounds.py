"""What benchmarks share: systems in turn, each run in new processes, medians with their spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def run_ranks(
    cell: Sequence[str],
    spec: Mapping[str, Any],
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """``python CELL SPEC.json`` in new processes, a core or more for each; what every rank leaves in
    result-RANK.json beside SPEC.json, a folder that is also ``scratch`` in it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps({**spec, "scratch": scratch}))
        command = [sys.executable, *cell, str(path)]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command[1:1] = [*launcher, str(processes)]
        threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
        own = {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), **(environment or {})}
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        found = sorted(Path(scratch).glob("result-*.json"))
        if done.returncode or len(found) != processes:
            raise SystemExit(f"{' '.join(cell)}: failed\n{done.stderr[-3000:]}")
        return [json.loads(file.read_text()) for file in found]


def load(path: Path) -> dict[str, Any]:
    """What ``in_turn`` has written to ``path`` before, or nothing yet."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    return data


def in_turn(
    path: Path,
    data: dict[str, Any],
    rounds: int,
    names: Sequence[str],
    run: Callable[[str], dict[str, Any]],
    report: Callable[[dict[str, Any]], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Every name once a round, every other round backwards; runs that ``data`` has are not repeated.

    After each run ``data`` with its ``report`` is written to ``path``, and ``line`` of it printed.
    """
    width = max(len(name) for name in names)
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            runs = data["runs"].setdefault(name, [])
            if len(runs) > number:
                continue
            runs.append(run(name))
            data |= report(data)
            path.write_text(json.dumps(data, indent=1) + "\n")
            print(f"round {number + 1} {name:<{width}} {line(runs[-1])}", flush=True)


def print_ratios(data: Mapping[str, Any]) -> None:
    for name, value in data.get("ratios", {}).items():
        print(f"{name:<60} {value:.2f}")
