"""The release gate: passed, failed, or cannot tell; only "passed" on every check releases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.recipes import Bound, Check

Metrics = Mapping[str, Mapping[str, Any]]

NEAR_ZERO = 0.05
ROUNDING = 1e-9
COMPARED = {
    "value": "The aligned value",
    "difference": "The change from the base",
    "relative": "The relative change from the base",
}


def evaluate(
    gate: Sequence[Check],
    base: Metrics,
    aligned: Metrics,
    pairs: Metrics | None = None,
) -> dict[str, Any]:
    """{"passed", "checks"}: every check with what it compared, its status and a sentence why.

    A check is ``uninformative`` when its metric was not measured, has fewer rows than
    ``min_rows``, or compares with a base that is below ``min_base`` (for accuracy 0.05 unless
    stated: a base that solves nothing has nothing to lose), or wants its whole interval on one side
    of a bound that lies within. ``pairs`` gives the rows that both models answered and the intervals
    of differences; without it the smaller n counts.
    """
    checks = [_check(check, base, aligned, pairs or {}) for check in gate]
    return {"passed": all(c["status"] == "passed" for c in checks), "checks": checks}


def _check(check: Check, base: Metrics, aligned: Metrics, pairs: Metrics) -> dict[str, Any]:
    direction, bound = ("at least", check.at_least)
    if bound is None:
        direction, bound = "at most", check.at_most
    assert bound is not None
    before, after = base.get(check.metric), aligned.get(check.metric)
    result: dict[str, Any] = {
        "metric": check.metric,
        "compare": check.compare,
        "direction": direction,
        "bound": bound,
        "value": None,
        "low": None,
        "high": None,
        "base": before["value"] if before else None,
        "aligned": after["value"] if after else None,
        "n": after["n"] if after else 0,
    }
    if check.compare != "value" and before and after:
        paired = pairs.get(check.metric, {}).get("n", min(before["n"], after["n"]))
        result["n"] = int(paired)
    doubt = _doubt(check, result)
    if doubt:
        return result | {"status": "uninformative", "why": f"Cannot tell: {doubt}."}
    value = value_of(check, result["base"], result["aligned"])
    low, high = _interval(check, after or {}, pairs.get(check.metric, {}))
    result |= {"value": value, "low": low, "high": high}
    why = (
        f"{COMPARED[check.compare]} is {_number(check, value)}"
        f"{_origin(check, result)} on {result['n']} rows;"
        f" wanted {direction} {_number(check, bound)}"
    )
    if check.evidence == "estimate":
        status = "passed" if ahead(direction, value, bound) else "failed"
        return result | {"status": status, "why": f"{why}."}
    if low is None or high is None:
        doubt = f"no interval of the {check.compare} of {check.metric} is known"
        return result | {"status": "uninformative", "why": f"Cannot tell: {doubt}."}
    ends = [ahead(direction, end, bound) for end in (low, high)]
    if ends[0] != ends[1]:
        why = (
            f"Cannot tell: {why[0].lower()}{why[1:]} by the whole interval, which holds the bound."
        )
        return result | {"status": "uninformative", "why": why}
    return result | {"status": "passed" if ends[0] else "failed", "why": f"{why}."}


def ahead(direction: str, value: float, bound: float) -> bool:
    """Whether ``value`` is on the right side of the bound."""
    return (value - bound if direction == "at least" else bound - value) >= -ROUNDING


def _interval(
    check: Check, after: Mapping[str, Any], pair: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """The interval of what is compared, where it is known."""
    if check.compare == "value":
        return after.get("low"), after.get("high")
    prefix = "relative_" if check.compare == "relative" else ""
    return pair.get(f"{prefix}low"), pair.get(f"{prefix}high")


def _doubt(check: Check, result: Mapping[str, Any]) -> str | None:
    """Why this check cannot tell, or None."""
    metric, base = check.metric, result["base"]
    if result["aligned"] is None:
        return f"no suite measures {metric}"
    if result["n"] < check.min_rows:
        return f"{metric} has {result['n']} rows, at least {check.min_rows} are needed"
    if check.min_base is not None and (base is None or base < check.min_base):
        return f"the base's {metric} is {_short(base)}, below {check.min_base:g}"
    if check.compare == "value":
        return None
    if base is None:
        return f"the base was not measured on {metric}"
    least = NEAR_ZERO if metric == "reasoning_accuracy" and check.min_base is None else 0.0
    if base < least or (check.compare == "relative" and base <= 0):
        return f"the base's {metric} is {_short(base)}, so near zero that nothing can be lost"
    return None


def value_of(check: Bound, base: float | None, aligned: float) -> float:
    """What ``check`` compares with its bound."""
    if check.compare == "value" or base is None:
        return aligned
    return aligned - base if check.compare == "difference" else aligned / base - 1


def _origin(check: Check, result: Mapping[str, Any]) -> str:
    low, high = result["low"], result["high"]
    known = low is not None and high is not None
    interval = f"interval {_number(check, low)} to {_number(check, high)}" if known else ""
    if check.compare == "value":
        return f" ({interval})" if known else ""
    moved = f"{_short(result['base'])} to {_short(result['aligned'])}"
    return f" ({moved}{'; ' + interval if known else ''})"


def _number(check: Check, value: float) -> str:
    if check.compare == "relative":
        return f"{value:+.2%}"
    return f"{value:+.3f}" if check.compare == "difference" else f"{value:.3f}"


def _short(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"
