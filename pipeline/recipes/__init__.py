"""What a job file may say: one frozen model for each stage, and Job. The knobs, a page for data, for
training and for evaluation.

Torch-free. Only what has identity lives here: a path of this machine, a GPU count or an image never
does. ``execution`` is the exception that proves it: its fields change speed and never results, and
are left out of every key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipes.choosing import DEV_TOKENS, ChooseRecipe, DevRows
from pipeline.recipes.evaluation import (
    METRICS,
    Bound,
    Check,
    DevMetric,
    EvalEndpoint,
    EvalRecipe,
    EvalSource,
    Metric,
    Suite,
)
from pipeline.recipes.fields import Frozen, Name, Real
from pipeline.recipes.judging import OFFLINE, JudgeRecipe, ServedJudge
from pipeline.recipes.models import BaseRecipe, Geometry
from pipeline.recipes.rows import (
    AnchorRecipe,
    ChatRecipe,
    Columns,
    PrepRecipe,
    RewriteRecipe,
    ServedModel,
    SourceRecipe,
    TrainSource,
)
from pipeline.recipes.training import (
    ATTENTION,
    MLP,
    AnchorLoss,
    Batch,
    Layers,
    LoraRecipe,
    MergeRecipe,
    OptimizerRecipe,
    PackRecipe,
    SftRecipe,
)

__all__ = [
    "ATTENTION",
    "DEV_TOKENS",
    "AnchorLoss",
    "AnchorRecipe",
    "BaseRecipe",
    "Batch",
    "Bound",
    "ChatRecipe",
    "Check",
    "ChooseRecipe",
    "Columns",
    "DevMetric",
    "DevRows",
    "EvalEndpoint",
    "EvalRecipe",
    "EvalSource",
    "Execution",
    "Frozen",
    "Geometry",
    "Job",
    "JudgeRecipe",
    "Layers",
    "LoraRecipe",
    "METRICS",
    "MLP",
    "MergeRecipe",
    "Metric",
    "OFFLINE",
    "OptimizerRecipe",
    "PackRecipe",
    "PrepRecipe",
    "RewriteRecipe",
    "ServedJudge",
    "ServedModel",
    "SftRecipe",
    "SourceRecipe",
    "Suite",
    "TrainSource",
]


class Execution(Frozen):
    """How fast, never what: left out of every key.

    ``activation_checkpointing``: make a layer's activations again in backward; "auto" does so where
    they would not fit the device (see ``untaxed plan``).
    ``frozen_prefix``: run the layers below the first adapted one once, and keep their output on
    disk up to ``prefix_cache_gb`` in all jobs together, with the base's predictions on anchor tokens
    (what does not fit is computed each time). ``collective_timeout_seconds``: how long a rank may
    show no progress while others wait for it; ``divergence_nats``: training stops when the loss of
    the last steps, in nats a token, is this far above the lowest it has been.
    ``request_timeout_seconds``: how long a server may take for one answer.
    """

    activation_checkpointing: bool | Literal["auto"] = "auto"
    frozen_prefix: bool = True
    prefix_cache_gb: Annotated[Real, Field(ge=0)] = 50.0
    checkpoint_seconds: Annotated[Real, Field(gt=0)] = 300.0
    collective_timeout_seconds: Annotated[Real, Field(ge=5)] = 1800.0
    divergence_nats: Annotated[Real, Field(gt=0)] = 5.0
    request_timeout_seconds: Annotated[Real, Field(gt=0)] = 1800.0


class Job(Frozen):
    """One experiment: base, data, the recipe of every stage, and the gate."""

    name: Name
    base: BaseRecipe
    chat: ChatRecipe = ChatRecipe()
    prep: PrepRecipe
    anchor: AnchorRecipe | None = None
    pack: PackRecipe = PackRecipe()
    sft: SftRecipe = SftRecipe()
    choose: ChooseRecipe | None = None
    merge: MergeRecipe = MergeRecipe()
    eval: EvalRecipe
    execution: Execution = Execution()

    @model_validator(mode="after")
    def sections_agree(self) -> Job:
        kinds = {s.kind for s in self.prep.sources}
        rewrites = self.anchor is not None and self.anchor.rewrite_refusals is not None
        if "anchor" in kinds and self.anchor is None:
            raise ValueError("prep.sources has anchor rows but there is no anchor section")
        if self.anchor and "anchor" not in kinds and not rewrites:
            raise ValueError("there is an anchor section but no prep source of kind anchor")
        for knob, said in (
            ("anchor.rewrite_refusals", rewrites),
            ("prep.safety_primer", self.prep.safety_primer is not None),
        ):
            if said and "refusal" not in kinds:
                raise ValueError(
                    f"{knob} needs a prep source of kind refusal; add one or leave it out"
                )
        if rewrites and self.prep.safety_primer is not None:
            raise ValueError(
                "prep.safety_primer leaves no refusal to rewrite; leave anchor.rewrite_refusals out"
            )
        for name in ("refusal_think", "refusal_response"):
            if self.prep.safety_primer is not None and getattr(self.prep, name) is not None:
                raise ValueError(
                    f"prep.{name} and prep.safety_primer both say what a refusal row trains; keep one"
                )
        if self.anchor and self.anchor.truncated == "keep" and self.sft.anchors.objective == "sft":
            raise ValueError("anchor.truncated: keep needs sft.anchors.objective: kl")
        if self.merge.epoch is not None and self.merge.epoch > self.sft.epochs:
            raise ValueError(f"merge.epoch={self.merge.epoch} but sft.epochs={self.sft.epochs}")
        names = [s.name for s in self.prep.sources]
        suites = [s.name for s in self.eval.suites]
        for group, where in ((names, "prep.sources"), (suites, "eval.suites")):
            if len(set(group)) != len(group):
                raise ValueError(f"{where} has two entries of one name: {sorted(group)}")
        return self

    @model_validator(mode="after")
    def choice_agrees(self) -> Job:
        choose = self.choose
        if choose is None:
            return self
        if self.merge.epoch is not None or "scale" in self.merge.model_fields_set:
            raise ValueError("choose finds epoch and scale; leave merge.epoch and merge.scale out")
        if self.merge.below_floor == "fp32":
            raise ValueError(
                "choose measures models in the base's precision; leave merge.below_floor out"
            )
        beyond = [epoch for epoch in choose.epochs or () if epoch > self.sft.epochs]
        if beyond:
            raise ValueError(f"choose.epochs has {beyond[0]} but sft.epochs={self.sft.epochs}")
        if self.sft.lora is None and choose.scales != (1.0,):
            raise ValueError(
                "choose.scales needs an adapter, and sft.lora is null; set choose.scales: [1.0]"
            )
        choose.check_rows(self.prep, self.eval.suites)
        return self
