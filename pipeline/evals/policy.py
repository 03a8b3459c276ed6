"""The choice among trained points in words: what was wanted, what was found, and all points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evals.choice import chosen_of, missing
from pipeline.evals.gate import ROUNDING, value_of
from pipeline.evals.wording import (
    DASH,
    WORDING,
    compared,
    interval,
    measured_value,
    percent,
    signed,
    wanted,
)
from pipeline.recipes import Bound

Choice = Mapping[str, Any]
TIMES = "\u00d7"
OTHERWISE = {
    "nearest": "where none does, the one that misses them by least",
    "refuse": "where none does, none is merged",
}


def told(choice: Choice) -> dict[str, Any]:
    """What the page says of ``choice`` (the block of that name in report.json)."""
    points = choice["points"]
    chosen = chosen_of(choice)
    tried = [p for p in points if p["epoch"]]
    return {
        "meets": choice["meets"],
        "name": name_of(chosen),
        "policy": policy(choice),
        "outcome": outcome(choice),
        "bounds": bounds(choice, points[0]["metrics"], chosen["metrics"]),
        "tried": len(tried),
        "epochs": len({p["epoch"] for p in tried}),
        "scales": len({p["scale"] for p in tried}),
        "rows": rows(choice),
        "metrics": [m for m in choice["axes"].values() if m is not None],
        "points": [_line(point, choice) for point in points],
    }


def name_of(point: Mapping[str, Any]) -> str:
    """``epoch 2, x0.75``, or the base."""
    return f"epoch {point['epoch']}, {TIMES}{point['scale']:g}" if point["epoch"] else "the base"


def policy(choice: Choice) -> str:
    """What the job asked for, in one sentence."""
    asked = choice["policy"]
    best = WORDING[asked["best"]]
    if not best.proportion:
        aim = f"has the lowest {best.kind}"
    else:
        verb = "solves" if best.objective == "Reasoning" else "refuses"
        aim = f"{verb} the {'most' if best.higher_is_better else 'fewest'} {best.kind}"
    return (
        f"Of the points that hold all bounds, the one that {aim}; {OTHERWISE[asked['otherwise']]}."
    )


def outcome(choice: Choice) -> str:
    """How many points held the bounds, and what was done."""
    tried = [p for p in choice["points"] if p["epoch"]]
    holding = sum(p["meets"] for p in tried)
    name = name_of(choice["chosen"])
    if choice["meets"]:
        return f"{holding} of {len(tried)} points hold all bounds; {name} is the best of them."
    return (
        f"None of the {len(tried)} points that were tried holds all bounds. The nearest, {name}, was"
        " merged all the same: what it misses is below."
    )


def bounds(
    choice: Choice, base: Mapping[str, Any], chosen: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Each bound, and what the chosen point measures against it."""
    found = []
    for asked in choice["policy"]["wanted"]:
        bound = Bound.model_validate(asked)
        before, after = base[bound.metric], chosen[bound.metric]
        rises = bound.at_least is not None
        check = {
            "metric": bound.metric,
            "compare": bound.compare,
            "direction": "at least" if rises else "at most",
            "bound": bound.at_least if rises else bound.at_most,
            "n": after["n"],
        }
        held = missing(bound, base, chosen) <= ROUNDING
        value = value_of(bound, float(before["value"]), float(after["value"]))
        found.append(
            {
                "metric": bound.metric,
                "wanted": wanted(check),
                "measured": compared(check, value),
                "status": "passed" if held else "failed",
                # "2% to 83%" would read as an interval, as everywhere else in the report
                "values": f"base {measured_value(bound.metric, before)}, here"
                f" {measured_value(bound.metric, after)}, n = {after['n']}",
            }
        )
    return found


def rows(choice: Choice) -> str:
    """What the points were measured on."""
    measured = choice["points"][0]["metrics"]
    parts = [
        f"{measured[name]['n']:,} {text}"
        for name, text in (
            ("harmful_refusal", "harmful requests"),
            ("over_refusal", "harmless requests"),
            ("reasoning_nll", "worked solutions"),
            ("anchor_nll", "answers of the base"),
        )
        if name in measured
    ]
    dropped = sum((choice.get("dropped") or {}).values())
    left = (
        f" {dropped} more were left out: they ask what is reported or was trained on."
        if dropped
        else ""
    )
    return f"Measured on {', '.join(parts)}, none of which this report counts.{left}"


def described(choice: Choice) -> str:
    """The picture in words, for those who cannot see it."""
    chosen = chosen_of(choice)
    shares = [
        f"{percent(p['metrics']['harmful_refusal']['value'], 1000)} of harmful and"
        f" {percent(p['metrics']['over_refusal']['value'], 1000)} of harmless requests refused"
        for p in (choice["points"][0], chosen)
    ]
    return f"Points tried, by what they refuse. Base: {shares[0]}. Chosen, {name_of(chosen)}: {shares[1]}"


def _line(point: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    metrics, start = point["metrics"], choice["points"][0]["metrics"]
    reasoning = choice["axes"]["reasoning"]
    survival = point["survival"]
    return {
        "name": name_of(point),
        "chosen": point is chosen_of(choice),
        "base": not point["epoch"],
        "on_front": point["on_front"],
        "meets": point["meets"],
        "kept": DASH if survival is None else percent(survival, 1000),
        "values": [
            (metric, measured_value(metric, metrics[metric]), interval(metric, metrics[metric]))
            for metric in choice["axes"].values()
            if metric is not None
        ],
        "loss": _relative(metrics[reasoning], start[reasoning]) if reasoning else "",
    }


def _relative(after: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    value = float(before["value"])
    return signed(f"{float(after['value']) / value - 1:+.1%}") if value else DASH
