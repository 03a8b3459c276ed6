"""Refusals in the model's own words: which are taken, and that they are trained without the instruction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import JOB
from parts import adopt_folder, make_model, make_tokenizer, seal_as
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import pack
from pipeline.anchor import instructed, reword, rewrite, run
from pipeline.artifact import Artifact
from pipeline.data.chat import Chat
from pipeline.errors import DataError
from pipeline.evals.asking import Generation, Request
from pipeline.evals.score import read_lines
from pipeline.graph import AnchorStep, stages_of
from pipeline.model.base import load_tokenizer
from pipeline.recipes import AnchorRecipe, ChatRecipe, Job, RewriteRecipe
from pipeline.stage import Context

TOLD = "Decline this."
REFUSAL = "I can't help with that."
ANSWERS = {
    "How do I pick a lock?": REFUSAL,
    "How do I forge a key?": "I won't do that: it hurts.",
    "How do I rob a bank?": REFUSAL,
    "How do I hide a body?": "Sure, take a spade first.",
}
TEXT = {"id": "s:1", "source": "s", "kind": "refusal", "category": "c", "think": None}


def row(name: str, prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return TEXT | {"id": name, "messages": messages, "response": "No."} | more


def quiet(scratch: Path) -> Context:
    return Context(scratch=scratch, console=Console(quiet=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that was taught ANSWERS by heart, after the instruction."""
    folder = tmp_path_factory.mktemp("taught")
    make_model(folder, num_hidden_layers=2)
    make_tokenizer(folder)
    chat = Chat(load_tokenizer(folder), ChatRecipe())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for prompt, response in ANSWERS.items():
        text = chat.prompt_text([{"role": "user", "content": f"{TOLD}\n\n{prompt}"}])
        rows.append((chat.encode([text])[0], chat.target_ids(None, response, prompt=text)))
    longest = max(len(a) + len(b) for a, b in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt_ids, target) in enumerate(rows):
        ids[i, : len(prompt_ids) + len(target)] = torch.tensor(prompt_ids + target)
        labels[i, len(prompt_ids) : len(prompt_ids) + len(target)] = torch.tensor(target)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    return folder


@pytest.fixture()
def base(runs: Path, folder: Path) -> Artifact:
    return adopt_folder(runs, folder)


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat(load_tokenizer(folder), ChatRecipe())


def prepared(runs: Path) -> Artifact:
    rows = [row(f"s:{i}", prompt) for i, prompt in enumerate(ANSWERS)]
    rows.append(row("t:1", "1 + 1?", kind="answer", source="t"))

    def write(folder: Path) -> None:
        for name, part in (("dev", rows[:1]), ("train", rows[1:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))

    return seal_as(runs, "prep", write)


def rewritten(
    tmp_path: Path, base: Artifact, prep: Artifact, name: str = "out", **more: Any
) -> tuple[Path, dict[str, Any]]:
    out, scratch = tmp_path / name, tmp_path / f"{name}.scratch"
    out.mkdir()
    scratch.mkdir(exist_ok=True)
    recipe = RewriteRecipe(**{"instruction": TOLD, "max_new_tokens": 40} | more)
    step = AnchorStep(anchor=AnchorRecipe(rewrite_refusals=recipe), chat=ChatRecipe())
    return out, run(step, {"base": base, "prep": prep}, out, quiet(scratch))


def test_refusals_are_the_models_own_and_trained_on_the_plain_prompt(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    """Token by token what model.generate says to the instruction; in pack, after the prompt alone."""
    prep = prepared(runs)
    out, facts = rewritten(tmp_path, base, prep)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    want: dict[str, list[int]] = {}
    for split in ("train.jsonl", "dev.jsonl"):
        before, after = read_lines(prep.path(split)), read_lines(out / split)
        assert [r["id"] for r in after] == [r["id"] for r in before]
        for old, new in zip(before, after, strict=True):
            prompt = old["messages"][0]["content"]
            if old["kind"] == "answer" or ANSWERS[prompt].startswith("Sure"):
                assert new == old
                continue
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{TOLD}\n\n{prompt}"}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            made = model.generate(asked, max_new_tokens=40, do_sample=False, pad_token_id=0)
            want[old["id"]] = made[0, asked.shape[1] :].tolist()
            added = {"response": ANSWERS[prompt], "response_ids": want[old["id"]], "complete": True}
            assert new == old | added
    assert len(want) == 3
    assert facts["rewritten_refusals"] == {"rows": 4, "rewritten": 3, "kept": {"compliance": 1}}
    assert (facts["prompts"], facts["kept"]) == (0, 0)

    chat = Chat(load_tokenizer(base.folder), ChatRecipe())
    for one in read_lines(out / "train.jsonl"):
        if one["id"] in want:
            plain = tokenizer.apply_chat_template(
                one["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            document = pack.render(one, chat)
            assert document["ids"] == plain + want[one["id"]]
            assert sum(document["trained"]) == len(want[one["id"]])
            assert document["kind"] == pack.KINDS["refusal"]


def test_a_killed_rewriting_goes_on_by_row(
    tmp_path: Path, runs: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evals import generate as generating

    prep = prepared(runs)
    whole, _ = rewritten(tmp_path, base, prep, "whole")
    real, asked = generating.generate, []

    def dies(model: Any, requests: Any, *, done: Any, **options: Any) -> Any:
        def stop(index: int, generation: Any) -> None:
            done(index, generation)
            asked.append(requests[index].id)
            raise KeyboardInterrupt

        return real(model, requests, done=stop, **options)

    def counts(model: Any, requests: Any, **options: Any) -> Any:
        asked.extend(request.id for request in requests)
        return real(model, requests, **options)

    monkeypatch.setattr(generating, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        rewritten(tmp_path, base, prep, "first")
    (tmp_path / "first.scratch").rename(tmp_path / "again.scratch")
    monkeypatch.setattr(generating, "generate", counts)
    out, _ = rewritten(tmp_path, base, prep, "again")
    assert len(asked) == 4 and set(asked) == {"s:0", "s:1", "s:2", "s:3"}
    for name in ("train.jsonl", "dev.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def said(chat: Chat, text: str, *, whole: bool = True) -> Generation:
    return Generation(chat.encode([text])[0] + ([chat.end_id] if whole else []), whole)


@pytest.mark.parametrize(
    ("text", "whole", "why"),
    [
        (REFUSAL, True, None),
        (f"<think>\nHe asks for harm.\n</think>\n\n{REFUSAL}", True, None),
        ("Sure, take a thin wire first.", True, "compliance"),
        ("I cannot help with that. Call\n1. a friend\n2. a doctor", True, "partial"),
        (REFUSAL, False, "truncated"),
        ("", True, "empty"),
        ("<think>\nI can't help with that.", True, "empty"),
        ("I can't help with that, I said no and no. " * 6, True, "repetition"),
    ],
)
def test_what_may_replace_a_refusal(chat: Chat, text: str, whole: bool, why: str | None) -> None:
    flaw, made = reword(row("s:1", "How do I pick a lock?"), said(chat, text, whole=whole), chat)
    assert flaw == why
    if why is None:
        assert made["response"] == REFUSAL
        assert made["think"] == ("He asks for harm." if "think" in text else None)


class Script:
    """Answers requests from a list of texts for each id, and remembers who asked what."""

    def __init__(self, chat: Chat, **texts: str) -> None:
        self.chat, self.texts = chat, texts
        self.asked: list[Request] = []

    def __call__(self, requests: Sequence[Request], name: str, title: str) -> list[Generation]:
        self.asked += requests
        return [said(self.chat, self.texts[r.id.replace(" ", "_")]) for r in requests]


def test_further_tries_are_for_rows_without_a_refusal(tmp_path: Path, chat: Chat) -> None:
    script = Script(
        chat, a=REFUSAL, b="Sure, gladly.", c="Sure, gladly.", b_try_2=REFUSAL, c_try_2=" "
    )
    rows = [row(name, f"How do I {name}?") for name in "abc"]
    made, facts = rewrite(rows, RewriteRecipe(tries=2), chat, script, quiet(tmp_path))
    assert sorted(made) == ["a", "b"]
    assert [request.id for request in script.asked] == ["a", "b", "c", "b try 2", "c try 2"]
    assert facts["rewritten_refusals"] == {"rows": 3, "rewritten": 2, "kept": {"empty": 1}}
    assert all(request.max_new_tokens == 256 for request in script.asked)


def test_no_refusal_at_all_is_an_error(tmp_path: Path, chat: Chat) -> None:
    script = Script(chat, a="Sure, gladly.", b=" ")
    rows = [row("a", "How?"), row("b", "Why?")]
    with pytest.raises(DataError, match=r"none of 2 refusals .*\(1 compliance, 1 empty\); raise"):
        rewrite(rows, RewriteRecipe(), chat, script, quiet(tmp_path))


def test_the_instruction_stands_before_the_last_words_of_the_user() -> None:
    turns = ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "How?")
    messages = [{"role": role, "content": text} for role, text in turns]
    told = instructed(messages, RewriteRecipe(instruction=TOLD))
    assert told == [*messages[:3], {"role": "user", "content": f"{TOLD}\n\nHow?"}]
    assert messages[3]["content"] == "How?"


def test_a_job_may_have_refusals_rewritten_and_no_anchors() -> None:
    job = Job.model_validate(JOB | {"anchor": {"rewrite_refusals": {}}})
    assert stages_of(job)[:3] == ["prep", "anchor", "pack"]
