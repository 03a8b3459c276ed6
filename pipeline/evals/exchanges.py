"""Prompts with both answers as the report shows them, and which of them to read first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evals.pictures import Rows
from pipeline.evals.score import REFUSED, UNANSWERED
from pipeline.evals.wording import clipped, shortened

MOST_EXAMPLES = 12


@dataclass(frozen=True)
class Answer:
    """One answer as it is shown. ``judges``: what further judges say of it, by name."""

    verdict: str
    response: str
    think: str
    tokens: int | None
    truncated: bool
    judges: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Exchange:
    """One prompt and what base and aligned model answered."""

    id: str
    suite: str
    measures: str
    category: str
    summary: str
    prompt: str
    reference: str
    base: Answer | None
    aligned: Answer
    sample: int = 0

    @property
    def changed(self) -> bool:
        return self.base is None or self.base.verdict != self.aligned.verdict


@dataclass(frozen=True)
class Examples:
    """Answers of one kind: how many there are of how many, and the first of them."""

    title: str
    note: str
    total: int
    of: int
    shown: tuple[Exchange, ...]


def exchanges(base: Rows, aligned: Rows) -> list[Exchange]:
    """Every prompt with both answers, in the order of the aligned rows."""
    before = {_key(row): row for row in base}
    found = []
    for row in aligned:
        other = before.get(_key(row))
        found.append(
            Exchange(
                id=clipped(_named(row)),
                suite=clipped(row["suite"]),
                measures=str(row["measures"]),
                category=clipped(row.get("category") or "").replace("_", " "),
                summary=shortened(row["prompt"]),
                prompt=clipped(row["prompt"]),
                reference=clipped(row.get("reference") or ""),
                base=_answer(other) if other else None,
                aligned=_answer(row),
                sample=int(row.get("sample", 0)),
            )
        )
    return found


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["suite"], row["id"], row.get("sample", 0)


def _named(row: Mapping[str, Any]) -> str:
    """The row, and which of its samples where that is not the first."""
    return f"{row['id']}, sample {row['sample'] + 1}" if row.get("sample") else str(row["id"])


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(
        verdict=str(row["verdict"]),
        response=clipped(row.get("response") or ""),
        think=clipped(row.get("think") or ""),
        tokens=row.get("tokens"),
        truncated=bool(row.get("truncated")),
        judges=tuple(
            (clipped(name), clipped(said["verdict"]))
            for name, said in (row.get("judges") or {}).items()
        ),
    )


def examples(found: Sequence[Exchange]) -> dict[str, Examples]:
    """The answers that count against the aligned model; what the base did better comes first."""
    kinds = {
        "complied": ("harmful", "Harmful requests that the aligned model answered"),
        "refused": ("benign", "Ordinary requests that it refused or left unanswered"),
        "borderline": (
            "borderline",
            "Harmless requests that sound harmful, refused or left unanswered",
        ),
        "lost": ("reasoning", "Problems that the base solved and the aligned model did not"),
    }
    result = {}
    for name, (measures, title) in kinds.items():
        rows = [one for one in found if one.measures == measures]
        if not rows:
            continue
        bad = [one for one in rows if _counts_against(one)]
        bad.sort(key=lambda one: _bad_too(one.base, measures))
        note = "" if measures == "reasoning" else "What the base did better comes first."
        shown = tuple(bad[:MOST_EXAMPLES])
        result[name] = Examples(title, note, len(bad), len(rows), shown)
    return result


def _counts_against(one: Exchange) -> bool:
    if one.measures == "reasoning":
        solved = one.base is not None and one.base.verdict == "correct"
        return solved and one.aligned.verdict != "correct"
    return _bad_too(one.aligned, one.measures)


def _bad_too(answer: Answer | None, measures: str) -> bool:
    """Whether ``answer`` complies with a harmful request, or refuses a harmless one or says nothing."""
    if answer is None or measures == "reasoning":
        return False
    if measures == "harmful":
        return answer.verdict == "compliance"
    return answer.verdict in REFUSED | UNANSWERED
