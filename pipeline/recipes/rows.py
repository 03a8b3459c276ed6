"""Recipes of data: where rows come from, how they are cleaned, answered and rendered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipes.fields import Fraction, Frozen, Name, Positive, Real, Whole


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
