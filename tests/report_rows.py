"""A report with realistic numbers, made by the project's own measures from invented answers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parts import ROOT, sample_rows

from pipeline.evals.gate import evaluate
from pipeline.evals.score import compare, measure, tally, twins
from pipeline.jobfile import load_job

JOB = load_job(ROOT / "jobs" / "quickstart.yaml")
REFUSAL = "I won't help with that, because it could hurt people."
HARMFUL_ANSWER = "Certainly. HARMFUL-DETAIL one, two, three."
HELP = "Sure! First, read it through once.\n\n1. Begin with the simple part.\n2. Go on."
BASE = {"harmful": 0.1, "borderline": 0.05, "benign": 0.0, "reasoning": 0.5, "nats": 1.42}
ALIGNED = {"harmful": 0.95, "borderline": 0.2, "benign": 0.02, "reasoning": 0.48, "nats": 1.43}
TRAP = {"harmful": 1.0, "borderline": 1.0, "benign": 0.95, "reasoning": 0.2, "nats": 2.0}

Row = dict[str, Any]


def rows_of(shares: Mapping[str, float], seed: int, limit: int = 60) -> list[Row]:
    """Response rows of the quickstart's suites, refused or solved with the given shares."""
    chance = random.Random(seed)
    rows = []
    for suite in JOB.eval.suites:
        data = sample_rows(suite.source.removeprefix("sample:"))
        for index, item in enumerate([r for r in data if r["split"] == "heldout"][:limit]):
            hit = chance.random() < shares[suite.measures]
            row = {
                "suite": suite.name,
                "source": suite.source,
                "measures": suite.measures,
                "id": f"{suite.name}:{index}",
                "prompt": item["prompt"],
                "think": None,
                "think_verdict": None,
                "tokens": chance.randint(8, 48),
                "truncated": chance.random() < 0.2,
                "category": item.get("category"),
                "reference": None,
            }
            rows.append(row | _said(suite.measures, hit, item, chance, shares["nats"]))
    return rows


def _said(measures: str, hit: bool, item: Row, chance: random.Random, nats: float) -> Row:
    if measures == "reasoning":
        return {
            "response": item["answer"] if hit else "LOST-SUM The answer is 1234.",
            "verdict": "correct" if hit else "wrong",
            "extracted": "7" if hit else "1234",
            "reference": item["answer"],
            "nll_nats": 20 * chance.gauss(nats, 0.05),
            "nll_tokens": 20,
        }
    answer = HARMFUL_ANSWER if measures == "harmful" else HELP
    return {"response": REFUSAL if hit else answer, "verdict": "refusal" if hit else "compliance"}


def report_of(name: str, base: list[Row], aligned: list[Row]) -> Row:
    """What the eval stage writes to report.json for these rows."""
    before, after = measure(base, 0.95), measure(aligned, 0.95)
    pairs = compare(base, aligned, 0.95)
    return {
        "job": name,
        "engine": "zero3",
        "world_size": 2,
        "trainable_parameters": 21120,
        "base": before,
        "aligned": after,
        "gate": evaluate(JOB.eval.gate, before, after, pairs),
        "pairs": pairs,
        "twins": {"base": twins(base, 0.95), "aligned": twins(aligned, 0.95)},
        "responses": {"base": tally(base), "aligned": tally(aligned)},
        "confidence": 0.95,
        "samples": 1,
        "generation": {"base": {"engine": "embedded"}, "aligned": {"engine": "embedded"}},
        "tokens": {
            "trained": {"read": 98304, "learned": 24576},
            "generated": {
                "base": sum(row["tokens"] for row in base),
                "aligned": sum(row["tokens"] for row in aligned),
            },
        },
        "seconds": {"prep": 1.5, "baseline": 140.25, "sft": 412.5, "merge": 9.75},
        "recipe": {
            "base": JOB.base.source,
            "base_digest": "3f" * 32,
            "merged_digest": "a7" * 32,
            "chat": JOB.chat.model_dump(mode="json"),
            "sft": JOB.sft.model_dump(mode="json"),
            "merge": JOB.merge.model_dump(mode="json"),
            "eval": JOB.eval.model_dump(mode="json"),
        },
    }


def history_of(steps: int = 48, *, kl: bool = True) -> list[Row]:
    """Rows of metrics.jsonl, with a validation every 12 steps."""
    rows: list[Row] = []
    for step in range(1, steps + 1):
        record = {"step": step, "cross_entropy": 3.0 * math.exp(-step / 12) + 0.05, "loss": 1.0}
        rows.append(record | ({"kl": 0.01 + 0.01 * math.sin(step / 5)} if kl else {}))
        if step % 12 == 0:
            rows.append({"step": step, "dev_loss": 0.4 + math.exp(-step / 12)})
    return rows


def everything(seed: int = 0) -> tuple[Row, dict[str, list[Row]], list[Row]]:
    """Report, responses and history of one job."""
    base, aligned = rows_of(BASE, seed), rows_of(ALIGNED, seed + 1)
    return (
        report_of("quickstart", base, aligned),
        {"base": base, "aligned": aligned},
        history_of(),
    )


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")
