"""The recipe of the choice among adapters: what is tried, on which rows, and what has to hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipes.evaluation import Bound, DevMetric, Suite
from pipeline.recipes.fields import Frozen, Positive, Real
from pipeline.recipes.rows import PrepRecipe, SourceRecipe

MEASURED: dict[str, tuple[DevMetric, ...]] = {
    "harmful": ("harmful_refusal",),
    "borderline": ("borderline_refusal", "over_refusal"),
    "benign": ("benign_refusal", "over_refusal"),
    "reasoning": ("reasoning_accuracy", "reasoning_nll"),
}
DEV_TOKENS = 64  # where no reported suite says how long an answer may be


class DevRows(Frozen):
    """The rows that prep split off: those of refusals are harmful, anchors are benign. ``limit``: at
    most so many of each source. ``max_new_tokens``: by default the most that a reported suite of
    refusals has."""

    limit: Positive | None = 100
    max_new_tokens: Positive | None = None


class ChooseRecipe(Frozen):
    """Which epoch is merged, and how much of its update: the best of all sealed epochs x ``scales``
    on development rows, never on those that are reported.

    ``scales``: factors on the trained update; 1 is what was trained. ``wanted``: what a point has to
    hold; among those that do, the one that is best in ``best`` is merged. ``otherwise``: where none
    does, the one that is nearest to doing so (the least sum of what is missing), or none.
    """

    dev: DevRows | None = DevRows()
    suites: tuple[Suite, ...] = ()
    epochs: tuple[Positive, ...] | None = Field(default=None, min_length=1)
    scales: tuple[Annotated[Real, Field(gt=0)], ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0, 1.25), min_length=1
    )
    wanted: tuple[Bound, ...] = Field(min_length=1)
    best: DevMetric = "harmful_refusal"
    otherwise: Literal["nearest", "refuse"] = "nearest"

    @model_validator(mode="after")
    def nothing_twice(self) -> ChooseRecipe:
        for name, values in (("scales", self.scales), ("epochs", self.epochs or ())):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} has a value twice: {list(values)}")
        return self

    @property
    def needed(self) -> list[tuple[str, DevMetric]]:
        """What has to be measured, and what for."""
        return [
            *((f"choose.wanted.{i}", bound.metric) for i, bound in enumerate(self.wanted)),
            ("choose.best", self.best),
            ("choose", "harmful_refusal"),
            ("choose", "over_refusal"),
        ]

    def measured(self, prep: PrepRecipe) -> set[DevMetric]:
        """What these suites and the development rows of ``prep`` measure."""
        measures: set[str] = {suite.measures for suite in self.suites}
        found: set[DevMetric] = set()
        if self.dev is not None and prep.dev_fraction > 0:
            kinds = {source.kind for source in prep.sources}
            measures |= {{"refusal": "harmful", "anchor": "benign"}.get(kind, "") for kind in kinds}
            found |= {"anchor_nll"} if "anchor" in kinds else set()
        return found.union(*(MEASURED.get(name, ()) for name in measures))

    def check_rows(self, prep: PrepRecipe, reported: Collection[Suite]) -> None:
        """ValueError where a bound has nothing to hold to, or rows are those that are reported."""
        names = [suite.name for suite in (*self.suites, *reported)]
        if len(set(names)) != len(names):
            raise ValueError(
                f"choose.suites and eval.suites have two entries of one name: {sorted(names)};"
                " rename one"
            )
        for suite in self.suites:
            same = next((other for other in reported if _rows(other) == _rows(suite)), None)
            if same is not None:
                raise ValueError(
                    f"choose.suites {suite.name} has the rows of eval.suites {same.name}, and what"
                    " is reported may not choose; give it rows of its own"
                )
        measured = self.measured(prep)
        for where, metric in self.needed:
            if metric not in measured:
                raise ValueError(
                    f"{where}: nothing measures {metric}; measured are"
                    f" {', '.join(sorted(measured)) or 'none'}: add a suite to choose.suites"
                )


def _rows(source: SourceRecipe) -> tuple[object, ...]:
    """What says which rows a source has, but for how many of them are taken."""
    split = source.split or source.where.get("split")
    where = {name: value for name, value in source.where.items() if name != "split"}
    return source.source, source.revision, source.subset, split, tuple(sorted(where.items()))
