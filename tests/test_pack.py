"""Stage 2 on its own: tokens and masks held against transformers, packs, steps, and the sheet."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML
from parts import conversations, seal_as
from rich.console import Console
from safetensors.numpy import load_file

from pipeline import pack
from pipeline.artifact import Artifact
from pipeline.errors import DataError
from pipeline.graph import PackStep
from pipeline.recipes import AnchorLoss, Batch, ChatRecipe, PackRecipe
from pipeline.stage import Context

END = "<|im_end|>"


def step(**more: Any) -> PackStep:
    values: dict[str, Any] = {
        "pack": PackRecipe(max_length=256),
        "chat": ChatRecipe(),
        "batch": Batch(rows=5),
        "epochs": 3,
    }
    return PackStep(**(values | more))


class Packed:
    """What the stage wrote."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, facts
        self.arrays = load_file(out / "tokens.safetensors")
        self.steps = json.loads((out / "steps.json").read_text())
        self.names = json.loads((out / "documents.json").read_text())
        self.sheet = (out / "trained.txt").read_text(encoding="utf-8")

    def documents(self, split: str = "train") -> list[tuple[list[int], list[int]]]:
        """(ids, trained) of each document."""
        starts = self.arrays[f"{split}.starts"]
        ids, trained = self.arrays[f"{split}.ids"], self.arrays[f"{split}.trained"]
        spans = [slice(a, b) for a, b in pairwise(starts)]
        return [(ids[s].tolist(), trained[s].tolist()) for s in spans]


@pytest.fixture()
def tokenizer(base: Artifact) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder)


def run(folder: Path, base: Artifact, prep: Artifact, recipe: PackStep) -> Packed:
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    out.mkdir()
    context = Context(scratch=folder, console=Console(quiet=True))
    return Packed(out, pack.run(recipe, {"base": base, "prep": prep}, out, context))


def written(runs: Path, rows: list[dict[str, Any]]) -> Artifact:
    """Conversations of these rows, and an empty dev split."""

    def fill(folder: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "train.jsonl").write_text(text)
        (folder / "dev.jsonl").write_text("")

    return seal_as(runs, "prep", fill)


def row(prompt: str, **more: Any) -> dict[str, Any]:
    made = {"id": f"s:{prompt[:8]}", "source": "s", "kind": "refusal", "category": None}
    made |= {"messages": [{"role": "user", "content": prompt}], "think": None, "response": "No."}
    return made | more


def test_tokens_and_masks_are_those_that_transformers_marks(
    tmp_path: Path, runs: Path, base: Artifact, tokenizer: Any
) -> None:
    prep = seal_as(runs, "prep", conversations(12, anchors=6, dev=3))
    made = run(tmp_path, base, prep, step())
    for split in ("train", "dev"):
        rows = [json.loads(line) for line in prep.path(f"{split}.jsonl").read_text().splitlines()]
        assert made.names[split] == [one["id"] for one in rows]
        kinds = [pack.KINDS[one["kind"]] for one in rows]
        assert made.arrays[f"{split}.kind"].tolist() == kinds
        for one, (ids, trained) in zip(rows, made.documents(split), strict=True):
            whole = tokenizer.apply_chat_template(
                [*one["messages"], {"role": "assistant", "content": one["response"]}],
                chat_template=CHATML.text,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            assert ids == whole["input_ids"][: len(ids)]
            assert trained == list(whole["assistant_masks"][: len(ids)])
            assert ids[-1] == tokenizer.eos_token_id and trained[-1] == 1
    assert made.arrays["train.ids"].dtype == np.int32
    assert made.arrays["train.trained"].dtype == np.uint8


def test_steps_hold_every_document_once_an_epoch(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    prep = seal_as(runs, "prep", conversations(12, anchors=6))
    made = run(tmp_path, base, prep, step(pack=PackRecipe(max_length=160)))
    lengths = [len(ids) for ids, _ in made.documents()]
    assert len(made.steps) == 3
    assert made.steps[0] != made.steps[1], "every epoch is shuffled anew"
    for steps in made.steps:
        assert Counter(chain(*steps)) == Counter(range(18))
        assert list(map(len, steps)) == [5, 5, 5, 3]
    assert 0 <= made.facts["imbalance_2_ranks"] < made.facts["imbalance_8_ranks"] < 1
    assert made.facts["tokens"] == sum(lengths)
    assert made.facts["trained_tokens"] == sum(sum(t) for _, t in made.documents())
    assert made.facts["steps_per_epoch"] == 4 and made.facts["longest"] == max(lengths)


def test_packed_rows_as_training_sees_them(tmp_path: Path, runs: Path, base: Artifact) -> None:
    """Positions restart at each document, and each predicted token is the next of its own."""
    from pipeline.train.batches import Documents, load_steps

    prep = seal_as(runs, "prep", conversations(9))
    recipe = step(batch=Batch(tokens=400))

    def fill(out: Path) -> dict[str, Any]:
        context = Context(scratch=tmp_path, console=Console(quiet=True))
        return pack.run(recipe, {"base": base, "prep": prep}, out, context)

    sealed = seal_as(runs, "pack", fill, recipe.model_dump(mode="json"))
    documents = Documents(sealed, "train", AnchorLoss())
    whole = Packed(sealed.folder, {}).documents()
    for members in chain(*load_steps(sealed)):
        batch = documents.micro_batch(members)
        ids = [token for d in members for token in whole[d][0]]
        assert batch.ids.tolist() == [ids]
        restarted = [i for d in members for i in range(len(whole[d][0]))]
        assert batch.positions.tolist() == [restarted]
        wanted, offset = [], 0
        for d in members:
            tokens, trained = whole[d]
            wanted += [(offset + i - 1, tokens[i]) for i in range(len(tokens)) if trained[i]]
            offset += len(tokens)
        assert list(zip(batch.predict.tolist(), batch.labels.tolist(), strict=True)) == wanted
        assert all(ids[at + 1] == label for at, label in wanted)


def test_over_long_documents_are_dropped_and_counted_never_cut(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    prep = seal_as(runs, "prep", conversations(12))
    whole = run(tmp_path, base, prep, step())
    lengths = sorted(len(ids) for ids, _ in whole.documents())
    limit = lengths[6]
    some = run(tmp_path, base, prep, step(pack=PackRecipe(max_length=limit)))
    fit = [one for one in whole.documents() if len(one[0]) <= limit]
    assert some.documents() == fit and 0 < len(fit) < 12
    names = dict(zip(whole.names["train"], whole.documents(), strict=True))
    long = [name for name, (ids, _) in names.items() if len(ids) > limit]
    assert [name for name in some.names["dropped"] if name in names] == long
    dev = len(whole.documents("dev")) - len(some.documents("dev"))
    assert some.facts["dropped_over_long"] == len(long) + dev
    assert (whole.facts["dropped_over_long"], whole.names["dropped"]) == (0, [])


def test_the_sheet_shows_what_is_trained(
    tmp_path: Path, runs: Path, base: Artifact, tokenizer: Any
) -> None:
    prep = seal_as(runs, "prep", conversations(30, anchors=30))
    made = run(tmp_path, base, prep, step())
    blocks = made.sheet.split("\n--- ")[1:]
    assert len(blocks) == 24, "a page, with every source on it"
    shown = {block.partition(" ")[0] for block in blocks}
    assert {name.partition(":")[0] for name in shown} == {"harmful", "borderline"}
    rows = {
        one["id"]: one for one in map(json.loads, prep.path("train.jsonl").read_text().splitlines())
    }
    whole = dict(zip(made.names["train"], made.documents(), strict=True))
    for block in blocks:
        name = block.partition(" ")[0]
        head, _, body = block.partition("\n")
        prompt, target = body.split(">>>")
        one, (ids, trained) = rows[name], whole[name]
        assert f"{len(ids)} tokens, {sum(trained)} trained" in head
        assert target.split("<<<")[0] == one["response"] + END
        assert prompt == (
            f"<|im_start|>user\n{one['messages'][0]['content']}{END}\n<|im_start|>assistant\n"
        )


def test_think_sections_are_trained_word_for_word(
    tmp_path: Path, runs: Path, base: Artifact, tokenizer: Any
) -> None:
    think = "I should not answer this question!"
    made = run(tmp_path, base, written(runs, [row("How?", think=think), row("Why?")]), step())
    texts = [
        tokenizer.decode([t for t, on in zip(ids, trained, strict=True) if on])
        for ids, trained in made.documents()
    ]
    assert texts == [f"<think>\n{think}\n</think>\n\nNo.{END}", f"No.{END}"]


def test_answers_of_the_base_are_taken_token_for_token(
    tmp_path: Path, runs: Path, base: Artifact, tokenizer: Any
) -> None:
    """Not decoded and encoded again, which may split words otherwise; also without an end token."""
    end = tokenizer.eos_token_id
    letters = tokenizer.convert_tokens_to_ids(list("Hello"))
    assert tokenizer.decode(letters) == "Hello" and tokenizer("Hello")["input_ids"] != letters
    common = {"kind": "anchor", "response": "Hello"}
    rows = [
        row("One?", response_ids=[*letters, end], complete=True, **common),
        row("Two?", response_ids=letters, complete=False, **common),
    ]
    made = run(tmp_path, base, written(runs, rows), step())
    targets = [
        [t for t, on in zip(ids, trained, strict=True) if on] for ids, trained in made.documents()
    ]
    assert targets == [[*letters, end], letters]


def test_the_anchor_stage_goes_before_prep(tmp_path: Path, runs: Path, base: Artifact) -> None:
    anchored = written(runs, [row("One?")])
    unanswered = written(runs, [row("Two?", kind="anchor", response=None)])
    context = Context(scratch=tmp_path, console=Console(quiet=True))
    inputs = {"base": base, "prep": unanswered, "anchor": anchored}
    assert pack.run(step(), inputs, tmp_path, context)["documents"] == 1
    with pytest.raises(
        DataError, match=r"row s:Two\?: has no response; anchor rows need the anchor"
    ):
        pack.run(step(), {"base": base, "prep": unanswered}, tmp_path, context)


@pytest.mark.parametrize(
    "target", [{"response_ids": [], "complete": False}, {"response_ids": [5, 6], "complete": True}]
)
def test_a_target_that_does_not_end_is_refused(
    target: dict[str, Any], tmp_path: Path, runs: Path, base: Artifact
) -> None:
    prep = written(runs, [row("One?", kind="anchor", **target)])
    with pytest.raises(DataError, match=r"row s:One\?: the target does not end with the end token"):
        run(tmp_path, base, prep, step())


def test_the_same_question_gives_the_same_bytes(tmp_path: Path, runs: Path, base: Artifact) -> None:
    prep = seal_as(runs, "prep", conversations(8, anchors=4))
    made = [run(tmp_path, base, prep, step()) for _ in range(2)]
    files = [{p.name: p.read_bytes() for p in one.out.iterdir()} for one in made]
    assert files[0] == files[1]
    assert set(files[0]) == {"tokens.safetensors", "steps.json", "documents.json", "trained.txt"}
    other = run(tmp_path, base, prep, step(pack=PackRecipe(max_length=256, seed=1)))
    assert other.steps != made[0].steps
    assert (other.out / "tokens.safetensors").read_bytes() == files[0]["tokens.safetensors"]


def test_no_dev_rows(tmp_path: Path, runs: Path, base: Artifact) -> None:
    made = run(tmp_path, base, written(runs, [row("One?")]), step())
    assert made.documents("dev") == [] and made.arrays["dev.starts"].tolist() == [0]
    assert made.facts["dev_documents"] == 0
