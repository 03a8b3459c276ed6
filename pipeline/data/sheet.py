"""The data sheet of a prep stage: what was read, dropped at each step and kept, and why.

``sheet.json`` (and ``sheet.md``, the same to read):

- ``version``: of this shape.
- ``sources``: for each by name ``source``, ``kind``, ``licence`` (null: not known), ``read``, ``kept``
  (= ``dev`` + one pass of train), ``dev``, ``train`` (all ``repeat`` passes), ``steps``: for each of
  STEPS, in order, ``step``, ``before`` and ``after`` in rows; ``categories``: rows kept of each;
  ``targets``: rows kept whose response is ``given``, ``generic`` (of the project), to come from the
  ``base``, or left to the model after a safety ``primer``; ``characters``: of ``prompt``, ``think``
  and ``response`` the ``rows`` that have one, ``least``, ``median``, ``mean``, ``most`` (null: none
  has); ``examples``: ``id``, ``category``, ``prompt``, ``response``, cut after EXAMPLE_CHARACTERS, and
  ``harmful``: true, false, or null where nothing says so; ``lost``: the same of the first rows dropped
  at each step, with what ``dropped`` says of them.
- ``kinds``: rows of train by kind.
- ``checks``: ``near_duplicates`` (``method``, ``threshold``); ``contamination``: null when switched
  off, else ``words`` of a run, ``short_prompt_words``, what is ``common``, and ``suites``: for each
  ``source``, ``licence``, ``rows``, ``ignored_runs``, ``contaminated`` (rows dropped for it);
  ``languages``: null, or ``wanted`` and ``method``.
- ``dropped``: for each row ``id`` and ``why`` (one of STEPS); with it ``characters`` (too_short,
  over_long), ``language``, ``of`` and ``similarity`` (duplicates, excluded, contaminated), ``suite``
  and, in place of similarity, ``shared`` words (excluded, contaminated).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data import contamination
from pipeline.data.rows import Row, spread
from pipeline.data.sets import find_set
from pipeline.recipes import SourceRecipe, TrainSource

VERSION = 1
STEPS = (
    "too_short",
    "over_long",
    "language",
    "exact_duplicate",
    "near_duplicate",
    "excluded",
    "contaminated",
    "over_most",
)
EXAMPLES = 3
EXAMPLE_CHARACTERS = 200
SHOWN_DROPPED = 200
SAMPLE_LICENCE = "Apache-2.0"
UNKNOWN = "not known"
HARMFUL = {"refusal": True, "anchor": False}


@dataclass
class Part:
    """One source on its way through prep."""

    source: TrainSource
    rows: list[Row]
    dropped: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    dev: list[Row] = field(default_factory=list)
    targets: Counter[str] = field(default_factory=Counter)

    def drop(self, why: Mapping[str, dict[str, Any]]) -> None:
        """Drop the rows whose ids are in ``why``, remembering the reason."""
        gone = [r for r in self.rows if r.id in why]
        self.dropped += [{"id": r.id} | why[r.id] for r in gone]
        self.lost += [_example(r, self.source) | why[r.id] for r in gone[:EXAMPLES]]
        self.rows = [r for r in self.rows if r.id not in why]

    @property
    def kept(self) -> list[Row]:
        return self.rows + self.dev

    def counts(self) -> dict[str, int]:
        """Rows read, dropped at each step, kept, and where they went."""
        dropped = Counter(entry["why"] for entry in self.dropped)
        return {
            "read": len(self.kept) + len(self.dropped),
            **{step: dropped[step] for step in STEPS},
            "kept": len(self.kept),
            "dev": len(self.dev),
            "train": len(self.rows) * self.source.repeat,
            "repeat": self.source.repeat,
        }


def licence_of(source: SourceRecipe) -> str | None:
    """The licence of a set that the project knows."""
    if source.source.startswith("sample:"):
        return SAMPLE_LICENCE
    return find_set(source.public).licence if source.public else None


def contamination_check(
    suites: Mapping[str, SourceRecipe],
    rows: Mapping[str, int],
    ignored: Mapping[str, int],
    parts: Sequence[Part],
) -> dict[str, Any]:
    """What was compared with; the entry ``contamination`` of ``checks``."""
    found = Counter(
        entry["suite"] for part in parts for entry in part.dropped if entry["why"] == "contaminated"
    )
    return {
        "words": contamination.RUN,
        "short_prompt_words": contamination.LEAST,
        "common": f"runs in more than {contamination.COMMON_ROWS} rows and"
        f" {contamination.COMMON_SHARE:.0%} of a suite are boilerplate and ignored",
        "suites": {
            name: {
                "source": suite.source,
                "licence": licence_of(suite),
                "rows": rows[name],
                "ignored_runs": ignored[name],
                "contaminated": found[name],
            }
            for name, suite in suites.items()
        },
    }


def make_sheet(parts: Sequence[Part], checks: dict[str, Any]) -> dict[str, Any]:
    """The content of ``sheet.json``."""
    kinds: Counter[str] = Counter()
    for part in parts:
        kinds[part.source.kind] += part.counts()["train"]
    return {
        "version": VERSION,
        "sources": {part.source.name: _of_source(part) for part in parts},
        "kinds": dict(kinds),
        "checks": checks,
        "dropped": [entry for part in parts for entry in part.dropped],
    }


def _of_source(part: Part) -> dict[str, Any]:
    source, counts, steps = part.source, part.counts(), []
    left = counts["read"]
    for step in STEPS:
        steps.append({"step": step, "before": left, "after": left - counts[step]})
        left -= counts[step]
    texts = {name: [getattr(row, name) for row in part.kept] for name in ("think", "response")}
    texts["prompt"] = [row.prompt for row in part.kept]
    return {
        "source": source.source,
        "kind": source.kind,
        "licence": licence_of(source),
        **{name: counts[name] for name in ("read", "kept", "dev", "train", "repeat")},
        "steps": steps,
        "categories": dict(sorted(Counter(row.category or "none" for row in part.kept).items())),
        "targets": dict(part.targets),
        "characters": {
            name: _spread([len(text) for text in texts[name] if text is not None])
            for name in ("prompt", "think", "response")
        },
        "examples": [_example(row, source) for row in spread(part.kept, EXAMPLES)],
        "lost": part.lost,
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


def _example(row: Row, source: TrainSource) -> dict[str, Any]:
    cut = row.response and row.response[:EXAMPLE_CHARACTERS]
    return {
        "id": row.id,
        "category": row.category,
        "prompt": row.prompt[:EXAMPLE_CHARACTERS],
        "response": cut,
        "harmful": HARMFUL.get(source.kind),
    }


def as_markdown(sheet: Mapping[str, Any]) -> str:
    """The sheet for people."""
    checks = sheet["checks"]
    lines = ["# Data sheet", ""]
    head = ["source", "kind", "licence", "read", *STEPS, "kept", "dev", "train"]
    body = [
        [
            name,
            one["kind"],
            one["licence"] or UNKNOWN,
            one["read"],
            *(step["before"] - step["after"] for step in one["steps"]),
            *(one[column] for column in ("kept", "dev", "train")),
        ]
        for name, one in sheet["sources"].items()
    ]
    lines += ["Rows read, dropped at each step from left to right, and kept.", ""]
    lines += [*_table(head, body), "", "## Checks", ""]
    near = checks["near_duplicates"]
    lines.append(f"- Near-duplicates: {near['method']}, from {near['threshold']} on.")
    languages, against = checks["languages"], checks["contamination"]
    if languages is None:
        lines.append("- Languages: not filtered.")
    else:
        lines.append(f"- Languages: {', '.join(languages['wanted'])} ({languages['method']}).")
    if against is None:
        lines.append("- **Contamination: not checked (prep.decontaminate is false).**")
    else:
        lines.append(
            f"- Contamination: near-duplicate prompts, shared runs of {against['words']} words, and"
            f" whole prompts of {against['short_prompt_words']} words or more; {against['common']}."
        )
        columns = ("source", "rows", "ignored_runs", "contaminated")
        body = [
            [name, one["licence"] or UNKNOWN, *(one[column] for column in columns)]
            for name, one in against["suites"].items()
        ]
        lines += ["", *_table(["suite", "licence", *columns], body)]
    for name, one in sheet["sources"].items():
        lines += ["", f"## {name}", "", f"`{one['source']}`", ""]
        lines.append(f"- Categories: {_listed(one['categories'])}")
        lines.append(f"- Responses: {_listed(one['targets'])}")
        for part, spread_of in one["characters"].items():
            lines.append(f"- Characters of {part}: {_listed(spread_of) if spread_of else 'none'}")
        for example in one["examples"]:
            mark = {True: " (harmful)", False: "", None: " (may be harmful)"}[example["harmful"]]
            answer = "" if example["response"] is None else f" >>> {_line(example['response'])}"
            lines.append(f"- {example['id']}{mark}: {_line(example['prompt'])}{answer}")
    dropped = sheet["dropped"]
    shown = f"The first {SHOWN_DROPPED} of {len(dropped)} rows." if dropped else "Nothing."
    lines += ["", "## Dropped", "", shown, ""]
    for entry in dropped[:SHOWN_DROPPED]:
        rest = {name: value for name, value in entry.items() if name not in ("id", "why")}
        lines.append(f"- {entry['id']}: {entry['why']}{f' ({_listed(rest)})' if rest else ''}")
    return "\n".join(lines) + "\n"


def _table(head: Sequence[object], body: Iterable[Sequence[object]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _line(text: str) -> str:
    """On one line, and as code: what rows say is no markup of this page."""
    return "`` " + " ".join(text.split()).replace("`", "'") + " ``"
