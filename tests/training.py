"""What the training tests share: a packed data set, a recipe, loss curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import conversations, seal_as
from rich.console import Console

from pipeline import pack, sft
from pipeline.artifact import Artifact
from pipeline.graph import PackStep
from pipeline.recipes import Batch, ChatRecipe, Execution, PackRecipe, SftRecipe
from pipeline.stage import Context

ROOT = Path(__file__).resolve().parents[1]
LORA = {"rank": 2, "targets": "mlp", "layers": {"first": 1, "last": 5}}
RECIPE: dict[str, Any] = {
    "lora": LORA,
    "optimizer": {"learning_rate": 0.02, "weight_decay": 0.01},
    "batch": {"rows": 4},
    "epochs": 10,
    "precision": "fp32",
}
KL = RECIPE | {"epochs": 2, "anchors": {"objective": "kl", "weight": 0.5}}


def make_pack(runs: Path, base: Artifact, epochs: int, rows: int = 4, anchors: int = 4) -> Artifact:
    prep = seal_as(runs, "prep", conversations(rows, anchors=anchors))
    step = PackStep(
        pack=PackRecipe(max_length=256), chat=ChatRecipe(), batch=Batch(rows=4), epochs=epochs
    )
    context = Context(scratch=runs, console=Console(quiet=True))

    def fill(out: Path) -> dict[str, Any]:
        return pack.run(step, {"base": base, "prep": prep}, out, context)

    return seal_as(runs, "pack", fill, step.model_dump(mode="json"))


Launch = Callable[[list[dict[str, Any]], dict[str, Artifact], Path], None]


def losses(folder: Path) -> list[float]:
    """Training loss of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def train(
    folder: Path, inputs: dict[str, Artifact], recipe: dict[str, Any], cache: Path, **execution: Any
) -> Path:
    """Train in one process; returns the folder of adapters and metrics."""
    (folder / "scratch").mkdir(parents=True)
    context = Context(
        scratch=folder / "scratch",
        cache_at=cache,
        execution=Execution(**execution),
        options={"engine": "single"},
        console=Console(quiet=True),
    )
    sft.run(SftRecipe.model_validate(recipe), inputs, folder, context)
    return folder
