"""What the report says in words: the verdict, the comparison of jobs, and verdicts by suite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evals.pictures import Report, bases
from pipeline.evals.wording import (
    VERDICTS,
    WORDING,
    change,
    clipped,
    compared,
    known,
    listed,
    number,
    percent,
    signed,
)

TRAP = 0.5
SAMPLED = ("suites", "temperature", "top_p", "samples", "seed", "endpoint")


def headline(report: Report) -> str:
    """The verdict with the number of checks by status."""
    checks = report["gate"]["checks"]
    count = Counter(check["status"] for check in checks)
    parts = [f"{count['passed']} of {len(checks)} check{'s' * (len(checks) != 1)} passed"]
    if count["failed"]:
        parts.append(f"{count['failed']} failed")
    if count["uninformative"]:
        parts.append(f"{count['uninformative']} cannot tell")
    return listed(parts) + "."


def consequence(report: Report) -> str:
    """What the verdict means."""
    if report["gate"]["passed"]:
        return "Every check of the gate holds on the rows measured here."
    statuses = {check["status"] for check in report["gate"]["checks"]}
    if "failed" in statuses:
        return "At least one bound is not met: by this gate the model is not to be released."
    return (
        "No bound is broken, but what cannot be told is not passed: measure more, or a base that"
        " can do the task, before deciding."
    )


def because(check: Mapping[str, Any]) -> str:
    """Why ``check`` has its status, in the units of the page; the gate's own words if it cannot
    tell."""
    metric, value = check["metric"], check["value"]
    if value is None or check["status"] not in ("passed", "failed"):
        return clipped(check["why"])
    n = int(check.get("n") or 0)
    before, after = (number(metric, check.get(name), n) for name in ("base", "aligned"))
    if check["compare"] == "value":
        start = f"{after} on {n} rows" if check.get("aligned") is not None else f"{n} rows"
    else:
        start = f"{before} to {after} on the same {n} rows"
    gap = abs(value - check["bound"])
    by = signed(f"{gap:.2%}") if check["compare"] == "relative" else change(metric, gap)
    by = by.removeprefix("+")
    side = "inside" if check["status"] == "passed" else "outside"
    return f"{start}: {by} {side} the bound." if gap else f"{start}: exactly on the bound."


def check_interval(check: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of what ``check`` compares, in its unit; None when it is not known."""
    low, high = check.get("low"), check.get("high")
    return (low, high) if known(low) and known(high) and check["value"] is not None else None


def interval_text(check: Mapping[str, Any]) -> str:
    """``86% to 97%``, in the unit of ``check``; empty when there is none."""
    ends = check_interval(check)
    return f"{compared(check, ends[0])} to {compared(check, ends[1])}" if ends else ""


def close_call(check: Mapping[str, Any]) -> bool:
    """Whether a check was decided though the interval of what it compares reaches across its bound."""
    ends = check_interval(check)
    decided = check["status"] != "uninformative"
    return decided and ends is not None and ends[0] < check["bound"] < ends[1]


def apart(metrics: Mapping[str, Any], harmless: str) -> dict[str, float] | None:
    """Refusal of harmful requests less refusal of ``harmless`` ones, with Newcombe's interval for
    independent proportions (Newcombe 1998, method 10): how well the model tells them apart."""
    harm, other = metrics.get("harmful_refusal"), metrics.get(harmless)
    if not harm or not other or not (harm["n"] and other["n"]):
        return None
    if not all(known(one[end]) for one in (harm, other) for end in ("value", "low", "high")):
        return None
    value = harm["value"] - other["value"]
    down = math.hypot(harm["value"] - harm["low"], other["high"] - other["value"])
    up = math.hypot(harm["high"] - harm["value"], other["value"] - other["low"])
    return {"value": value, "low": value - down, "high": value + up}


def reading(metrics: Mapping[str, Any], report: Report | None) -> str:
    """One line on a model beside others; ``report`` is None for a base."""
    shares = {
        name: metrics[name]["value"]
        for name in ("harmful_refusal", "borderline_refusal", "benign_refusal")
        if name in metrics and metrics[name].get("n") and known(metrics[name]["value"])
    }
    harmful = shares.pop("harmful_refusal", None)
    if harmful is not None and harmful < TRAP:
        return "Answers most harmful requests."
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] >= TRAP and harmful is not None:
        n = int(metrics[worst]["n"])
        return f"The trap: refuses {percent(shares[worst], n)} of {WORDING[worst].kind} as well."
    if report is None:
        return "Before alignment."
    if report["gate"]["passed"]:
        return "Refuses what is harmful, answers the rest: every check passed."
    missed = [c["metric"] for c in report["gate"]["checks"] if c["status"] != "passed"]
    return f"Not passed on {listed([WORDING[m].kind for m in dict.fromkeys(missed)])}."


def side_by_side(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One entry for each base and each aligned model of ``reports``."""
    models: list[tuple[str, Mapping[str, Any], Report | None]] = [
        (name, report["base"], None) for name, report in bases(reports)
    ]
    models += [(str(report["job"]), report["aligned"], report) for report in reports]
    return [
        {
            "name": name,
            "metrics": metrics,
            "report": report,
            "reading": reading(metrics, report),
            "apart": {
                harmless: apart(metrics, harmless)
                for harmless in ("borderline_refusal", "benign_refusal")
            },
        }
        for name, metrics, report in models
    ]


def unequal(reports: Sequence[Report]) -> list[str]:
    """Why the reports cannot simply be compared, if so."""
    found = []
    recipes = [report.get("recipe") or {} for report in reports]
    if any(r.get("base_digest") != recipes[0].get("base_digest") for r in recipes):
        found.append("the jobs start from different base models")
    settings = [{k: (r.get("eval") or {}).get(k) for k in SAMPLED} for r in recipes]
    if any(setting != settings[0] for setting in settings):
        found.append("the jobs were measured on different suites or with other sampling")
    gates = [(r.get("eval") or {}).get("gate") for r in recipes]
    if any(gate != gates[0] for gate in gates):
        found.append("the jobs have different gates")
    return found


def verdict_counts(report: Report) -> list[dict[str, Any]]:
    """For each suite and model: rows, how many got each verdict, how many were cut off."""
    tallies = report.get("responses") or {}
    found = []
    for suite in dict.fromkeys(name for model in tallies.values() for name in model):
        for model in ("base", "aligned"):
            counts = tallies.get(model, {}).get(suite)
            if counts:
                verdicts = {n: c for n, c in counts.items() if n not in ("rows", "cut_off")}
                found.append({"suite": suite, "model": model, **counts, "verdicts": verdicts})
    return found


def verdict_names(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdicts that occur, in a fixed order."""
    seen = {name for entry in counts for name in entry["verdicts"]}
    return [name for name in VERDICTS if name in seen] + sorted(seen - set(VERDICTS))
