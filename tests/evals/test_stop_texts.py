"""Stop texts end an answer, and never the think section before it; by either engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import GREEDY, answers, asked_of, context, opened, text_of
from serving import Asked, RealModels, Said, completion, models, serving

from pipeline.data.chat import Chat, cut
from pipeline.data.rows import Row
from pipeline.evals.asking import Request
from pipeline.evals.engines import Embedded, request_for
from pipeline.evals.generate import generate
from pipeline.evals.score import respond
from pipeline.evals.verdicts import Item
from pipeline.model.base import load_model, load_tokenizer
from pipeline.recipes import ChatRecipe, Suite

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.mark.parametrize(
    ("answer", "stop", "kept"),
    [
        ("One. Two. Three.", (". ",), "One"),
        ("One. Two. Three.", ("Three", "Two"), "One. "),
        ("One. Two.", ("Four",), None),
        ("One", (), None),
        ("\nQ: more", ("\nQ:",), ""),
        ("a\u00e9\U0001f600b", ("\U0001f600",), "a\u00e9"),
    ],
)
def test_cut(answer: str, stop: tuple[str, ...], kept: str | None) -> None:
    assert cut(answer, stop) == kept


class Says:
    """A real engine in all but what it says: the model is replaced by a text, token by token."""

    def __init__(self, chat: Chat, text: str, stop: tuple[str, ...]) -> None:
        self.ids = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        self.engine = Embedded(None, chat, GREEDY)  # type: ignore[arg-type]
        messages = ({"role": "user", "content": "How?"},)
        self.request = request_for(chat, "s:1", messages, 200, 0, stop)

    def stopped_at(self) -> int:
        """After how many tokens it stops; all of them when it does not."""
        for made in range(1, len(self.ids)):
            if self.engine._stopped(self.request, self.ids[:made]):
                return made
        return len(self.ids)


@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("One.\n\nTwo.", ("\n\n",), "One.\n\n"),
        ("One.\n\nTwo.", ("\n\n\n",), None),
        ("<think>\nHm.\n\nWell.\n</think>\n\nOne.\n\nTwo.", ("\n\n",), "One.\n\n"),
        ("<think>\nHm.\n\nWell.\n\nHm.", ("\n\n", "Hm"), None),  # never closed
        ("<think>\nQ: no\n</think>\n\nFine.", ("Q:",), None),
        ("Caf\u00e9 \U0001f600 end", ("\u00e9 \U0001f600",), "Caf\u00e9 \U0001f600"),
        (
            "a" * 300 + "STOP HERE AND NOT LATER, PLEASE" + "b" * 50,
            ("E AND NOT LATER, PLEASE",),
            "PLEASE",
        ),
    ],
)
def test_generation_ends_with_the_token_that_completes_a_stop(
    chat: Chat, text: str, stop: tuple[str, ...], said: str | None
) -> None:
    says = Says(chat, text, stop)
    made = says.stopped_at()
    if said is None:
        assert made == len(says.ids)
        return
    before, so_far = (chat.tokenizer.decode(says.ids[:n]) for n in (made - 1, made))
    assert said in so_far and said not in before.rpartition("</think>\n\n")[2]


def test_a_prompt_that_opens_the_section(folders: dict[str, Path]) -> None:
    recipe = ChatRecipe(generation_prompt="<|im_start|>assistant\n<think>\n")
    chat = Chat(load_tokenizer(folders["base"]), recipe)
    says = Says(chat, "Q: Hm.\n</think>\n\nA. Q: more", ("Q:",))
    so_far = chat.tokenizer.decode(says.ids[: says.stopped_at()])
    assert so_far.endswith("A. Q:")


def test_rows_stop_apart_and_the_others_go_on(folders: dict[str, Path], chat: Chat) -> None:
    """The real generation: what is made is what would be made, up to the stop."""
    model: Any = load_model(folders["aligned"], torch.float32)
    engine = Embedded(model, chat, GREEDY)
    whole = answers(engine, asked_of(chat, 24))
    texts = [text_of(chat, one) for one in whole]
    letter = next(c for c in "aeinorst" if 2 <= sum(c in text for text in texts) < len(texts))
    stopped = answers(engine, asked_of(chat, 24, stop=(letter,)))
    for one, other in zip(stopped, whole, strict=True):
        assert one.ids == other.ids[: len(one.ids)]
        text = text_of(chat, one)
        if letter in text_of(chat, other):
            assert letter in text and letter not in chat.tokenizer.decode(one.ids[:-1])
        else:
            assert one == other
    assert sum(len(g.ids) for g in stopped) < sum(len(g.ids) for g in whole)


def test_equal_prompts_with_other_stops_are_not_answered_as_one(folders: dict[str, Path]) -> None:
    model: Any = load_model(folders["aligned"], torch.float32)
    asked = [Request("a", [5, 6, 7], 9), Request("b", [5, 6, 7], 9, stop=("x",))]
    one, other = generate(
        model,
        asked,
        end_ids={2},
        batch_rows=2,
        stopped=lambda request, ids: bool(request.stop) and len(ids) == 3,
    )
    assert (len(one.ids), len(other.ids)) == (9, 3)


def items(count: int, **suite: Any) -> list[Item]:
    made = Suite(name="s", measures="benign", source="x.jsonl", max_new_tokens=24, **suite)
    messages = [{"role": "user", "content": f"Question {i}?"} for i in range(count)]
    return [Item(made, Row(f"s:{i}", i, f"x:{i}", (m,))) for i, m in enumerate(messages)]


def rows_of(engine: Any, chat: Chat, tmp_path: Path, found: list[Item]) -> list[dict[str, Any]]:
    return respond(engine, chat, found, GREEDY, context(tmp_path), identity="i", title="t")


@pytest.mark.parametrize("form", ["tokens", "text", "chat"])
def test_both_engines_give_the_same_rows(
    real: RealModels, folders: dict[str, Path], chat: Chat, tmp_path: Path, form: str
) -> None:
    wanted = items(6, stop=("e", "st"))
    model: Any = load_model(folders["aligned"], torch.float32)
    here = rows_of(Embedded(model, chat, GREEDY), chat, tmp_path / "here", wanted)
    with serving(real) as site:
        engine = opened(chat, tmp_path, "aligned", form)
        there = rows_of(engine, chat, tmp_path / "there", wanted)
    same = ("response", "think", "verdict", "truncated")
    assert [[row[k] for k in same] for row in here] == [[row[k] for k in same] for row in there]
    assert any(row["response"] and not row["truncated"] for row in here)
    assert all("e" not in row["response"] and "st" not in row["response"] for row in here)
    assert all("stop" not in body for body in site.posted()), "it would fire while the model thinks"


def replied(chat: Chat, tmp_path: Path, text: str, finish: str, *stop: str) -> dict[str, Any]:
    """The response row of one answer from a server."""

    def answer(asked: Asked) -> Said:
        return models("m") if asked.body is None else completion(text, finish)

    with serving(answer):
        (row,) = rows_of(opened(chat, tmp_path, "m"), chat, tmp_path / "s", items(1, stop=stop))
    return row


@pytest.mark.parametrize(
    ("text", "finish", "response", "truncated", "verdict"),
    [
        ("Sure. Q: next", "length", "Sure. ", False, "compliance"),  # it was over before the limit
        ("Sure. Q: next", "stop", "Sure. ", False, "compliance"),
        ("Sure. And", "length", "Sure. And", True, "compliance"),
        ("<think>\nQ: I", "length", "", True, "truncated"),
        ("<think>\nQ: I\n</think>\n\nSure. Q: next", "length", "Sure. ", False, "compliance"),
        ("<think>\nQ: I\n</think>\n\nSu", "length", "Su", True, "compliance"),
        ("Q: next", "stop", "", False, "empty"),
    ],
)
def test_what_was_cut_off_stays_cut_off(
    chat: Chat,
    tmp_path: Path,
    text: str,
    finish: str,
    response: str,
    truncated: bool,
    verdict: str,
) -> None:
    row = replied(chat, tmp_path, text, finish, "Q:")
    assert (row["response"], row["truncated"], row["verdict"]) == (response, truncated, verdict)


@pytest.mark.parametrize(
    ("prompt_end", "marks", "sent"),
    [
        ("<think>\n\n</think>\n\n", {}, True),  # thinking switched off
        ("", {"think_open": "", "think_close": ""}, True),  # a chat that has none
        ("", {}, False),
        ("<think>\n", {}, False),
    ],
)
def test_the_servers_own_stop_is_used_only_where_nothing_is_thought(
    folders: dict[str, Path],
    tmp_path: Path,
    prompt_end: str,
    marks: dict[str, str],
    sent: bool,
) -> None:
    recipe = ChatRecipe(generation_prompt=f"<|im_start|>assistant\n{prompt_end}", **marks)
    chat = Chat(load_tokenizer(folders["base"]), recipe)
    stop = ("Q:", "\n\n\n", "a", "b", "c")

    def answer(asked: Asked) -> Said:
        return models("m") if asked.body is None else completion("Fine.")

    with serving(answer) as site:
        answers(opened(chat, tmp_path, "m"), asked_of(chat, stop=stop)[:1])
    (_, body) = site.posted()
    assert body.get("stop") == (list(stop[:4]) if sent else None)
