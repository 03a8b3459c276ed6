"""The anchor stage on a small real model, against model.generate and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import sample_rows, seal_as
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.anchor import fill, loops, run
from pipeline.artifact import Artifact
from pipeline.data.chat import Chat
from pipeline.errors import DataError, RecipeError
from pipeline.evals.generate import Generation
from pipeline.evals.score import read_lines
from pipeline.graph import AnchorStep
from pipeline.model.base import load_tokenizer
from pipeline.recipes import AnchorRecipe, ChatRecipe
from pipeline.stage import Context


def row(kind: str, index: int, prompt: str, response: str | None = None) -> dict[str, Any]:
    return {
        "id": f"{kind}:{index}",
        "source": kind,
        "kind": kind,
        "category": "c",
        "messages": [{"role": "user", "content": prompt}],
        "think": None,
        "response": response,
    }


def prepared(runs: Path, anchors: int = 9) -> Artifact:
    """Sealed conversations: refusals and anchors by turns in train, one of each in dev."""
    harmful, ordinary = sample_rows("harmful"), sample_rows("ordinary")

    def write(folder: Path) -> None:
        rows = []
        for i in range(anchors):
            rows.append(row("refusal", i, harmful[i]["prompt"], harmful[i]["response"]))
            rows.append(row("anchor", i, ordinary[i]["prompt"]))
        rows.append(row("answer", 0, "1 + 1?", "2"))
        for name, part in (("dev", rows[:2]), ("train", rows[2:])):
            text = "".join(json.dumps(r) + "\n" for r in part)
            (folder / f"{name}.jsonl").write_text(text)

    return seal_as(runs, "prep", write)


def anchored(
    tmp_path: Path, base: Artifact, prep: Artifact, name: str = "out", **recipe: Any
) -> tuple[Path, dict[str, Any]]:
    out, scratch = tmp_path / name, tmp_path / f"{name}.scratch"
    out.mkdir()
    scratch.mkdir()
    step = AnchorStep(anchor=AnchorRecipe(**recipe), chat=ChatRecipe())
    return out, run(step, {"base": base, "prep": prep}, out, Context(scratch=scratch))


def test_answers_are_the_bases_own_token_by_token(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    prep = prepared(runs)
    options = {"max_new_tokens": 40, "truncated": "keep", "drop_refusals": False, "batch_rows": 4}
    out, facts = anchored(tmp_path, base, prep, **options)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    made = kept = 0
    for split in ("train.jsonl", "dev.jsonl"):
        before, after = read_lines(prep.path(split)), read_lines(out / split)
        answered = {r["id"]: r for r in after if r["kind"] == "anchor"}
        others = [r for r in before if r["kind"] != "anchor"]
        assert [r for r in after if r["kind"] != "anchor"] == others
        assert [r["id"] for r in after] == [
            r["id"] for r in before if r["kind"] != "anchor" or r["id"] in answered
        ]
        for asked in (r for r in before if r["kind"] == "anchor"):
            prompt = tokenizer.apply_chat_template(
                asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            want = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()
            made += 1
            if asked["id"] not in answered:
                assert loops(want) or not tokenizer.decode(want, skip_special_tokens=True).strip()
                continue
            kept += 1
            got = answered[asked["id"]]
            assert got["response_ids"] == want
            assert got["complete"] == (want[-1] == 2)
            assert got["response"] == tokenizer.decode(want, skip_special_tokens=True)
            same = ("source", "category", "messages", "think")
            assert [got[k] for k in same] == [asked[k] for k in same]
    assert (facts["prompts"], facts["kept"]) == (made, kept) == (9, kept)
    assert kept + sum(facts["dropped"].values()) == 9
    assert kept > 0


def test_sampled_answers_are_seeded(tmp_path: Path, runs: Path, base: Artifact) -> None:
    prep = prepared(runs, anchors=5)
    options = {"max_new_tokens": 16, "truncated": "keep", "temperature": 1.0}
    texts = {}
    for name, more in (
        ("a", {"seed": 1}),
        ("b", {"seed": 1, "batch_rows": 2}),
        ("c", {"seed": 2}),
    ):
        out, _ = anchored(tmp_path, base, prep, name, **options, **more)
        texts[name] = (out / "train.jsonl").read_text()
    assert texts["a"] == texts["b"] != texts["c"]


def test_all_answers_dropped_is_an_error(tmp_path: Path, runs: Path, base: Artifact) -> None:
    with pytest.raises(DataError, match=r"all 9 answers were dropped \(9 truncated\); raise"):
        anchored(tmp_path, base, prepared(runs), max_new_tokens=1)


def test_an_empty_generation_prompt_is_refused(tmp_path: Path, runs: Path, base: Artifact) -> None:
    step = AnchorStep(anchor=AnchorRecipe(), chat=ChatRecipe(generation_prompt=""))
    with pytest.raises(RecipeError, match=r"chat\.generation_prompt is empty"):
        run(step, {"base": base, "prep": prepared(runs)}, tmp_path, Context(scratch=tmp_path))


@pytest.fixture(scope="module")
def chat(base_folder: Path) -> Chat:
    return Chat(load_tokenizer(base_folder), ChatRecipe())


def filled(
    chat: Chat, text: str, *, end: int | None = 2, **recipe: Any
) -> tuple[str | None, dict[str, Any]]:
    """``fill`` for an answer of ``text``, closed by token ``end``."""
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    generation = Generation(ids + ([] if end is None else [end]), complete=end is not None)
    return fill(row("anchor", 1, "How are you?"), generation, chat, AnchorRecipe(**recipe))


@pytest.mark.parametrize(
    ("text", "end", "recipe", "why"),
    [
        ("Fine, thank you.", 2, {}, None),
        ("Fine, thank you and", None, {}, "truncated"),
        ("Fine, thank you and", None, {"truncated": "keep"}, None),
        ("", 2, {}, "empty"),
        (" \n", 2, {"truncated": "keep"}, "empty"),
        ("<think>\nhm\n</think>\n\n", 2, {}, "empty"),
        ("I cannot help with that.", 2, {}, "refusal"),
        ("I cannot help with that. Call\n1. a friend\n2. a doctor", 2, {}, "refusal"),
        ("I cannot help with that.", 2, {"drop_refusals": False}, None),
        ("I cannot help with", None, {"truncated": "keep"}, "refusal"),
        ("one two three four five six seven. " * 6, 2, {}, "repetition"),
        ("<think>\nI cannot help? I can.\n</think>\n\nFine.", 2, {}, None),
        ("<think>\nstill thinking", None, {"truncated": "keep"}, None),
    ],
)
def test_what_is_dropped_and_why(
    chat: Chat, text: str, end: int | None, recipe: dict[str, Any], why: str | None
) -> None:
    assert filled(chat, text, end=end, **recipe)[0] == why


def test_any_end_token_becomes_the_chats(chat: Chat) -> None:
    """A model may stop with another end token than the template's; training wants one."""
    for end in (0, 2):
        _, made = filled(chat, "Fine.", end=end)
        assert made["response_ids"][-1] == chat.end_id == 2
        assert made["response"] == "Fine."
    _, made = filled(chat, "Fine and", end=None, truncated="keep")
    assert made["response_ids"] == chat.tokenizer("Fine and", add_special_tokens=False)["input_ids"]
    assert made["complete"] is False


def test_think_and_response_are_apart(chat: Chat) -> None:
    _, made = filled(chat, "<think>\nHe asks.\n</think>\n\nFine.")
    assert (made["think"], made["response"]) == ("He asks.", "Fine.")
    text = chat.tokenizer.decode(made["response_ids"], skip_special_tokens=True)
    assert text == "<think>\nHe asks.\n</think>\n\nFine."


@pytest.mark.parametrize(
    ("ids", "looping"),
    [
        (list(range(200)), False),
        ([1, 2, 3] * 10, True),
        ([5] * 12, False),  # too short to tell
        ([5] * 17, True),
        (list(range(300)) + [7, 8, 9] * 30, True),  # it ends in a loop
        ([7, 8, 9] * 8 + list(range(300)), False),  # it got out of one
        ([], False),
    ],
)
def test_loops(ids: list[int], looping: bool) -> None:
    assert loops(ids) is looping
