"""What changed from base to aligned model, metric by metric, and whether so many rows could show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evals.pictures import Report
from pipeline.evals.wording import (
    WORDING,
    change,
    interval,
    known,
    measured_value,
    p_value,
    signed,
    span,
)

DEFAULT_CONFIDENCE = 0.95
SAYS = {
    "clear": "More than chance.",
    "maybe": "May be chance.",
    "none": "No change that so many rows could show.",
}


def changes(report: Report) -> list[dict[str, str]]:
    """One row for each metric measured: before, after, the change, and what to make of it."""
    pairs = report.get("pairs") or {}
    together = sum("p_adjusted" in pair for pair in pairs.values())
    alpha = 1 - float(report.get("confidence", DEFAULT_CONFIDENCE))
    found = []
    for metric, wording in WORDING.items():
        before, after = report["base"].get(metric), report["aligned"].get(metric)
        if not before and not after:
            continue
        row = {
            "metric": metric,
            "objective": wording.objective,
            "title": wording.title,
            "better": wording.better,
            "change": "",
        }
        for name, measured in (("base", before), ("aligned", after)):
            row[name] = measured_value(metric, measured) if measured else ""
            row[f"{name}_interval"] = interval(metric, measured) if measured else "not measured"
            row[f"{name}_n"] = str(measured["n"]) if measured else "0"
        if before and after and known(before["value"]) and known(after["value"]):
            row["change"] = change(metric, after["value"] - before["value"])
        pair = pairs.get(metric)
        row |= _paired(metric, pair, together, alpha) if pair else _not_paired()
        found.append(row)
    return found


def certainty(pair: Mapping[str, Any], alpha: float) -> str:
    """``clear``: the interval is without 0, and the test holds among all metrics together; ``none``:
    with 0, and less than so many rows would show; ``maybe``: anything between."""
    holds_zero = pair["low"] <= 0 <= pair["high"]
    if not holds_zero and pair.get("p_adjusted", 0.0) <= alpha:
        return "clear"
    least = pair.get("detectable")
    if holds_zero and least is not None and abs(pair["difference"]) < least:
        return "none"
    return "maybe"


def _not_paired() -> dict[str, str]:
    names = ("change_interval", "certainty", "says", "detectable", "test")
    return dict.fromkeys(names, "") | {"paired": "not compared row by row"}


def _paired(metric: str, pair: Mapping[str, Any], together: int, alpha: float) -> dict[str, str]:
    kind = certainty(pair, alpha)
    row = {
        "change_interval": span(metric, pair["low"], pair["high"]),
        "certainty": kind,
        "says": SAYS[kind] + _why(pair, kind),
        "detectable": "",
        "paired": f"The same {pair['n']} rows",
        "test": "",
    }
    least = pair.get("detectable")
    if least is not None:
        row["detectable"] = (
            f"{pair['n']} rows show a change of {change(metric, least).removeprefix('+')} or more four"
            " times in five"
        )
    if "base_only" in pair:
        row["paired"], name = _counted(metric, pair)
        row["test"] = f"{name} {p_value(pair['p'])}"
        if "p_adjusted" in pair and together > 1:
            row["test"] += f"; over all {together} measures {p_value(pair['p_adjusted'])} (Holm)"
    elif known(pair.get("relative")):
        ends = [
            signed(f"{pair[end]:+.2%}") for end in ("relative", "relative_low", "relative_high")
        ]
        row["test"] = f"{ends[0]} of the base's loss, {ends[1]} to {ends[2]} (bootstrap)"
    return row


def _why(pair: Mapping[str, Any], kind: str) -> str:
    if kind != "maybe":
        return ""
    if pair["low"] <= 0 <= pair["high"]:
        return " The interval holds 0."
    return " Too near to chance when all measures here are looked at together."


def _counted(metric: str, pair: Mapping[str, Any]) -> tuple[str, str]:
    """How many rows changed each way, and the test for that."""
    wording = WORDING[metric]
    if "samples" in pair:
        return (
            f"more often on {pair['aligned_only']} of {pair['n']} rows, less often on"
            f" {pair['base_only']}",
            "sign flips",
        )
    return (
        f"{pair['aligned_only']} {wording.became}, {pair['base_only']} {wording.ceased},"
        f" of {pair['n']}",
        "McNemar",
    )
