"""Stage 5a: the base model's own scores, shared by every job with the same base and suites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, write_atomic
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.evals.score import (
    Sampling,
    identity_of,
    load_for_inference,
    measure,
    read_items,
    respond,
    tally,
    write_rows,
)
from pipeline.graph import BaselineStep
from pipeline.model.base import load_tokenizer
from pipeline.stage import Context, main

CONFIDENCE = 0.95


def run(
    recipe: BaselineStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write responses.jsonl and scores.json under ``out``."""
    check_generation_prompt(recipe.chat)
    base = inputs["base"]
    items = read_items(recipe.suites, inputs)
    chat = Chat(load_tokenizer(base.folder), recipe.chat)
    rows = respond(
        load_for_inference(base.folder),
        chat,
        items,
        Sampling(recipe.batch_rows, recipe.temperature, recipe.seed),
        context,
        identity=identity_of("base", inputs),
        title="baseline",
    )
    metrics = measure(rows, CONFIDENCE)
    write_rows(out / "responses.jsonl", rows)
    scores = {"confidence": CONFIDENCE, "metrics": metrics, "responses": tally(rows)}
    write_atomic(out / "scores.json", json.dumps(scores, indent=1, sort_keys=True) + "\n")
    for name, metric in metrics.items():
        context.log(f"baseline: {name} {metric['value']:.3f} (n={metric['n']})")
    return {name: metric["value"] for name, metric in metrics.items()} | {"rows": len(rows)}


if __name__ == "__main__":
    import sys

    sys.exit(main("baseline", run))
