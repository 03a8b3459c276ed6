"""Further judges: models that are asked about answers, by the engines that give answers.

Each writes into the response rows, under ``judges``, what it says of them. What cannot be read is
``invalid``, and an answer that holds nothing is ``unanswered`` and not asked about; neither is taken for
any side.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.data.chat import Chat
from pipeline.errors import DataError
from pipeline.evals.asking import Generation, Request
from pipeline.evals.engines import Embedded, Engine
from pipeline.evals.guard import guard_messages, read_guard
from pipeline.evals.ledger import answer
from pipeline.evals.rubric import read_rubric, rubric_messages
from pipeline.evals.score import Sampling, load_for_inference
from pipeline.model.base import load_tokenizer
from pipeline.recipes import ChatRecipe, JudgeRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.stage import Context

INVALID, UNANSWERED = "invalid", "unanswered"
SHOWN = 200  # characters of what could not be read
KINDS = {"guard": (guard_messages, read_guard), "rubric": (rubric_messages, read_rubric)}


@dataclass
class Judge:
    """A judge whose model, where it is in this process, is yet to be loaded."""

    recipe: JudgeRecipe
    batch_rows: int
    context: Context
    source: Artifact | None
    chat: Chat | None
    served: Engine | None

    @property
    def name(self) -> str:
        return self.recipe.title

    def engine(self) -> Engine:
        if self.served is not None:
            return self.served
        assert self.source is not None and self.chat is not None
        _let_go()
        model = load_for_inference(self.source.folder)
        return Embedded(model, self.chat, Sampling(self.batch_rows, 0.0, 0), self.context.console)

    def text_of(self, row: Mapping[str, Any]) -> str:
        """What of a response row is judged. Thoughts come without their marks: some templates leave
        out what stands between these."""
        think = row["think"] if self.recipe.reads == "whole" else None
        parts = [part.strip() for part in (think, row["response"]) if part]
        return "\n\n".join(part for part in parts if part)

    def request(self, row: Mapping[str, Any], model: PreTrainedModel | None) -> Request:
        """DataError where the template refuses the conversation, or the model cannot hold it."""
        messages = KINDS[self.recipe.kind][0](row["prompt"], self.text_of(row))
        ids = self.chat.prompt_ids(messages) if self.chat else []
        request = Request(_id(row), ids, self.recipe.max_new_tokens, messages)
        if model is not None:
            from pipeline.evals.generate import check_requests

            check_requests(model, [request])
        return request

    def read(self, generation: Generation) -> dict[str, Any]:
        """The verdict in a reply; ``invalid``, with what was said, where there is none."""
        if generation.error is not None:  # which may name the server, and rows may not
            return {"verdict": INVALID, "said": None}
        text = generation.text
        if text is None:
            assert self.chat is not None
            text = str(self.chat.tokenizer.decode(generation.ids, skip_special_tokens=True))
        prompt = self.chat.prompt_text(guard_messages("a", "b")) if self.chat else ""
        found = KINDS[self.recipe.kind][1](after_thoughts(text, self.recipe.chat, prompt))
        return found or {"verdict": INVALID, "said": text[:SHOWN]}


def after_thoughts(text: str, recipe: ChatRecipe, prompt: str) -> str:
    """What a judge says when it has thought; nothing where it did not get that far."""
    open_, close = recipe.think_open.strip(), recipe.think_close.strip()
    if close and close in text:
        return text.rpartition(close)[2]
    opened = open_ and (prompt.rstrip().endswith(open_) or text.lstrip().startswith(open_))
    return "" if opened else text


def open_judges(
    recipes: Sequence[JudgeRecipe],
    inputs: Mapping[str, Artifact],
    batch_rows: int,
    context: Context,
) -> list[Judge]:
    """All judges, each found to be there before a row is answered; no model is loaded yet."""
    judges = []
    for recipe in recipes:
        source = inputs[f"judge.{recipe.title}"] if recipe.model else None
        chat = Chat(load_tokenizer(source.folder), recipe.chat) if source else None
        served = None
        if recipe.endpoint is not None:
            from pipeline.evals.served_judge import open_served

            served = open_served(recipe, recipe.endpoint, batch_rows, context)
        judges.append(Judge(recipe, batch_rows, context, source, chat, served))
    return judges


def judge_rows(judges: Sequence[Judge], rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write ``row["judges"][name]`` into all ``rows`` but those of reasoning.

    One model is in memory at a time, that of ``rows`` should be gone. What is finished is kept in the
    scratch folder, answer by answer.
    """
    for number, judge in enumerate(judges):
        engine = judge.engine()
        kept = judge.context.scratch / f"judge-{number}.jsonl"
        said = _asked(judge, engine, rows, kept, f"{title}: judge {judge.name}")
        del engine
        counts: Counter[str] = Counter()
        for row in rows:
            if row["measures"] != "reasoning":
                verdict = said.get(_id(row), {"verdict": UNANSWERED})
                row.setdefault("judges", {})[judge.name] = verdict
                counts[verdict["verdict"]] += 1
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        judge.context.log(f"{title}: judge {judge.name}: {told or 'nothing to judge'}")


def _asked(
    judge: Judge,
    engine: Engine,
    rows: Sequence[Mapping[str, Any]],
    kept: Path,
    title: str,
) -> dict[str, dict[str, Any]]:
    """What the judge says of each answer that holds something, by the answer's id."""
    model = engine.model if isinstance(engine, Embedded) else None
    requests: list[Request] = []
    said: dict[str, dict[str, Any]] = {}
    errors: list[str] = []
    for row in rows:
        if row["measures"] == "reasoning" or not judge.text_of(row):
            continue
        try:
            requests.append(judge.request(row, model))
        except DataError as error:
            said[_id(row)] = {"verdict": INVALID, "said": None}
            errors.append(str(error))
    asked = json.dumps([[request.id, request.messages] for request in requests])
    identity = [
        judge.source.digest if judge.source else engine.identity,
        judge.recipe.model_dump_json(),
        hashlib.sha256(asked.encode()).hexdigest(),
    ]
    replies = answer(
        engine,
        requests,
        path=kept,
        identity=" ".join(identity),
        title=title,
        log=judge.context.log,
    )
    for request, reply in zip(requests, replies, strict=True):
        said[request.id] = judge.read(reply)
        errors += [reply.error] if reply.error is not None else []
    if errors:
        judge.context.log(f"{title}: {len(errors)} could not be asked; the last: {errors[-1]}")
    return said


def _id(row: Mapping[str, Any]) -> str:
    return f"{row['id']}#{row['sample']}" if row.get("sample") else str(row["id"])


def _let_go() -> None:
    """Give back the memory of a model that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
