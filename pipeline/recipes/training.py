"""Recipes of training: packing, adapters, optimiser, losses, and the merge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.errors import RecipeError
from pipeline.recipes.fields import Fraction, Frozen, Positive, Real, Whole


class Batch(Frozen):
    """Size of one optimiser step: in documents (``rows``) or in tokens without padding (``tokens``)."""

    rows: Positive | None = None
    tokens: Positive | None = None

    @model_validator(mode="after")
    def one_unit(self) -> Batch:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give exactly one of rows and tokens")
        return self


class PackRecipe(Frozen):
    """Conversations to packed token rows. Documents longer than ``max_length`` are dropped."""

    max_length: Positive = 1024
    seed: Whole = 0


class Layers(Frozen):
    """Decoder layers to adapt: inclusive indices, or fractions of the depth (default: all)."""

    first: Annotated[Whole, Field(ge=0)] | None = None
    last: Annotated[Whole, Field(ge=0)] | None = None
    from_fraction: Fraction | None = None
    to_fraction: Fraction | None = None

    @model_validator(mode="after")
    def one_form(self) -> Layers:
        indices, fractions = (self.first, self.last), (self.from_fraction, self.to_fraction)
        if any(v is not None for v in indices) and any(v is not None for v in fractions):
            raise ValueError("give first and last, or from_fraction and to_fraction, not both")
        for low, high in (indices, fractions):
            if (low is None) != (high is None):
                raise ValueError("a range needs both of its ends")
            if low is not None and high is not None and low > high:
                raise ValueError(f"the range {low}..{high} is empty")
        return self

    def select(self, depth: int) -> tuple[int, ...]:
        """The layer indices of a model with ``depth`` layers; RecipeError when out of range."""
        if self.first is not None and self.last is not None:
            first, stop = self.first, self.last + 1
            if stop > depth:
                raise RecipeError(
                    f"sft.lora.layers.last={self.last} is out of range: the model has layers"
                    f" 0..{depth - 1}; lower it, or use from_fraction and to_fraction"
                )
        elif self.from_fraction is not None and self.to_fraction is not None:
            first, stop = round(self.from_fraction * depth), round(self.to_fraction * depth)
        else:
            first, stop = 0, depth
        if first >= stop:
            raise RecipeError(f"sft.lora.layers selects no layer of {depth}; widen the range")
        return tuple(range(first, stop))


MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraRecipe(Frozen):
    """Low-rank adapters (arXiv 2106.09685; rank 1 on up_proj in the middle: arXiv 2507.17075).

    The update is scale * B A. ``alpha_policy``: fixed, scale = alpha / rank; proportional,
    scale = alpha (the update does not shrink with rank); rslora, alpha / sqrt(rank).
    """

    rank: Positive = 1
    alpha: Annotated[Real, Field(gt=0)] = 16.0
    alpha_policy: Literal["fixed", "proportional", "rslora"] = "fixed"
    init: Literal["default", "pissa", "olora", "orthogonal"] = "default"
    targets: tuple[str, ...] | Literal["all-linear", "mlp", "attention"] = ("up_proj",)
    layers: Layers = Layers()
    dropout: Annotated[Real, Field(ge=0.0, lt=1.0)] = 0.0

    @property
    def scale(self) -> float:
        """The factor on B A."""
        if self.alpha_policy == "proportional":
            return self.alpha
        return self.alpha / (self.rank if self.alpha_policy == "fixed" else self.rank**0.5)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the linear modules to adapt."""
        named = {"all-linear": ATTENTION + MLP, "mlp": MLP, "attention": ATTENTION}
        return named[self.targets] if isinstance(self.targets, str) else self.targets


class OptimizerRecipe(Frozen):
    """AdamW and its schedule (decay to zero over all steps, after a linear warm-up)."""

    learning_rate: Annotated[Real, Field(gt=0)] = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Annotated[Real, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[Real, Field(gt=0)] | None = 1.0


class AnchorLoss(Frozen):
    """What anchor rows are trained for: ``sft``, cross-entropy on the base's own answer; ``kl``,
    KL(base || model) on those tokens, from the base's ``top_k`` log-probabilities and one bucket
    for the rest."""

    objective: Literal["sft", "kl"] = "sft"
    weight: Annotated[Real, Field(ge=0)] = 1.0
    top_k: Positive = 64


class SftRecipe(Frozen):
    """Supervised fine-tuning. ``lora: null`` is full fine-tuning; ``quantization`` is of the base."""

    lora: LoraRecipe | None = LoraRecipe()
    quantization: Literal["none", "nf4"] = "none"
    optimizer: OptimizerRecipe = OptimizerRecipe()
    batch: Batch = Batch(rows=16)
    epochs: Positive = 4
    precision: Literal["bf16", "fp32"] = "bf16"
    anchors: AnchorLoss = AnchorLoss()
    seed: Whole = 0

    @model_validator(mode="after")
    def quantized_needs_lora(self) -> SftRecipe:
        if self.lora is None and self.quantization != "none":
            raise ValueError("full fine-tuning of a quantized base is not possible; set lora")
        return self


class MergeRecipe(Frozen):
    """Adapter into base. ``survival_floor``: least share of the update that must survive rounding
    to the base's dtype; below it, refuse, or write the whole model in fp32."""

    epoch: Positive | None = None
    scale: Annotated[Real, Field(ge=0)] = 1.0
    survival_floor: Fraction = 0.5
    below_floor: Literal["refuse", "fp32"] = "refuse"
