"""Stage 1: raw sources to conversations. Read, check, drop what should not be trained on, split.

Writes ``train.jsonl``, ``dev.jsonl``, and what was read, dropped and kept, and why, as
``sheet.json`` and ``sheet.md`` (data/sheet.py has their shape).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.data import languages
from pipeline.data.contamination import Suites, texts_of
from pipeline.data.dedup import exact_duplicates, near_duplicates, normalised
from pipeline.data.raw import GENERIC_REFUSALS
from pipeline.data.rows import Row, read_rows
from pipeline.data.sheet import STEPS, Part, as_markdown, contamination_check, make_sheet
from pipeline.data.tables import read_table
from pipeline.errors import DataError, RecipeError
from pipeline.graph import PrepStep
from pipeline.recipes import PrepRecipe, SourceRecipe, TrainSource
from pipeline.stage import Context, main

LEAST_ROWS_FOR_DEV = 10


def run(
    step: PrepStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write the conversations of ``step.prep``; inputs are ``rows.NAME`` for sources and excludes,
    and ``data.NAME`` for the evaluation suites that must not be trained on.

    Raises:
        DataError: a broken row, or a source of which nothing is left.
        RecipeError: a recipe that contradicts itself.
    """
    recipe = step.prep
    _check(recipe)
    parts = [Part(s, read_rows(inputs[f"rows.{s.name}"], s)) for s in recipe.sources]
    _drop_by_length(parts, recipe)
    _drop_foreign(parts, recipe.languages)
    _drop_repeats(parts, recipe.near_duplicate_threshold)
    excluded = {s.name: read_rows(inputs[f"rows.{s.name}"], s) for s in recipe.exclude}
    _drop_held_out("excluded", parts, excluded, recipe)
    suites = {s.name: read_rows(inputs[f"data.{s.name}"], s) for s in step.suites}
    ignored = _drop_held_out("contaminated", parts, suites, recipe)
    _drop_over_most(parts, recipe.seed)
    refusals = _generic_refusals()
    for part in parts:
        _check_left(part)
        part.targets = Counter(_origin(row, part.source, recipe) for row in part.rows)
        part.rows = [_with_target(row, part.source, recipe, refusals) for row in part.rows]
        _split_off_dev(part, recipe)
    train = [row for part in parts for row in _repeated(part)]
    dev = [_record(row, part.source) for part in parts for row in part.dev]
    _write(out / "train.jsonl", train)
    _write(out / "dev.jsonl", dev)
    against = None
    if recipe.decontaminate:
        asked: dict[str, SourceRecipe] = {suite.name: suite for suite in step.suites}
        sizes = {name: len(rows) for name, rows in suites.items()}
        against = contamination_check(asked, sizes, ignored, parts)
    _write_sheet(parts, _checks(recipe, against), out)
    return _said(parts, train, dev, recipe, context)


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
    least, most = recipe.min_prompt_characters, recipe.max_prompt_characters
    if least > most:
        raise RecipeError(
            f"prep.min_prompt_characters={least} is above prep.max_prompt_characters={most}, which"
            " keeps nothing; lower the one or raise the other"
        )
    if recipe.refusal_think is not None and not recipe.refusal_think.strip():
        raise RecipeError("prep.refusal_think is empty; leave it out for refusals without thinking")
    if recipe.refusal_response is not None and not recipe.refusal_response.strip():
        raise RecipeError("prep.refusal_response is empty; leave it out for varied refusals")
    _check_primer(recipe)


def _check_primer(recipe: PrepRecipe) -> None:
    primer = recipe.safety_primer
    if primer is None:
        return
    if not primer or primer != primer.strip():
        raise RecipeError(
            f"prep.safety_primer={primer!r} is empty or has white space around it, which would be"
            " trained too; give it words alone, or leave it out"
        )


def _drop_by_length(parts: Sequence[Part], recipe: PrepRecipe) -> None:
    for part in parts:
        sizes = {row.id: len(row.prompt) for row in part.rows}
        part.drop(
            {
                name: {"why": "too_short", "characters": size}
                for name, size in sizes.items()
                if size < recipe.min_prompt_characters
            }
        )
        part.drop(
            {
                name: {"why": "over_long", "characters": size}
                for name, size in sizes.items()
                if size > recipe.max_prompt_characters
            }
        )


def _drop_foreign(parts: Sequence[Part], wanted: Sequence[str]) -> None:
    if not wanted:
        return
    language = languages.foreign(wanted)
    for part in parts:
        found = {row.id: language(row.prompt) for row in part.rows}
        part.drop({i: {"why": "language", "language": code} for i, code in found.items() if code})


def _drop_repeats(parts: Sequence[Part], threshold: float) -> None:
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


def _drop_held_out(
    reason: str, parts: Sequence[Part], held_out: Mapping[str, Sequence[Row]], recipe: PrepRecipe
) -> dict[str, int]:
    """Drop rows that are contaminated by rows of ``held_out``; returns, for each of these sets, how
    many runs of words are its boilerplate."""
    suites = Suites({name: texts_of(rows) for name, rows in held_out.items()})
    texts = [
        text
        for part in parts
        for text in texts_of(part.rows, answered=part.source.kind != "anchor")
    ]
    why: dict[str, dict[str, Any]] = {}
    for hit in suites.find(texts, recipe.near_duplicate_threshold):
        entry = {"why": reason, "suite": hit.suite, "of": hit.of}
        if hit.similarity is None:
            why[texts[hit.index].id] = entry | {"shared": hit.shared}
        else:
            why[texts[hit.index].id] = entry | {"similarity": round(hit.similarity, 3)}
    for part in parts:
        part.drop(why)
    return suites.ignored


def _drop_over_most(parts: Sequence[Part], seed: int) -> None:
    """Where a source has too many rows, keep those first in turn: one of each category, then the
    next of each. Who comes first hangs on seed and prompt, not on the order of rows."""
    for part in parts:
        most = part.source.most
        if most is None or len(part.rows) <= most:
            continue
        taken: defaultdict[str | None, int] = defaultdict(int)
        turns: list[tuple[int, int, str]] = []
        for rank, name, category in sorted((_rank(r, seed), r.id, r.category) for r in part.rows):
            turns.append((taken[category], rank, name))
            taken[category] += 1
        late = sorted(turns)[most:]
        part.drop({name: {"why": "over_most"} for _, _, name in late})


def _rank(row: Row, seed: int) -> int:
    return _hash(seed, normalised(row.prompt))


def _check_left(part: Part) -> None:
    if part.rows:
        return
    counts = []
    for step in STEPS:
        entries = [entry for entry in part.dropped if entry["why"] == step]
        if entries:
            suites = dict.fromkeys(str(entry["suite"]) for entry in entries if "suite" in entry)
            by = f" by {', '.join(suites)}" if suites else ""
            counts.append(f"{len(entries)} {step.replace('_', ' ')}{by}")
    raise DataError(
        f"{part.source.source}: source {part.source.name} has no rows left of {len(part.dropped)}"
        f" ({', '.join(counts)}); give it other rows or take the source out"
    )


def _generic_refusals() -> list[str]:
    shown = f"samples/{GENERIC_REFUSALS.name}"
    return [str(record.values["response"]) for record in read_table(GENERIC_REFUSALS, shown)]


def _origin(row: Row, source: TrainSource, recipe: PrepRecipe) -> str:
    """Where the response comes from."""
    if source.kind == "anchor":
        return "base"
    if source.kind == "refusal" and recipe.safety_primer is not None:
        return "primer"
    return "generic" if row.response is None else "given"


def _with_target(row: Row, source: TrainSource, recipe: PrepRecipe, refusals: Sequence[str]) -> Row:
    """The row with what is to be learned: anchors have nothing yet, refusals all they need."""
    if source.kind == "anchor":
        return replace(row, response=None, think=None)
    if source.kind == "answer":
        return row
    if recipe.safety_primer is not None:
        return replace(row, response=None, think=recipe.safety_primer)
    response = row.response
    if response is None:
        response = recipe.refusal_response or refusals[_hash(row.id) % len(refusals)]
    return replace(row, response=response, think=row.think or recipe.refusal_think)


def _hash(*what: str | int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode("ascii")).digest()[:8], "big")


def _split_off_dev(part: Part, recipe: PrepRecipe) -> None:
    """Move the rows whose hash of seed and prompt is lowest to dev; one row at least stays."""
    size = len(part.rows)
    dev = math.floor(recipe.dev_fraction * size + 0.5)
    if recipe.dev_fraction > 0 and size >= LEAST_ROWS_FOR_DEV:
        dev = max(dev, 1)
    dev = min(dev, size - 1)
    ranked = sorted(part.rows, key=lambda row: (_rank(row, recipe.seed), row.id))
    chosen = {row.id for row in ranked[:dev]}
    part.dev = [row for row in part.rows if row.id in chosen]
    part.rows = [row for row in part.rows if row.id not in chosen]


def _repeated(part: Part) -> list[dict[str, Any]]:
    """The rows of a source, pass after pass; from the second pass on ids end in ``#PASS``."""
    made = []
    for again in range(1, part.source.repeat + 1):
        for row in part.rows:
            named = row if again == 1 else replace(row, id=f"{row.id}#{again}")
            made.append(_record(named, part.source))
    return made


def _record(row: Row, source: TrainSource) -> dict[str, Any]:
    record = {
        "id": row.id,
        "source": source.name,
        "kind": source.kind,
        "category": row.category,
        "messages": list(row.messages),
        "think": row.think,
        "response": row.response,
    }
    # a safety primer: thoughts that are only begun
    return record | ({"complete": False} if row.think and row.response is None else {})


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    # ASCII escapes: no reader can take a U+2028 inside a text for the end of a line.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _checks(recipe: PrepRecipe, against: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "near_duplicates": {
            "method": "Jaccard similarity of the word sets of two prompts, exact",
            "threshold": recipe.near_duplicate_threshold,
        },
        "contamination": against,
        "languages": {"wanted": list(recipe.languages), "method": languages.method()}
        if recipe.languages
        else None,
    }


def _write_sheet(parts: Sequence[Part], checks: dict[str, Any], out: Path) -> None:
    sheet = make_sheet(parts, checks)
    (out / "sheet.json").write_text(json.dumps(sheet, indent=1) + "\n", encoding="utf-8")
    (out / "sheet.md").write_text(as_markdown(sheet), encoding="utf-8")


def _said(
    parts: Sequence[Part],
    train: Sequence[dict[str, Any]],
    dev: Sequence[dict[str, Any]],
    recipe: PrepRecipe,
    context: Context,
) -> dict[str, Any]:
    """Say what became of each source; the facts of the stage."""
    counts = {part.source.name: part.counts() for part in parts}
    for name, one in counts.items():
        dropped = ", ".join(f"{one[s]} {s.replace('_', ' ')}" for s in STEPS if one[s])
        context.log(
            f"prep: {name}: {one['read']} read, {one['kept']} kept"
            f"{f' ({dropped})' if dropped else ''}, {one['train']} to train on, {one['dev']} in dev"
        )
    if not recipe.decontaminate:
        context.log("prep: not checked against the evaluation suites: prep.decontaminate is false")
    kinds = Counter(row["kind"] for row in train)
    return {
        "train": len(train),
        "dev": len(dev),
        "kinds": dict(kinds),
        "decontaminated": recipe.decontaminate,
        "dropped": {step: sum(one[step] for one in counts.values()) for step in STEPS},
        "sources": counts,
    }


if __name__ == "__main__":
    import sys

    sys.exit(main("prep", run))
