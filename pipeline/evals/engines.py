"""Who answers: a model in this process, or one on a server. Both are asked alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.data.chat import Chat, Message, cut
from pipeline.evals.asking import Generation, Request
from pipeline.recipes import ServedModel

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from pipeline.evals.score import Sampling
    from pipeline.stage import Context

Done = Callable[[int, Generation], None]
Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]


class Engine(Protocol):
    """Answers prompts. ``facts`` say who answers; what of it may change unseen is its ``identity``."""

    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def identity(self) -> str: ...

    def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
        """Call ``done(index, generation)`` for each of ``requests`` as soon as it is answered."""

    def losses(self, pairs: Pairs, title: str) -> list[tuple[float, int] | None]:
        """Summed cross-entropy in nats and token count of each target given its prompt; None where it
        could not be had. ``pairs``: (prompt ids, target ids)."""


@dataclass
class Embedded:
    """The model in this process."""

    model: PreTrainedModel
    chat: Chat
    sampling: Sampling
    console: Console | None = None
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        return {"engine": "embedded"}

    @property
    def identity(self) -> str:
        return ""

    def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
        from pipeline.evals.generate import end_tokens, generate

        generate(
            self.model,
            requests,
            end_ids=end_tokens(self.model, self.chat.end_id),
            batch_rows=self.sampling.batch_rows,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed,
            stopped=self._stopped,
            done=done,
            console=self.console,
            title=title,
        )

    def losses(self, pairs: Pairs, title: str) -> list[tuple[float, int] | None]:
        from pipeline.evals.generate import loss

        return list(loss(self.model, pairs, console=self.console, title=title))

    def _stopped(self, request: Request, ids: Sequence[int]) -> bool:
        """Whether the answer, after its think section, holds a stop text. The last tokens are looked
        at first: a character has at most four bytes, a token at least one."""
        if not request.stop:
            return False
        recent = 4 * max(len(text) for text in request.stop) + 1
        if not any(text in self._text(ids[-recent:]) for text in request.stop):
            return False
        if request.id not in self.prompts:
            self.prompts[request.id] = self.chat.prompt_text(list(map(dict, request.messages)))
        _, answer = self.chat.split_think(self._text(ids), prompt=self.prompts[request.id])
        return cut(answer, request.stop) is not None

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.chat.tokenizer.decode(ids, skip_special_tokens=True))


def request_for(
    chat: Chat,
    id: str,
    messages: Sequence[Message],
    max_new_tokens: int,
    sample: int = 0,
    stop: tuple[str, ...] = (),
) -> Request:
    """The request for one answer. Samples after the first have ids, and so seeds, of their own."""
    name = f"{id}#{sample}" if sample else id
    return Request(name, chat.prompt_ids(messages), max_new_tokens, messages, stop)


def open_engine(
    folder: Path, served: ServedModel | None, chat: Chat, sampling: Sampling, context: Context
) -> Engine:
    """The model in ``folder``, or the one that a server has in its place."""
    if served is None:
        from pipeline.evals.score import load_for_inference

        return Embedded(load_for_inference(folder), chat, sampling, context.console)
    from pipeline.evals.endpoint import connect

    return connect(served, chat, sampling, context)
