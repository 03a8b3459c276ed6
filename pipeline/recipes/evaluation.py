"""Recipes of evaluation: suites, and the gate that decides the release."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from pipeline.recipes.fields import Frozen, Positive, Real, TopP, Whole
from pipeline.recipes.judging import JudgeRecipe, check_judges
from pipeline.recipes.rows import ServedModel, SourceRecipe


class EvalSource(SourceRecipe):
    """Rows that are measured on: which they are, and nothing of how."""

    measures: Literal["harmful", "borderline", "benign", "reasoning"]


class Suite(EvalSource):
    """One evaluation set. ``harmful`` and the benign ones measure refusals; ``reasoning``: what
    a right answer is follows from the data (a number, an expression, an option's letter, a text, a
    program that passes its tests in a sandbox), and the loss on the worked answer, where there is one,
    in nats per token. ``stop``: an answer ends before the first of these
    texts, which count only after the think section."""

    max_new_tokens: Positive = 64
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @property
    def whole(self) -> EvalSource:
        """The rows that may not be trained on: also those that ``limit`` leaves out."""
        said = {name: getattr(self, name) for name in EvalSource.model_fields}
        return EvalSource(**said | {"limit": None})


Metric = Literal[
    "harmful_refusal",
    "borderline_refusal",
    "benign_refusal",
    "reasoning_accuracy",
    "reasoning_nll",
]
METRICS: tuple[str, ...] = get_args(Metric)
# What a choice among trainings may also go by: refusals of borderline and benign rows together, and
# the loss on the base's own answers to the development anchors, in nats per token.
DevMetric = Literal[Metric, "over_refusal", "anchor_nll"]


class Bound(Frozen):
    """A bound on one metric. ``compare``: the aligned value itself, its difference from the base, or
    its relative change."""

    metric: DevMetric
    compare: Literal["value", "difference", "relative"] = "value"
    at_least: Real | None = None
    at_most: Real | None = None

    @model_validator(mode="after")
    def one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self


class Check(Bound):
    """One line of the release gate. ``min_base``: a base below it tells nothing.

    ``evidence``: what has to be on the right side of the bound, the ``estimate`` or its whole
    ``interval`` (with a difference: a test of non-inferiority). An interval that holds the bound
    passes nothing and fails nothing: it cannot tell.
    """

    metric: Metric
    evidence: Literal["estimate", "interval"] = "estimate"
    min_rows: Positive = 50
    min_base: Real | None = None

    @model_validator(mode="after")
    def has_an_interval(self) -> Check:
        proportion = self.metric != "reasoning_nll"
        if self.evidence == "interval" and self.compare == "relative" and proportion:
            raise ValueError(
                f"a relative change of {self.metric} has no interval; compare the difference"
            )
        return self


class EvalEndpoint(Frozen):
    """Base and aligned model on one OpenAI-compatible server, by the names that they have there. See
    ServedModel."""

    base: str = Field(min_length=1)
    aligned: str = Field(min_length=1)
    prompt: Literal["tokens", "text", "chat"] = "tokens"

    @model_validator(mode="after")
    def two_models(self) -> EvalEndpoint:
        if self.base == self.aligned:
            raise ValueError("base and aligned have one name; serve the merged model under its own")
        return self

    def served(self, role: Literal["base", "aligned"]) -> ServedModel:
        """The model of that role."""
        return ServedModel(model=getattr(self, role), prompt=self.prompt)


class EvalRecipe(Frozen):
    """What is measured on base and aligned model, and the gate that decides the release.

    ``samples``: answers to each row, drawn apart; a metric is the mean over rows of the mean over
    samples. ``endpoint``: a server answers, in place of this process; ``batch_rows`` then is how many
    requests it gets at once. ``judges``: more judges beside the offline one; gate and metrics stay with
    that.
    """

    suites: tuple[Suite, ...] = Field(min_length=1)
    gate: tuple[Check, ...] = Field(min_length=1)
    batch_rows: Positive = 64
    temperature: Annotated[Real, Field(ge=0.0)] = 0.0
    top_p: TopP = 1.0
    samples: Positive = 1
    seed: Whole = 0
    confidence: Annotated[Real, Field(gt=0.5, lt=1.0)] = 0.95
    endpoint: EvalEndpoint | None = None
    judges: tuple[JudgeRecipe, ...] = ()

    @model_validator(mode="after")
    def judges_have_names(self) -> EvalRecipe:
        check_judges(self.judges)
        return self

    @model_validator(mode="after")
    def greedy_draws_nothing(self) -> EvalRecipe:
        for name, value in (("samples", self.samples), ("top_p", self.top_p)):
            if self.temperature == 0 and value != 1:
                raise ValueError(
                    f"temperature 0 draws nothing, so {name}={value:g} has no effect; leave it out,"
                    " or set temperature"
                )
        return self
