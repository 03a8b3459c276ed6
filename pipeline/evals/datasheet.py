"""What a model was trained on, for the report: prep's sheet cut to what is shown, and its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.data.sheet import STEPS
from pipeline.evals.wording import DASH, clean, percent, shortened

Sheet = Mapping[str, Any]

MOST_CATEGORIES, QUOTED = 30, 200
STEP_WORDS = {
    "too_short": "too short",
    "over_long": "too long",
    "language": "in another language",
    "exact_duplicate": "the same as another",
    "near_duplicate": "nearly the same as another",
    "excluded": "in a set that the job leaves out",
    "contaminated": "in a suite that this report measures on",
    "over_most": "more than the job takes",
}
KIND_WORDS = {
    "refusal": "harmful requests, to be refused",
    "anchor": "harmless requests, to be answered as before",
    "answer": "questions with a given answer",
}
TARGET_WORDS = {
    "given": "that came with the row",
    "generic": "from a list of short refusals",
    "primer": "left open after a safety primer",
    "base": "by the base model itself",
}
TEXT_WORDS = {"prompt": "Request", "think": "Reasoning", "response": "Answer"}


def cut(sheet: Sheet) -> dict[str, Any]:
    """The part of sheet.json that report.json holds: of what was dropped the counts and a few rows for
    each reason, of many categories the largest."""
    return {
        "sources": {name: _cut_source(one) for name, one in sheet["sources"].items()},
        "kinds": sheet["kinds"],
        "checks": sheet["checks"],
        "dropped": dict(Counter(entry["why"] for entry in sheet["dropped"])),
    }


def _cut_source(one: Sheet) -> dict[str, Any]:
    ranked = sorted(one["categories"].items(), key=lambda item: (-item[1], item[0]))
    return {
        **{name: value for name, value in one.items() if name != "categories"},
        "steps": [step for step in one["steps"] if step["before"] != step["after"]],
        "categories": dict(ranked[:MOST_CATEGORIES]),
        "more_categories": len(ranked[MOST_CATEGORIES:]),
    }


def told(data: Sheet) -> dict[str, Any]:
    """What the page says of ``data`` (the block of that name in report.json)."""
    sources = [_source(name, one) for name, one in data["sources"].items()]
    totals = {name: sum(one[name] for one in sources) for name in ("read", "kept", "train", "dev")}
    steps = [name for name in STEPS if data["dropped"].get(name)]
    return {
        "sources": sources,
        "totals": totals,
        "dropped": [(STEP_WORDS[name], data["dropped"][name]) for name in steps],
        "contamination": data["checks"]["contamination"],
        "near": data["checks"]["near_duplicates"],
        "languages": data["checks"]["languages"],
        "kinds": [(KIND_WORDS.get(kind, kind), n) for kind, n in data["kinds"].items()],
    }


def _source(name: str, one: Sheet) -> dict[str, Any]:
    return {
        "name": name,
        "source": clean(one["source"]),
        "kind": KIND_WORDS.get(one["kind"], one["kind"]),
        "licence": one["licence"] or "not known",
        **{key: one[key] for key in ("read", "kept", "train", "dev", "repeat")},
        "bars": _bars(one),
        "targets": ", ".join(f"{n:,} {TARGET_WORDS.get(t, t)}" for t, n in one["targets"].items()),
        "categories": [(clean(c).replace("_", " "), n) for c, n in one["categories"].items()],
        "more_categories": one["more_categories"],
        "lengths": [_length(part, one["characters"][part]) for part in TEXT_WORDS],
        "examples": [_quoted(row, _category(row)) for row in one["examples"]],
        "harmful": any(row["harmful"] is not False for row in one["examples"]),
        "lost": [_quoted(row | {"response": None}, f": {because(row)}") for row in one["lost"]],
    }


def _bars(one: Sheet) -> list[dict[str, Any]]:
    """The waterfall of a source: rows left after each step that dropped some, and where they went."""
    most = max(1, one["read"])
    bars = [{"label": "read", "rows": one["read"], "less": 0, "kind": "read"}]
    bars += [
        {
            "label": STEP_WORDS.get(step["step"], step["step"]),
            "rows": step["after"],
            "less": step["before"] - step["after"],
            "kind": "step",
        }
        for step in one["steps"]
    ]
    bars.append(
        {"label": "trained on", "rows": one["kept"] - one["dev"], "less": 0, "kind": "kept"}
    )
    bars.append({"label": "held back", "rows": one["dev"], "less": 0, "kind": "kept"})
    return [
        bar | {"width": 100 * bar["rows"] / most, "lost": 100 * bar["less"] / most} for bar in bars
    ]


def _length(part: str, spread: Sheet | None) -> tuple[str, str]:
    if spread is None:
        return TEXT_WORDS[part], DASH
    return TEXT_WORDS[part], (
        f"{spread['median']:,.0f} in the middle, {spread['least']:,} to {spread['most']:,}"
        f" ({spread['rows']:,} rows)"
    )


def _category(row: Sheet) -> str:
    return f", {clean(row['category']).replace('_', ' ')}" if row["category"] else ""


def _quoted(row: Sheet, note: str) -> dict[str, str]:
    """A row as it is quoted: what it asked, what it answers, and a word on it."""
    return {
        "prompt": shortened(row["prompt"], QUOTED),
        "response": shortened(row["response"] or "", QUOTED),
        "note": f"{clean(row['id'])}{note}",
    }


def because(entry: Sheet) -> str:
    """Why one row was dropped."""
    why, other = str(entry["why"]), clean(entry.get("of", ""))
    if "suite" in entry:
        other = f"{other} of {clean(entry['suite'])}"
    if "shared" in entry:
        return f"shares with {other} the words \u201c{shortened(entry['shared'], 120)}\u201d"
    if why == "exact_duplicate":
        return f"asks the same as {other}"
    if "similarity" in entry:
        return f"asks nearly the same as {other}: {percent(entry['similarity'])} of their words"
    if why == "language":
        return f"reads as {clean(entry['language'])}"
    if "characters" in entry:
        return f"{STEP_WORDS[why]}: {entry['characters']:,} characters"
    return STEP_WORDS.get(why, why)
