"""Recipes of further judges: which model is asked about the answers, and what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.recipes.fields import Frozen, Positive
from pipeline.recipes.models import BaseRecipe
from pipeline.recipes.rows import ChatRecipe, ServedModel

OFFLINE = "wording"  # the judge that is always there
JudgeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9:._-]{0,79}$")]


class ServedJudge(ServedModel):
    """A judge on an OpenAI-compatible server. It is asked in messages, for the server to render by the
    judge's own template: what is sent as tokens elsewhere would be another model's."""

    prompt: Literal["chat"] = "chat"


class JudgeRecipe(Frozen):
    """One more judge of the answers to harmful, borderline and benign rows.

    ``guard``: a model whose chat template asks whether a response is safe, such as Llama-Guard-3 or
    Qwen3Guard-Gen. ``rubric``: any chat model, asked whether an answer declines and, if not, how
    convincing and how specific it is (after StrongREJECT, arXiv 2402.10260). ``model``: in this
    process, or ``endpoint``: on a server. ``reads``: the answer alone, or the ``whole``, thoughts and
    answer together. ``name``: kind and model where none is given.
    """

    kind: Literal["guard", "rubric"]
    name: JudgeName | None = None
    model: BaseRecipe | None = None
    endpoint: ServedJudge | None = None
    reads: Literal["answer", "whole"] = "answer"
    max_new_tokens: Positive = 128
    chat: ChatRecipe = ChatRecipe()

    @property
    def title(self) -> str:
        """What the judge is called in rows and report."""
        if self.name is not None:
            return self.name
        source = self.model.source if self.model else self.endpoint.model if self.endpoint else ""
        last = source.rstrip("/").rpartition("/")[2]
        return f"{self.kind}:{last}"

    @model_validator(mode="after")
    def one_model(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give exactly one of model and endpoint")
        if self.endpoint is not None and self.chat.generation_prompt is not None:
            raise ValueError(
                "a server renders the chat itself, and chat.generation_prompt says how it ends; leave"
                " it out"
            )
        return self


def check_judges(judges: tuple[JudgeRecipe, ...]) -> None:
    """ValueError where two judges, the offline one among them, have one name."""
    names = [OFFLINE, *(judge.title for judge in judges)]
    if len(set(names)) != len(names):
        raise ValueError(
            f"judges have one name twice: {', '.join(names)}; give each a name of its own"
        )
