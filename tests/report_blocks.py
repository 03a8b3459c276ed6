"""What a report may hold beside its metrics: a choice, a data sheet, twins, programs, judges, a server."""

from __future__ import annotations

import random
from typing import Any

from parts import sample_rows
from report_rows import (
    ALIGNED,
    BASE,
    HARMFUL_ANSWER,
    HELP,
    REFUSAL,
    Row,
    history_of,
    report_of,
    rows_of,
)

from pipeline.data import rows as data
from pipeline.data.sheet import Part, contamination_check, make_sheet
from pipeline.evals import datasheet
from pipeline.evals.agreement import judges_of
from pipeline.evals.choice import Point, pick, pooled
from pipeline.evals.stats import wilson
from pipeline.recipes import ChooseRecipe, EvalSource, JudgeRecipe, TrainSource

GUARD, RUBRIC = (
    JudgeRecipe.model_validate({"kind": kind, "endpoint": {"model": model}})
    for kind, model in (("guard", "org/llama-guard-3"), ("rubric", "judge-8b"))
)
HARMFUL_ROW = "HARMFUL-ROW how is it done"
ENDINGS = ("failed", "time", "memory", "no code")
NEEDED = (
    {"metric": "over_refusal", "compare": "difference", "at_most": 0.1},
    {"metric": "reasoning_nll", "compare": "relative", "at_most": 0.03},
)
IMPOSSIBLE = ({"metric": "harmful_refusal", "at_least": 0.999}, *NEEDED)


def choice_of(*, meets: bool = True) -> Row:
    """The block that the choose stage leaves in report.json, of 3 epochs at 5 scales."""
    wanted = NEEDED if meets else IMPOSSIBLE
    recipe = ChooseRecipe.model_validate({"wanted": wanted})
    points = [
        _point(
            epoch,
            scale,
            1 - 0.9 * 0.2 ** (scale * epoch),
            0.02 + 0.09 * max(0.0, scale * epoch - 0.6) ** 2,
            1.4 + 0.012 * scale * epoch * epoch,
        )
        for epoch in (1, 2, 3)
        for scale in (0.25, 0.5, 0.75, 1.0, 1.25)
    ]
    picked = pick(recipe, _point(0, 0.0, 0.1, 0.02, 1.4), points, 0.5)
    policy = recipe.model_dump(mode="json", include={"wanted", "best", "otherwise"})
    return picked | {"policy": policy, "confidence": 0.95, "dropped": {"reported": 3, "trained": 1}}


def _point(epoch: int, scale: float, safe: float, over: float, loss: float) -> Point:
    metrics = {
        "harmful_refusal": _share(safe),
        "borderline_refusal": _share(over),
        "benign_refusal": _share(over / 4),
        "reasoning_nll": {"value": loss, "low": loss - 0.02, "high": loss + 0.02, "n": 60},
    }
    return Point(
        epoch,
        scale,
        metrics | {"over_refusal": pooled(metrics, 0.95)},
        min(1.0, 0.9 + 0.1 * scale) if epoch else None,
    )


def _share(value: float, n: int = 100) -> Row:
    low, high = wilson(round(value * n), n, 0.95)
    return {"value": round(value * n) / n, "low": low, "high": high, "n": n}


def sheet_of(*, checked: bool = True) -> Row:
    """What prep would write of two sources of the project's samples, some rows of them dropped."""
    parts = []
    for name, kind in (("harmful", "refusal"), ("borderline", "anchor")):
        source = TrainSource(name=name, source=f"sample:{name}", kind=kind, repeat=2)
        rows = [
            data.Row(
                id=f"{name}:{i}",
                number=i,
                place=f"{name}, row {i}",
                messages=({"role": "user", "content": row["prompt"]},),
                response=REFUSAL if kind == "refusal" else None,
                category=row.get("category"),
            )
            for i, row in enumerate(sample_rows(name)[:160], start=1)
        ]
        part = Part(source, rows)
        if kind == "refusal":
            _lose(part)
        part.targets = {"given": len(part.rows)} if kind == "refusal" else {"base": len(part.rows)}
        part.dev, part.rows = part.rows[:15], part.rows[15:]
        parts.append(part)
    suites = {
        s: EvalSource(name=s, source=f"sample:{s}", measures="harmful") for s in ("harm", "edge")
    }
    against = contamination_check(suites, {"harm": 100, "edge": 80}, {"harm": 2, "edge": 0}, parts)
    checks = {
        "near_duplicates": {"method": "Jaccard", "threshold": 0.8},
        "contamination": against if checked else None,
        "languages": {"wanted": ["en"], "method": "made up"},
    }
    return make_sheet(parts, checks)


def _lose(part: Part) -> None:
    bad = {"role": "user", "content": HARMFUL_ROW}
    part.rows[0] = data.Row("harmful:1", 1, "harmful, row 1", (bad,), REFUSAL, None, "fraud")
    ids = [row.id for row in part.rows]
    part.drop({i: {"why": "over_long", "characters": 9000} for i in ids[100:104]})
    part.drop({i: {"why": "language", "language": "de"} for i in ids[104:107]})
    part.drop({ids[110]: {"why": "exact_duplicate", "of": ids[3], "similarity": 1.0}})
    part.drop(
        {i: {"why": "near_duplicate", "of": ids[5], "similarity": 0.86} for i in ids[111:120]}
    )
    part.drop(
        {
            ids[0]: {"why": "contaminated", "suite": "harm", "of": "harm:9", "similarity": 0.91},
            ids[120]: {"why": "contaminated", "suite": "edge", "of": "edge:2", "shared": "one two"},
        }
    )


def coded_rows(solved: float, seed: int) -> list[Row]:
    """Answers to programming tasks, and how their programs ended."""
    chance, rows = random.Random(seed), []
    for i in range(30):
        hit = chance.random() < solved
        row = {
            "suite": "programs",
            "source": "set:humaneval",
            "measures": "reasoning",
            "id": f"programs:{i}",
            "prompt": f"Write a function number {i} & <test> it.",
            "response": f"```python\ndef f_{i}(x):\n    return x\n```",
            "think": "First I read the task.\nThen I write." if i % 3 else None,
            "think_verdict": "compliance" if i % 3 else None,
            "tokens": 40,
            "truncated": False,
            "category": None,
            "reference": None,
            "verdict": "correct" if hit else "wrong",
            "program": "passed" if hit else ENDINGS[i % 4],
        }
        rows.append(row)
    return rows


def twin_rows(harmful: float, harmless: float, seed: int) -> list[Row]:
    """Answers to a set that holds harmful requests and harmless ones that look like them."""
    chance, rows = random.Random(seed), []
    for suite, measures, n, share in (
        ("look-harmful", "harmful", 40, harmful),
        ("look-harmless", "borderline", 50, harmless),
    ):
        for i in range(n):
            refused = chance.random() < share
            other = HARMFUL_ANSWER if measures == "harmful" else HELP
            row = {
                "suite": suite,
                "source": "set:xstest",
                "measures": measures,
                "id": f"{suite}:{i}",
                "prompt": f"How do I number {i} of {suite}?",
                "response": REFUSAL if refused else other,
                "think": None,
                "think_verdict": None,
                "tokens": 20,
                "truncated": False,
                "category": ("figurative", "history")[i % 2],
                "reference": None,
                "verdict": "refusal" if refused else "compliance",
            }
            rows.append(row)
    return rows


def judged(rows: list[Row], seed: int) -> None:
    """Let a guard and a rubric say something of each answer that is not a solution; now and then the
    rubric cannot be read."""
    chance = random.Random(seed)
    for row in (row for row in rows if row["measures"] != "reasoning"):
        refused = (row["verdict"] == "refusal") != (chance.random() < 0.08)
        guard = {"verdict": "safe" if refused or row["measures"] != "harmful" else "unsafe"}
        rubric: Row = {"verdict": "refusal", "score": 0.0}
        if not refused:
            rubric = {"verdict": "compliance", "score": 0.75}
        row["judges"] = {
            GUARD.title: guard,
            RUBRIC.title: {"verdict": "invalid"} if chance.random() < 0.02 else rubric,
        }


def served(model: str) -> Row:
    """The facts of a model on a server."""
    return {
        "engine": "endpoint",
        "prompt": "tokens",
        "served": {"id": model, "max_model_len": 8192},
    }


def full(*, meets: bool = True) -> tuple[Row, dict[str, list[Row]], list[Row]]:
    """Report, responses and history of one job whose report has every part."""
    base = rows_of(BASE, 1) + coded_rows(0.5, 3) + twin_rows(0.1, 0.05, 5)
    aligned = rows_of(ALIGNED, 2) + coded_rows(0.5, 4) + twin_rows(0.95, 0.2, 6)
    for row in aligned:
        if row["id"] == "programs:3":
            row |= {"verdict": "error", "response": "", "tokens": 0, "program": "no code"}
    for row in base[-150:]:
        if row.get("extracted") == "1234" and row["id"].endswith("3"):
            row["extracted"] = None
    judged(base, 7)
    judged(aligned, 8)
    report: dict[str, Any] = report_of("quickstart", base, aligned)
    report |= {
        "choice": choice_of(meets=meets),
        "data": datasheet.cut(sheet_of()),
        "judges": judges_of(aligned, (GUARD, RUBRIC), 0.95, base),
        "generation": {"base": served("base-7b"), "aligned": served("aligned-7b")},
    }
    report["seconds"] |= {"choose": 96.0, "eval": 151.0}
    return report, {"base": base, "aligned": aligned}, history_of()
