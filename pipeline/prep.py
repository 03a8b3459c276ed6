"""Stage 1: raw sources to conversations. Read, check, drop repeats and held-out prompts, split.

Writes ``train.jsonl``, ``dev.jsonl`` and ``sheet.json``: what was read, dropped and kept, and why.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.data.dedup import exact_duplicates, near_duplicates, normalised, overlaps
from pipeline.data.raw import GENERIC_REFUSALS
from pipeline.data.rows import Row, read_rows
from pipeline.data.tables import read_table
from pipeline.errors import DataError, RecipeError
from pipeline.recipes import PrepRecipe, TrainSource
from pipeline.stage import Context, main

LEAST_ROWS_FOR_DEV = 10


@dataclass
class _Part:
    """One source on its way through the stage."""

    source: TrainSource
    rows: list[Row]
    read: int
    dropped: list[dict[str, Any]] = field(default_factory=list)
    dev: list[Row] = field(default_factory=list)

    def drop(self, why: Mapping[str, dict[str, Any]]) -> None:
        """Drop the rows whose ids are in ``why``, remembering the reason."""
        self.dropped += [{"id": r.id} | why[r.id] for r in self.rows if r.id in why]
        self.rows = [r for r in self.rows if r.id not in why]

    def count(self, reason: str) -> int:
        return sum(entry["why"] == reason for entry in self.dropped)


def run(
    recipe: PrepRecipe, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write the conversations of ``recipe``; inputs are ``rows.NAME`` for sources and excludes.

    Raises:
        DataError: a broken row, or a source of which nothing is left.
        RecipeError: a recipe that contradicts itself.
    """
    _check(recipe)
    parts = []
    for source in recipe.sources:
        rows = read_rows(inputs[f"rows.{source.name}"], source)
        parts.append(_Part(source, rows, len(rows)))
    _drop_long(parts, recipe.max_prompt_characters)
    _drop_repeats(parts, recipe.near_duplicate_threshold)
    _drop_excluded(parts, recipe, inputs)
    refusals = _generic_refusals()
    for part in parts:
        _check_left(part)
        part.rows = [_with_target(row, part.source, recipe, refusals) for row in part.rows]
        _split_off_dev(part, recipe)
    train = [row for part in parts for row in _repeated(part)]
    dev = [_record(row, part.source) for part in parts for row in part.dev]
    _write(out / "train.jsonl", train)
    _write(out / "dev.jsonl", dev)
    sheet = {part.source.name: _summary(part) for part in parts}
    dropped = [entry for part in parts for entry in part.dropped]
    text = json.dumps({"sources": sheet, "dropped": dropped}, indent=1)
    (out / "sheet.json").write_text(text + "\n", encoding="utf-8")
    for name, one in sheet.items():
        context.log(
            f"prep: {name}: {one['read']} read, {one['kept']} kept, {one['train']} to train on,"
            f" {one['dev']} in dev"
        )
    counts = {name: {k: v for k, v in s.items() if type(v) is int} for name, s in sheet.items()}
    kinds = Counter(row["kind"] for row in train)
    return {"train": len(train), "dev": len(dev), "kinds": dict(kinds), "sources": counts}


def _check(recipe: PrepRecipe) -> None:
    names = [source.name for source in (*recipe.sources, *recipe.exclude)]
    for name, times in Counter(names).items():
        if times > 1:
            raise RecipeError(
                f"prep: {times} entries of sources and exclude are called {name}; rename all but one"
            )
    if recipe.near_duplicate_threshold == 0.0:
        raise RecipeError(
            "prep.near_duplicate_threshold=0 would make every pair a duplicate; wanted above 0"
            " (1 drops prompts of the same words only)"
        )
    if recipe.refusal_think is not None and not recipe.refusal_think.strip():
        raise RecipeError("prep.refusal_think is empty; leave it out for refusals without thinking")
    if recipe.refusal_response is not None and not recipe.refusal_response.strip():
        raise RecipeError("prep.refusal_response is empty; leave it out for varied refusals")


def _drop_long(parts: Sequence[_Part], most: int) -> None:
    for part in parts:
        long = [row for row in part.rows if len(row.prompt) > most]
        part.drop({r.id: {"why": "over_long", "characters": len(r.prompt)} for r in long})


def _drop_repeats(parts: Sequence[_Part], threshold: float) -> None:
    """Keep the first of all rows, over all sources, that ask the same."""
    for reason in ("exact_duplicate", "near_duplicate"):
        rows = [row for part in parts for row in part.rows]
        prompts = [row.prompt for row in rows]
        if reason == "exact_duplicate":
            found = exact_duplicates(prompts)
        else:
            found = near_duplicates(prompts, threshold)
        why = {
            rows[m.index].id: {
                "why": reason,
                "of": rows[m.of].id,
                "similarity": round(m.similarity, 3),
            }
            for m in found
        }
        for part in parts:
            part.drop(why)


def _drop_excluded(
    parts: Sequence[_Part], recipe: PrepRecipe, inputs: Mapping[str, Artifact]
) -> None:
    """Drop a row as soon as one of its user turns is, or nearly is, an excluded prompt."""
    held = [
        (row.id, turn)
        for source in recipe.exclude
        for row in read_rows(inputs[f"rows.{source.name}"], source)
        for turn in row.user_turns
    ]
    turns = [(row.id, turn) for part in parts for row in part.rows for turn in row.user_turns]
    found = overlaps(
        [turn for _, turn in turns],
        [turn for _, turn in held],
        recipe.near_duplicate_threshold,
    )
    why = {
        turns[m.index][0]: {
            "why": "excluded",
            "of": held[m.of][0],
            "similarity": round(m.similarity, 3),
        }
        for m in found
    }
    for part in parts:
        part.drop(why)


def _check_left(part: _Part) -> None:
    if not part.rows:
        reasons = Counter(entry["why"] for entry in part.dropped)
        counts = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in reasons.items())
        raise DataError(
            f"{part.source.source}: source {part.source.name} has no rows left of {part.read}"
            f" ({counts}); give it other rows or take the source out"
        )


def _generic_refusals() -> list[str]:
    shown = f"samples/{GENERIC_REFUSALS.name}"
    return [str(record.values["response"]) for record in read_table(GENERIC_REFUSALS, shown)]


def _with_target(row: Row, source: TrainSource, recipe: PrepRecipe, refusals: Sequence[str]) -> Row:
    """The row with what is to be learned: anchors have nothing yet, refusals all they need."""
    if source.kind == "anchor":
        return replace(row, response=None, think=None)
    if source.kind == "answer":
        return row
    response = row.response
    if response is None:
        response = recipe.refusal_response or refusals[_hash(row.id) % len(refusals)]
    return replace(row, response=response, think=row.think or recipe.refusal_think)


def _hash(*what: str | int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode("ascii")).digest()[:8], "big")


def _split_off_dev(part: _Part, recipe: PrepRecipe) -> None:
    """Move the rows whose hash of seed and prompt is lowest to dev; one row at least stays."""
    size = len(part.rows)
    dev = math.floor(recipe.dev_fraction * size + 0.5)
    if recipe.dev_fraction > 0 and size >= LEAST_ROWS_FOR_DEV:
        dev = max(dev, 1)
    dev = min(dev, size - 1)
    ranked = sorted(part.rows, key=lambda row: (_hash(recipe.seed, normalised(row.prompt)), row.id))
    chosen = {row.id for row in ranked[:dev]}
    part.dev = [row for row in part.rows if row.id in chosen]
    part.rows = [row for row in part.rows if row.id not in chosen]


def _repeated(part: _Part) -> list[dict[str, Any]]:
    """The rows of a source, pass after pass; from the second pass on ids end in ``#PASS``."""
    made = []
    for again in range(1, part.source.repeat + 1):
        for row in part.rows:
            named = row if again == 1 else replace(row, id=f"{row.id}#{again}")
            made.append(_record(named, part.source))
    return made


def _record(row: Row, source: TrainSource) -> dict[str, Any]:
    return {
        "id": row.id,
        "source": source.name,
        "kind": source.kind,
        "category": row.category,
        "messages": list(row.messages),
        "think": row.think,
        "response": row.response,
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    # ASCII escapes: no reader can take a U+2028 inside a text for the end of a line.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _summary(part: _Part) -> dict[str, Any]:
    kept = part.rows + part.dev
    categories = Counter(row.category or "none" for row in kept)
    lengths = {
        "prompt": [len(row.prompt) for row in kept],
        "think": [len(row.think) for row in kept if row.think is not None],
        "response": [len(row.response) for row in kept if row.response is not None],
    }
    return {
        "kind": part.source.kind,
        "read": part.read,
        "over_long": part.count("over_long"),
        "exact_duplicate": part.count("exact_duplicate"),
        "near_duplicate": part.count("near_duplicate"),
        "excluded": part.count("excluded"),
        "kept": len(kept),
        "dev": len(part.dev),
        "train": len(part.rows) * part.source.repeat,
        "repeat": part.source.repeat,
        "categories": dict(sorted(categories.items())),
        "characters": {name: _spread(values) for name, values in lengths.items()},
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "rows": len(values),
        "least": min(values),
        "median": statistics.median(values),
        "mean": round(statistics.fmean(values), 1),
        "most": max(values),
    }


if __name__ == "__main__":
    import sys

    sys.exit(main("prep", run))
