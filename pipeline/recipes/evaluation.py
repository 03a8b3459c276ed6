"""Recipes of evaluation: suites, and the gate that decides the release."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pipeline.recipes.fields import Frozen, Positive, Real, Whole
from pipeline.recipes.rows import SourceRecipe


class Suite(SourceRecipe):
    """One evaluation set. ``harmful`` and the benign ones measure refusals; ``reasoning``: exact
    match of the last number in the answer (programming tasks: their tests pass, in a sandbox), and the
    loss on the worked answer in nats per token."""

    measures: Literal["harmful", "borderline", "benign", "reasoning"]
    max_new_tokens: Positive = 64


Metric = Literal[
    "harmful_refusal",
    "borderline_refusal",
    "benign_refusal",
    "reasoning_accuracy",
    "reasoning_nll",
]
METRICS: tuple[str, ...] = get_args(Metric)


class Check(Frozen):
    """One line of the release gate. ``compare``: the aligned value itself, its difference from the
    base, or its relative change; ``min_base``: a base below it tells nothing.

    ``evidence``: what has to be on the right side of the bound, the ``estimate`` or its whole
    ``interval`` (with a difference: a test of non-inferiority). An interval that holds the bound
    passes nothing and fails nothing: it cannot tell.
    """

    metric: Metric
    compare: Literal["value", "difference", "relative"] = "value"
    at_least: Real | None = None
    at_most: Real | None = None
    evidence: Literal["estimate", "interval"] = "estimate"
    min_rows: Positive = 50
    min_base: Real | None = None

    @model_validator(mode="after")
    def one_bound(self) -> Check:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self

    @model_validator(mode="after")
    def has_an_interval(self) -> Check:
        proportion = self.metric != "reasoning_nll"
        if self.evidence == "interval" and self.compare == "relative" and proportion:
            raise ValueError(
                f"a relative change of {self.metric} has no interval; compare the difference"
            )
        return self


class EvalRecipe(Frozen):
    """What is measured on base and aligned model, and the gate that decides the release."""

    suites: tuple[Suite, ...] = Field(min_length=1)
    gate: tuple[Check, ...] = Field(min_length=1)
    batch_rows: Positive = 64
    temperature: Annotated[Real, Field(ge=0.0)] = 0.0
    seed: Whole = 0
    confidence: Annotated[Real, Field(gt=0.5, lt=1.0)] = 0.95
