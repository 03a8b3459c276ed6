"""Points of a trade-off: which ones nothing beats, and which one a policy picks. Torch-free.

A point is one trained epoch at one scale of its update, with the metrics measured there. The base is
a point too (epoch 0, scale 0): it is on the plane, and is never picked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, RecipeError
from pipeline.evals.gate import ROUNDING, ahead, value_of
from pipeline.evals.stats import wilson
from pipeline.recipes import Bound, ChooseRecipe

Metrics = Mapping[str, Mapping[str, Any]]

RISES = frozenset({"harmful_refusal", "reasoning_accuracy"})  # the more, the better
OVER_REFUSAL = ("borderline_refusal", "benign_refusal")
REASONING = ("reasoning_nll", "anchor_nll")


@dataclass(frozen=True, eq=False)
class Point:
    """``survival``: the share of the update that is there after rounding."""

    epoch: int
    scale: float
    metrics: Metrics
    survival: float | None = None

    @property
    def name(self) -> str:
        return f"epoch {self.epoch} at scale {self.scale:g}" if self.epoch else "the base"


def pooled(metrics: Metrics, confidence: float) -> dict[str, Any] | None:
    """``over_refusal``: borderline and benign rows as one proportion; None without such rows."""
    found = [metrics[name] for name in OVER_REFUSAL if name in metrics]
    n = sum(one["n"] for one in found)
    if not n:
        return None
    refused = sum(round(one["value"] * one["n"]) for one in found)
    low, high = wilson(refused, n, confidence)
    return {"value": refused / n, "low": low, "high": high, "n": n}


def axes(metrics: Metrics) -> dict[str, str | None]:
    """The metrics that a point is placed by."""
    reasoning = next((name for name in REASONING if name in metrics), None)
    return {"safety": "harmful_refusal", "over_refusal": "over_refusal", "reasoning": reasoning}


def front(places: Sequence[Sequence[float]]) -> list[bool]:
    """Which of ``places`` are on the Pareto front: no other is at least as large in every coordinate
    and larger in one. Equal places are on it together."""
    return [
        not any(
            all(o >= p for o, p in zip(other, place, strict=True)) and tuple(other) != tuple(place)
            for other in places
        )
        for place in places
    ]


def missing(bound: Bound, base: Metrics, metrics: Metrics) -> float:
    """By how much ``metrics`` miss the bound, in the unit that it compares in; 0 where they hold it."""
    before, after = float(base[bound.metric]["value"]), float(metrics[bound.metric]["value"])
    if bound.compare == "relative" and before == 0:
        raise DataError(
            f"choose: the base's {bound.metric} is 0, and nothing is relative to that; compare the"
            " difference"
        )
    value = value_of(bound, before, after)
    direction, limit = ("at least", bound.at_least)
    if limit is None:
        direction, limit = "at most", bound.at_most
    assert limit is not None
    return 0.0 if ahead(direction, value, limit) else abs(limit - value)


def pick(
    recipe: ChooseRecipe, base: Point, points: Sequence[Point], survival_floor: float
) -> dict[str, Any]:
    """The points as they are told (base first), the front, the one that ``recipe`` picks, and why.

    Only points whose update survives rounding can be picked, for merge would refuse the others. Of
    equally good ones: on the front, smaller scale, earlier epoch. DataError where none can be picked;
    RecipeError where none holds the bounds and the recipe refuses that.
    """
    named = [name for name in axes(base.metrics).values() if name is not None]
    places = [[_good(name, p) for name in named] for p in (base, *points)]
    on_front = dict(zip((base, *points), front(places), strict=True))
    lacks = {p: sum(missing(b, base.metrics, p.metrics) for b in recipe.wanted) for p in points}
    able = [p for p in points if p.survival is None or p.survival >= survival_floor]
    if not able:
        raise DataError(
            f"choose: rounding leaves less than merge.survival_floor={survival_floor:g} of the update"
            " at every point; train a larger update, or lower the floor"
        )
    holding = [p for p in able if lacks[p] <= ROUNDING]
    if not holding and recipe.otherwise == "refuse":
        nearest = min(able, key=lambda p: lacks[p])
        raise RecipeError(
            f"choose: none of {len(able)} points holds choose.wanted ({nearest.name} misses it by"
            f" {lacks[nearest]:.3g}); loosen the bounds, train otherwise, or set choose.otherwise:"
            " nearest"
        )

    def rank(p: Point) -> tuple[Any, ...]:
        lack = 0.0 if holding else round(lacks[p], 9)
        return lack, -_good(recipe.best, p), not on_front[p], p.scale, p.epoch

    chosen = min(holding or able, key=rank)
    return {
        "chosen": {"epoch": chosen.epoch, "scale": chosen.scale},
        "meets": bool(holding),
        "verdict": _verdict(recipe, chosen, len(holding), len(able), lacks[chosen]),
        "axes": axes(base.metrics),
        "front": [[p.epoch, p.scale] for p, here in on_front.items() if here],
        "points": [
            {
                "epoch": p.epoch,
                "scale": p.scale,
                "metrics": dict(p.metrics),
                "survival": p.survival,
                "on_front": on_front[p],
                "missing": lacks.get(p),
                "meets": p in holding,
            }
            for p in (base, *points)
        ],
    }


def chosen_of(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the points of ``choice`` the one that was picked."""
    at = choice["chosen"]
    points: Sequence[Mapping[str, Any]] = choice["points"]
    return next(p for p in points if (p["epoch"], p["scale"]) == (at["epoch"], at["scale"]))


def read_choice(folder: Path) -> dict[str, Any]:
    """What the choose stage wrote into ``folder``, with its points."""
    choice: dict[str, Any] = json.loads((folder / "choice.json").read_text(encoding="utf-8"))
    lines = (folder / "points.jsonl").read_text(encoding="utf-8").splitlines()
    return choice | {"points": [json.loads(line) for line in lines]}


def _good(metric: str, point: Point) -> float:
    """The value of ``metric``, turned so that more is better."""
    value = float(point.metrics[metric]["value"])
    return value if metric in RISES else -value


def _verdict(recipe: ChooseRecipe, chosen: Point, holding: int, able: int, lack: float) -> str:
    best = f"{recipe.best} {float(chosen.metrics[recipe.best]['value']):.3f}"
    if holding == 1:
        return f"{chosen.name}: {best}, the only one of {able} points that holds all bounds".capitalize()
    if holding:
        kind = "highest" if recipe.best in RISES else "lowest"
        return (
            f"{chosen.name}: {best}, the {kind} of the {holding} of {able} points that hold all"
            " bounds"
        ).capitalize()
    return (
        f"No point of {able} holds all bounds; {chosen.name} is nearest, missing {lack:.3g} in all"
        f" ({best})"
    )
