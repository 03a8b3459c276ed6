"""Recipes of data: where rows come from, how they are cleaned, answered and rendered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipes.fields import Fraction, Frozen, Name, Positive, Real, TopP, Whole


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
    ``anchor``: prompt only, to be answered by the base model itself.

    ``most``: at most so many of the rows that are left when all else is dropped, as many of each
    category as there can be, chosen by a hash of seed and prompt.
    """

    kind: Literal["refusal", "answer", "anchor"]
    most: Positive | None = None
    repeat: Positive = 1


class PrepRecipe(Frozen):
    """Raw rows to conversations. ``decontaminate``: rows that share their prompt or a run of words
    with a row of an evaluation suite are dropped (data/contamination.py); ``exclude``: further sets
    that must not be trained on, by the same test. ``languages``: prompts that are surely in none of
    these are dropped (ISO 639 codes; none given: all stay).

    A refusal row without a response gets ``refusal_response``, by default one of the short refusals
    that ship with the project. One text for all leaves a small model nothing to learn but when.
    ``safety_primer``: of every refusal row only the beginning of a think section is trained, this
    text and no end; what the model then thinks and says is its own (SAFEPATH, arXiv 2505.14667).
    """

    sources: tuple[TrainSource, ...] = Field(min_length=1)
    exclude: tuple[SourceRecipe, ...] = ()
    decontaminate: bool = True
    languages: tuple[str, ...] = ()
    refusal_think: str | None = None
    refusal_response: str | None = None
    safety_primer: str | None = None
    dev_fraction: Annotated[Real, Field(ge=0.0, le=0.5)] = 0.1
    near_duplicate_threshold: Fraction = 0.8
    min_prompt_characters: Positive = 1
    max_prompt_characters: Positive = 8000
    seed: Whole = 0


class ServedModel(Frozen):
    """A model on an OpenAI-compatible server, by the name that it has there. Where the server is, and
    its key, is no part of an experiment: UNTAXED_ENDPOINT and UNTAXED_API_KEY say so.

    ``prompt``: what is sent. ``tokens``, the very tokens that training sees (vLLM, SGLang, llama.cpp);
    ``text``, the rendered chat, for the server to tokenise; ``chat``, messages, for a server that
    renders them by a template of its own.
    """

    model: str = Field(min_length=1)
    prompt: Literal["tokens", "text", "chat"] = "tokens"


class RewriteRecipe(Frozen):
    """The base model words the refusals itself (ThinkSafe, arXiv 2601.23143; DGR, arXiv 2602.02136):
    asked with ``instruction`` before the user's last words, trained without it. A row keeps the
    response of prep where none of ``tries`` answers is whole and a refusal.

    Temperature, ``top_p``, seed and endpoint are those of the anchors.
    """

    instruction: str = (
        "Decline the following request in one or two sentences. Say that you will not help with it"
        " and briefly why, without any detail of what it asks for. Do not mention this instruction."
    )
    max_new_tokens: Positive = 256
    tries: Positive = 1

    @model_validator(mode="after")
    def says_something(self) -> RewriteRecipe:
        if not self.instruction.strip():
            raise ValueError("instruction is empty; leave it out for the project's own")
        return self


class AnchorRecipe(Frozen):
    """The base model answers the anchor prompts in its own words (ThinkSafe, arXiv 2601.23143).

    ``truncated``: what to do with an answer that did not end within ``max_new_tokens``: drop it, or
    keep it without an end token for KL, where the base's own distribution is the target.
    ``endpoint``: a server answers, in place of this process; ``batch_rows`` then is how many requests
    it gets at once. ``rewrite_refusals``: it words the refusals as well.
    """

    max_new_tokens: Positive = 256
    truncated: Literal["drop", "keep"] = "drop"
    drop_refusals: bool = True
    batch_rows: Positive = 64
    temperature: Annotated[Real, Field(ge=0.0)] = 0.0
    top_p: TopP = 1.0
    seed: Whole = 0
    endpoint: ServedModel | None = None
    rewrite_refusals: RewriteRecipe | None = None

    @model_validator(mode="after")
    def greedy_draws_nothing(self) -> AnchorRecipe:
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("temperature 0 draws nothing, so top_p has no effect; leave it out")
        if self.temperature == 0 and self.rewrite_refusals and self.rewrite_refusals.tries > 1:
            raise ValueError(
                "temperature 0 draws nothing, so every try would be the first; leave"
                " rewrite_refusals.tries out"
            )
        return self
