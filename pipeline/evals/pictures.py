"""From the numbers of a report to the panels that plots.py draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evals.plots import Categories, Category, Curve, Estimate, Panel, Refusals
from pipeline.evals.score import REFUSAL_METRICS, REFUSED, UNANSWERED
from pipeline.evals.stats import share_interval
from pipeline.evals.wording import MEASURES, WORDING, clean, interval, known, number, percent

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

MOST_CATEGORIES = 40


def status_of(report: Report, metric: str) -> str | None:
    """The worst status among the checks of ``metric``; None when there is no check."""
    found = {check["status"] for check in report["gate"]["checks"] if check["metric"] == metric}
    return next((s for s in ("failed", "uninformative", "passed") if s in found), None)


def allowed(report: Report, metric: str) -> tuple[float, float] | None:
    """The values of ``metric`` that all its checks let through; None when there is no check."""
    low, high = -math.inf, math.inf
    for check in report["gate"]["checks"]:
        if check["metric"] != metric:
            continue
        bound, base = check["bound"], check.get("base")
        if check["compare"] != "value":
            if base is None:
                continue
            bound = base + bound if check["compare"] == "difference" else base * (1 + bound)
        direction = check.get("direction")
        rises = direction == "at least" if direction else WORDING[metric].higher_is_better
        low, high = (max(low, bound), high) if rises else (low, min(high, bound))
    return None if (low, high) == (-math.inf, math.inf) else (low, high)


def estimate(
    metric: str, measured: Mapping[str, Any] | None, label: str, role: str
) -> Estimate | None:
    """One measured metric as it is drawn; None when there is nothing to draw."""
    if not measured or not known(measured.get("value")) or not measured.get("n"):
        return None
    value = float(measured["value"])
    low, high = measured.get("low"), measured.get("high")
    return Estimate(
        label,
        value,
        min(value, float(low)) if low is not None and known(low) else value,
        max(value, float(high)) if high is not None and known(high) else value,
        number(metric, value, int(measured["n"])),
        role,
    )


def objective_panels(report: Report) -> dict[str, Panel]:
    """One panel for each measured metric: base and aligned model, and what the gate allows."""
    panels = {}
    for metric, wording in WORDING.items():
        role = status_of(report, metric) or "plain"
        pair = (
            estimate(metric, report["base"].get(metric), "base", "base"),
            estimate(metric, report["aligned"].get(metric), "aligned", role),
        )
        shown = tuple(e for e in pair if e)
        if shown:
            bounds = allowed(report, metric)
            panels[metric] = Panel(wording.title, shown, wording.proportion, bounds)
    return panels


def described(metric: str, report: Report) -> str:
    """The panel of ``metric`` in words, for those who cannot see it."""
    parts = []
    for model in ("base", "aligned"):
        measured = report[model].get(metric)
        if measured:
            n = int(measured.get("n") or 0)
            value = number(metric, measured.get("value"), n)
            parts.append(f"{model} model {value} ({interval(metric, measured)}, n = {n})")
    return f"{WORDING[metric].title}: " + "; ".join(parts)


def bases(reports: Sequence[Report]) -> list[tuple[str, Report]]:
    """The distinct base results among ``reports``, with a name each."""
    found: list[tuple[str, Report]] = []
    for report in reports:
        if not any(report["base"] == other["base"] for _, other in found):
            found.append((f"base of {report['job']}" if found else "base", report))
    return found


def refusal_panels(reports: Sequence[Report]) -> list[Refusals]:
    """What each base and each aligned model refuses, side by side."""
    models: list[tuple[str, Mapping[str, Any], Report | None]]
    models = [(name, report["base"], None) for name, report in bases(reports)]
    models += [(str(report["job"]), report["aligned"], report) for report in reports]
    return [
        panel
        for name, metrics, report in models
        if (panel := _refusals(name, metrics, report)).estimates
    ]


def _refusals(name: str, metrics: Mapping[str, Any], report: Report | None) -> Refusals:
    shown, bounds = [], {}
    for metric in REFUSAL_METRICS.values():
        label = WORDING[metric].short
        one = estimate(metric, metrics.get(metric), label, "plain")
        if one is None:
            continue
        shown.append(one)
        limits = allowed(report, metric) if report else None
        finite = [b for b in limits or () if math.isfinite(b)]
        if finite:
            bounds[label] = finite[0]
    return Refusals(name, tuple(shown), bounds)


def curves(history: Rows) -> list[Curve]:
    """Cross-entropy and KL by optimiser step; a quantity that was never measured is left out.

    A step without rows of a kind records exactly zero for it, which is no measurement.
    """
    wanted = (
        ("Cross-entropy, in nats per token", "cross_entropy", "dev_loss"),
        ("KL from the base on anchor rows, in nats per token", "kl", "dev_kl"),
    )
    found = []
    for title, train, dev in wanted:
        curve = Curve(title, _points(history, train), _points(history, dev))
        if curve.train or curve.dev:
            found.append(curve)
    return found


def _points(history: Rows, name: str) -> tuple[tuple[float, float], ...]:
    points = ((r.get("step"), r.get(name)) for r in history)
    return tuple((float(s), float(v)) for s, v in points if known(s) and known(v) and v)


def categories(base: Rows, aligned: Rows, confidence: float) -> dict[str, Categories]:
    """By what a suite measures: every category with its share refused (or solved), worst first.

    Rows without a category are left out; a measure with fewer than two categories has no panel.
    """
    found = {}
    for measures in MEASURES:
        before, after = _outcomes(base, measures), _outcomes(aligned, measures)
        if len(after) < 2:
            continue
        rows = [
            Category(
                f"{name} ({len(outcomes)})",
                _share(before[name], confidence, "base") if name in before else None,
                _share(outcomes, confidence, "plain"),
            )
            for name, outcomes in sorted(after.items())
        ]
        wording = WORDING[REFUSAL_METRICS.get(measures, "reasoning_accuracy")]
        rows.sort(key=lambda row: row.aligned.value, reverse=not wording.higher_is_better)
        found[measures] = Categories(wording.title, tuple(rows))
    return found


def _outcomes(rows: Rows, measures: str) -> dict[str, list[list[bool]]]:
    """For each category, what counts among the answers to each of its rows."""
    counted = {"reasoning": frozenset({"correct"}), "harmful": REFUSED}
    good = counted.get(measures, REFUSED | UNANSWERED)
    found: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        if row["measures"] == measures and row.get("category"):
            name = clean(row["category"]).replace("_", " ")
            answers = found.setdefault(name, {}).setdefault(f"{row['suite']} {row['id']}", [])
            answers.append(row["verdict"] in good)
    return {name: list(answers.values()) for name, answers in found.items()}


def _share(outcomes: list[list[bool]], confidence: float, role: str) -> Estimate:
    shares, n = [sum(answers) / len(answers) for answers in outcomes], len(outcomes)
    low, high = share_interval(shares, max(map(len, outcomes)), confidence)
    value, counted = sum(shares) / n, sum(map(sum, outcomes))
    label = f"{counted} of {sum(map(len, outcomes))}"
    return Estimate(label, value, low, high, percent(value, n), role)


def drawn(panel: Categories) -> Categories:
    """As many categories as a picture can hold, the worst ones."""
    return Categories(panel.title, panel.rows[:MOST_CATEGORIES])
