"""A judge on an OpenAI-compatible server: asked in messages, which its own template renders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.evals.asking import Generation, Request
from pipeline.evals.client import Client, Failed, Refused
from pipeline.evals.endpoint import find_served
from pipeline.evals.engines import Done, Pairs
from pipeline.evals.progress import Bar
from pipeline.evals.replies import answer_of
from pipeline.recipes import JudgeRecipe, ServedJudge

if TYPE_CHECKING:
    from pipeline.stage import Context


def open_served(
    recipe: JudgeRecipe, served: ServedJudge, connections: int, context: Context
) -> ServedMessages:
    """The judge on the server that this machine names; raises as ``find_served``."""
    client, reported = find_served(served, connections, context)
    return ServedMessages(recipe, served.model, client, reported, context)


@dataclass
class ServedMessages:
    """A model on a server that is asked in messages, and whose tokens nobody here knows."""

    recipe: JudgeRecipe
    model: str
    client: Client
    reported: dict[str, Any]
    context: Context

    @property
    def facts(self) -> dict[str, Any]:
        return {"engine": "endpoint", "prompt": "chat", "served": self.reported}

    @property
    def identity(self) -> str:
        return json.dumps(self.facts, sort_keys=True)

    def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
        """See Engine. What the server refuses for good, such as a row too long for it, it says nothing of:
        no other try would help."""
        refused: list[str] = []

        def asked(request: Request) -> Generation:
            try:
                found = self.client.ask("/chat/completions", self._body(request), answer_of)
            except Refused as error:
                refused.append(f"row {request.id}: {error}")
                return Generation([], False, "")
            except Failed as error:
                return Generation([], False, error=str(error))
            return Generation([], found.complete, found.text)

        with Bar(self.context.console, title, len(requests)) as bar:

            def told(index: int, generation: Generation) -> None:
                done(index, generation)
                bar.advance(0)

            self.client.each(requests, asked, told)
        if refused:
            self.context.log(
                f"{title}: {len(refused)} refused by the server; the last: {refused[-1]}"
            )

    def losses(self, pairs: Pairs, title: str) -> list[tuple[float, int] | None]:
        return [None] * len(pairs)

    def _body(self, request: Request) -> dict[str, Any]:
        system = self.recipe.chat.system
        first = [{"role": "system", "content": system}] if system is not None else []
        options = self.recipe.chat.template_options
        return {
            "model": self.model,
            "messages": [*first, *map(dict, request.messages)],
            "max_tokens": request.max_new_tokens,
            "temperature": 0.0,
            "seed": 0,
        } | ({"chat_template_kwargs": options} if options else {})
