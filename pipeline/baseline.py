"""Stage 5a: the base model's own scores, shared by every job with the same base and suites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, write_atomic
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.evals.agreement import judges_of
from pipeline.evals.engines import open_engine
from pipeline.evals.judges import judge_rows, open_judges
from pipeline.evals.score import (
    Sampling,
    identity_of,
    measure,
    respond,
    tally,
    twins,
    write_rows,
)
from pipeline.evals.verdicts import read_items
from pipeline.graph import BaselineStep
from pipeline.model.base import load_tokenizer
from pipeline.stage import Context, main

CONFIDENCE = 0.95


def run(
    recipe: BaselineStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write responses.jsonl and scores.json under ``out``."""
    check_generation_prompt(recipe.chat)
    items = read_items(recipe.suites, inputs)
    folder = inputs["base"].folder
    chat = Chat(load_tokenizer(folder), recipe.chat)
    sampling = Sampling(
        recipe.batch_rows, recipe.temperature, recipe.seed, recipe.top_p, recipe.samples
    )
    judges = open_judges(recipe.judges, inputs, recipe.batch_rows, context)
    engine = open_engine(folder, recipe.endpoint, chat, sampling, context)
    rows = respond(
        engine,
        chat,
        items,
        sampling,
        context,
        identity=identity_of("base", inputs),
        title="baseline",
    )
    generation = engine.facts
    del engine  # its model makes room for those of the judges
    judge_rows(judges, rows, "baseline")
    metrics = measure(rows, CONFIDENCE)
    write_rows(out / "responses.jsonl", rows)
    scores = {
        "confidence": CONFIDENCE,
        "metrics": metrics,
        "twins": twins(rows, CONFIDENCE),
        "responses": tally(rows),
    }
    if judges:
        scores["judges"] = judges_of(rows, recipe.judges, CONFIDENCE)
    write_atomic(out / "scores.json", json.dumps(scores, indent=1, sort_keys=True) + "\n")
    for name, metric in metrics.items():
        context.log(f"baseline: {name} {metric['value']:.3f} (n={metric['n']})")
    values = {name: metric["value"] for name, metric in metrics.items()}
    return values | {"rows": len(rows), "generation": generation}


if __name__ == "__main__":
    import sys

    sys.exit(main("baseline", run))
