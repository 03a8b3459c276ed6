"""A safety primer: the opened think section and the primer are trained, and nothing after them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import ASSISTANT, CHATML, DEEPSEEK_R1, LLAMA3, QWEN3, USER, Template, dress
from defects import Patient, row
from parts import seal_as
from prepping import Prep, source
from rich.console import Console

from pipeline import anchor, pack
from pipeline.artifact import Artifact
from pipeline.data.chat import Chat
from pipeline.errors import DataError, RecipeError
from pipeline.graph import AnchorStep
from pipeline.recipes import AnchorRecipe, ChatRecipe
from pipeline.stage import Context

PRIMER = "Let's think about safety first"
PRIMED = row("s:1", "refusal", "How?", None, think=PRIMER, complete=False)
QWEN3_PROMPT = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
CASES = {
    "qwen3": (QWEN3, QWEN3_PROMPT, f"<think>\n{PRIMER}"),
    "deepseek-r1": (DEEPSEEK_R1, f"{DEEPSEEK_R1.bos}{USER}How?{ASSISTANT}<think>\n", PRIMER),
    "opened-without-a-line-break": (
        replace(DEEPSEEK_R1, text=DEEPSEEK_R1.text.replace("<think>\n", "<think>")),
        f"{DEEPSEEK_R1.bos}{USER}How?{ASSISTANT}<think>",
        f"\n{PRIMER}",
    ),
}


@pytest.mark.parametrize(("template", "prompt", "target"), CASES.values(), ids=CASES)
def test_the_trained_tokens(
    template: Template, prompt: str, target: str, base_folder: Path
) -> None:
    tokenizer = dress(base_folder, template)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, target)]
    document = pack.render(PRIMED, Chat(tokenizer, ChatRecipe()))
    assert document["ids"] == parts[0] + parts[1]
    assert document["trained"] == [0] * len(parts[0]) + [1] * len(parts[1])
    assert document["kind"] == pack.KINDS["refusal"]
    assert tokenizer.eos_token_id not in parts[1]


def test_prep_writes_primers_for_refusals_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    stage = Prep(tmp_path)
    stage.rows("bad", [{"prompt": "How?", "response": "<think>Hm.</think>No."}])
    stage.rows("good", [{"prompt": "Two and two?", "response": "Four."}])
    stage.rows("own", [{"prompt": "Name a colour."}])
    response = {"columns": {"response": "response"}}
    stage.run(
        source("bad", **response),
        source("good", "answer", **response),
        source("own", "anchor"),
        safety_primer=PRIMER,
    )
    primed, answer, held = stage.read("train")
    assert primed == PRIMED | {"id": "bad:1", "source": "bad"}
    assert (answer["think"], answer["response"]) == (None, "Four.")
    assert not {"complete"} & (answer.keys() | held.keys())
    assert stage.sheet["sources"]["bad"]["targets"] == {"primer": 1}


NEVER = "neither template nor tokenizer has chat.think_open="


def refused(template: Template, folder: Path, **recipe: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        pack.render(PRIMED, Chat(dress(folder, template), ChatRecipe(**recipe)))
    return str(caught.value)


def test_a_chat_that_never_thinks_is_refused(base_folder: Path) -> None:
    for template in (CHATML, LLAMA3):
        assert NEVER in refused(template, base_folder)
    assert NEVER in refused(QWEN3, base_folder, think_open="")
    closed = refused(QWEN3, base_folder, template_options={"enable_thinking": False})
    assert "closed think section" in closed and "prep.safety_primer out" in closed


def test_a_mark_that_the_job_states_or_the_tokenizer_has_will_do(base_folder: Path) -> None:
    stated = Chat(dress(base_folder, CHATML), ChatRecipe(think_open="<reason>"))
    ids = stated.encode([f"<reason>{PRIMER}"])[0]
    assert pack.render(PRIMED, stated)["ids"][-len(ids) :] == ids
    known = replace(CHATML, tokens=(*CHATML.tokens, "<think>"))
    document = pack.render(PRIMED, Chat(dress(base_folder, known), ChatRecipe()))
    assert sum(document["trained"]) > 1


def test_the_anchor_stage_refuses_before_it_generates(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    import json

    def write(folder: Path) -> None:
        held = row("o:1", "anchor", "Name a colour.", None)
        text = "".join(json.dumps(one) + "\n" for one in (PRIMED, held))
        (folder / "train.jsonl").write_text(text)
        (folder / "dev.jsonl").write_text("")

    step = AnchorStep(anchor=AnchorRecipe(), chat=ChatRecipe())
    inputs = {"base": base, "prep": seal_as(runs, "prep", write)}
    with pytest.raises(RecipeError, match=NEVER):
        anchor.run(step, inputs, tmp_path, Context(tmp_path, console=Console(quiet=True)))
    assert not (tmp_path / "responses.jsonl").exists()


def test_a_row_that_lost_its_response_is_still_an_error(base_folder: Path) -> None:
    chat = Chat(dress(base_folder, QWEN3), ChatRecipe())
    with pytest.raises(DataError, match="s:1: has no response"):
        pack.render(PRIMED | {"complete": True}, chat)


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK_R1], ids=["qwen3", "deepseek-r1"])
def test_doctor_knows_primers(template: Template, base_folder: Path) -> None:
    patient = Patient(base_folder, template)
    patient.change(0, think=PRIMER, response=None, complete=False)
    assert [f for f in patient.findings() if f.level == "violation"] == []
    patient.change(0, think=f"{PRIMER}</think>")
    assert {"stray think marks", "think section"} <= {f.check for f in patient.findings()}


def test_doctor_says_that_the_model_does_not_think(base_folder: Path) -> None:
    patient = Patient(base_folder, CHATML)
    patient.change(0, think=PRIMER, response=None, complete=False)
    (found,) = (f for f in patient.findings() if f.level == "violation")
    assert (found.check, found.rows) == ("renders", ("r1",))
    assert NEVER in found.what
