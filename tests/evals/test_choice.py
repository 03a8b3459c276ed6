"""Which points of a trade-off nothing beats, and which one a policy picks."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from pipeline.errors import DataError, RecipeError
from pipeline.evals.choice import Point, front, pick, pooled
from pipeline.evals.pareto import draw_choice
from pipeline.evals.plots import to_png, to_svg
from pipeline.evals.stats import wilson
from pipeline.recipes import ChooseRecipe


def share(value: float, n: int = 100) -> dict[str, Any]:
    low, high = wilson(round(value * n), n, 0.95)
    return {"value": value, "low": low, "high": high, "n": n}


def point(
    epoch: int, scale: float, safe: float, over: float, loss: float, survival: float | None = 1.0
) -> Point:
    metrics = {
        "harmful_refusal": share(safe),
        "borderline_refusal": share(over),
        "benign_refusal": share(0.0),
        "reasoning_nll": {"value": loss, "low": loss, "high": loss, "n": 9},
    }
    over_refusal = pooled(metrics, 0.95)
    assert over_refusal is not None
    return Point(epoch, scale, metrics | {"over_refusal": over_refusal}, survival)


BASE = point(0, 0.0, 0.1, 0.02, 1.4, None)
MILD = point(1, 0.5, 0.6, 0.04, 1.40)
GOOD = point(1, 1.0, 0.9, 0.1, 1.41)
HARD = point(2, 0.5, 0.9, 0.1, 1.41)
TRAP = point(2, 1.0, 1.0, 0.6, 1.9)
POINTS = [MILD, GOOD, HARD, TRAP]
HELPFUL = {"metric": "borderline_refusal", "at_most": 0.2}


def recipe(*wanted: dict[str, Any], **options: Any) -> ChooseRecipe:
    return ChooseRecipe.model_validate({"wanted": list(wanted or [HELPFUL])} | options)


def picked(*wanted: dict[str, Any], points: list[Point] = POINTS, **options: Any) -> Any:
    chosen = pick(recipe(*wanted, **options), BASE, points, 0.5)
    return (chosen["chosen"]["epoch"], chosen["chosen"]["scale"]), chosen["meets"]


def by_definition(places: list[tuple[float, ...]]) -> list[bool]:
    """A place is beaten by one that is nowhere less and somewhere more."""
    kept = []
    for one in places:
        beaten = False
        for other in places:
            less = [a < b for a, b in zip(other, one, strict=True)]
            more = [a > b for a, b in zip(other, one, strict=True)]
            beaten = beaten or (not any(less) and any(more))
        kept.append(not beaten)
    return kept


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_front_is_what_its_definition_says(axes: int) -> None:
    chance = random.Random(axes)
    for size in (1, 2, 5, 30):
        for _ in range(30):
            places = [tuple(float(chance.randint(0, 4)) for _ in range(axes)) for _ in range(size)]
            assert front(places) == by_definition(places)
    grid = list(itertools.product((0.0, 1.0), repeat=axes))
    assert front(grid) == [place == (1.0,) * axes for place in grid]
    assert front([(1.0,) * axes] * 3) == [True] * 3


def test_over_refusal_pools_rows_and_not_shares() -> None:
    metrics = {"borderline_refusal": share(0.5, 10), "benign_refusal": share(0.0, 90)}
    found = pooled(metrics, 0.95)
    low, high = wilson(5, 100, 0.95)
    assert found == {"value": 0.05, "low": low, "high": high, "n": 100}
    assert pooled({"harmful_refusal": share(0.5)}, 0.95) is None


def test_the_best_of_those_that_hold_the_bounds() -> None:
    assert picked() == ((2, 0.5), True)  # as good as epoch 1 at scale 1: the smaller scale
    assert picked({"metric": "borderline_refusal", "at_most": 0.05}) == ((1, 0.5), True)
    assert picked({"metric": "over_refusal", "at_most": 0.9}) == ((2, 1.0), True)
    safe = {"metric": "harmful_refusal", "at_least": 0.9}
    assert picked(safe, best="borderline_refusal") == ((2, 0.5), True)
    assert picked(safe, best="reasoning_nll", points=[GOOD, TRAP]) == ((1, 1.0), True)
    assert picked(safe, points=[point(2, 1.0, 0.9, 0.1, 1.41), GOOD]) == ((1, 1.0), True)


def test_the_verdict_says_why() -> None:
    def said(*wanted: dict[str, Any], **options: Any) -> str:
        return str(pick(recipe(*wanted, **options), BASE, POINTS, 0.5)["verdict"])

    assert said() == (
        "Epoch 2 at scale 0.5: harmful_refusal 0.900, the highest of the 3 of 4 points that hold all"
        " bounds"
    )
    assert said(best="over_refusal").startswith(
        "Epoch 1 at scale 0.5: over_refusal 0.020, the lowest"
    )
    assert said({"metric": "borderline_refusal", "at_most": 0.05}) == (
        "Epoch 1 at scale 0.5: harmful_refusal 0.600, the only one of 4 points that holds all bounds"
    )


def test_bounds_compare_as_the_gate_does() -> None:
    rises = {"metric": "borderline_refusal", "compare": "difference", "at_most": 0.08}
    assert picked(rises) == ((2, 0.5), True)
    costs = {"metric": "reasoning_nll", "compare": "relative", "at_most": 0.001}
    assert picked(costs) == ((1, 0.5), True)
    assert picked({"metric": "reasoning_nll", "at_most": 1.41}) == ((2, 0.5), True)
    nothing = {"metric": "benign_refusal", "compare": "relative", "at_most": 0.1}
    with pytest.raises(DataError, match="the base's benign_refusal is 0"):
        picked(nothing)


def test_of_equals_the_one_that_nothing_beats() -> None:
    """A smaller scale that is as safe but refuses more harmless requests does not go first."""
    worse = point(3, 0.25, 0.9, 0.15, 1.45)
    assert picked(points=[worse, GOOD]) == ((1, 1.0), True)


def test_where_no_point_holds_the_bounds() -> None:
    both = ({"metric": "harmful_refusal", "at_least": 0.95}, {**HELPFUL, "at_most": 0.05})
    chosen = pick(recipe(*both), BASE, POINTS, 0.5)
    assert chosen["chosen"] == {"epoch": 2, "scale": 0.5}
    assert chosen["meets"] is False
    assert chosen["verdict"].startswith("No point of 4 holds all bounds; epoch 2 at scale 0.5 is")
    assert [p["missing"] for p in chosen["points"]] == [
        None,
        pytest.approx(0.35),
        pytest.approx(0.1),
        pytest.approx(0.1),
        pytest.approx(0.55),
    ]
    with pytest.raises(RecipeError, match=r"none of 4 points holds .*epoch 1 at scale 1 misses"):
        pick(recipe(*both, otherwise="refuse"), BASE, POINTS, 0.5)


def test_what_merge_would_refuse_is_not_picked() -> None:
    lost = [point(1, 0.5, 0.95, 0.0, 1.4, survival=0.4), MILD]
    assert picked(points=lost) == ((1, 0.5), True)
    chosen = pick(recipe(), BASE, lost, 0.5)
    assert [p["meets"] for p in chosen["points"]] == [False, False, True]
    with pytest.raises(DataError, match=r"less than merge\.survival_floor=0\.5"):
        picked(points=lost[:1])


def test_the_base_is_on_the_plane_and_never_picked() -> None:
    nothing_lost = {"metric": "borderline_refusal", "at_most": 0.02}
    chosen = pick(recipe(nothing_lost), BASE, POINTS, 0.5)
    assert chosen["chosen"] == {"epoch": 1, "scale": 0.5} and not chosen["meets"]
    assert [0, 0.0] in chosen["front"]
    assert [p["epoch"] for p in chosen["points"]] == [0, 1, 1, 2, 2]
    beaten = point(3, 1.0, 0.05, 0.3, 1.5)
    told = pick(recipe(), BASE, [*POINTS, beaten], 0.5)
    assert [p["on_front"] for p in told["points"]] == [True] * 5 + [False]


def test_the_picture_is_the_same_each_time_and_keeps_its_text() -> None:
    made = pick(recipe(HELPFUL, {"metric": "harmful_refusal", "at_least": 0.5}), BASE, POINTS, 0.5)
    choice = made | {"policy": recipe().model_dump(mode="json")}
    assert to_png(draw_choice(choice)) == to_png(draw_choice(choice))
    svg = to_svg(draw_choice(choice), "the choice", "salt")
    for text in (
        "chosen: epoch 2, \u00d70.5",
        "base",
        "Harmful requests refused",
        "worked solutions",
    ):
        assert text in svg


@pytest.mark.parametrize("loss", ["reasoning_nll", "anchor_nll", None])
def test_the_picture_says_which_loss_it_shows(loss: str | None) -> None:
    def with_loss(p: Point) -> Point:
        metrics = dict(p.metrics)
        value = metrics.pop("reasoning_nll")
        return Point(p.epoch, p.scale, metrics | ({loss: value} if loss else {}), p.survival)

    made = pick(recipe(), with_loss(BASE), [with_loss(p) for p in POINTS], 0.5)
    assert made["axes"]["reasoning"] == loss
    svg = to_svg(draw_choice(made | {"policy": {"wanted": []}}), "the choice", "salt")
    told = [text for text in ("worked solutions", "base's own answers") if text in svg]
    assert told == {
        "reasoning_nll": ["worked solutions"],
        "anchor_nll": ["base's own answers"],
    }.get(str(loss), [])
