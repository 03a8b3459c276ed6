"""Stage 1 on its own: what is read, dropped, answered and set aside, and that nothing else is."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from parts import sample_rows
from prepping import Prep, sample, source, unlike

from pipeline.data.dedup import words
from pipeline.data.sheet import STEPS
from pipeline.errors import DataError

KEYS = ["id", "source", "kind", "category", "messages", "think", "response"]


@pytest.fixture()
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prep:
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    return Prep(tmp_path)


def test_the_form_of_a_conversation(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "How?", "no": "No.", "kind": "x"}])
    facts = stage.run(
        source("s", columns={"response": "no", "category": "kind"}), refusal_think="I will not."
    )
    assert stage.read("train") == [
        {
            "id": "s:1",
            "source": "s",
            "kind": "refusal",
            "category": "x",
            "messages": [{"role": "user", "content": "How?"}],
            "think": "I will not.",
            "response": "No.",
        }
    ]
    assert stage.read("dev") == []
    assert {p.name for p in stage.out.iterdir()} == {
        "train.jsonl", "dev.jsonl", "sheet.json", "sheet.md"
    }  # fmt: skip
    assert (facts["train"], facts["dev"], facts["kinds"]) == (1, 0, {"refusal": 1})


def test_targets_of_the_three_kinds(stage: Prep) -> None:
    rows = [{"prompt": p, "response": f"<think>t</think>r {p}"} for p in unlike(3)]
    response = {"columns": {"response": "response"}}
    for name, seed in (("bare", 1), ("held", 2)):
        stage.rows(name, [{"prompt": p} for p in unlike(3, seed)])
    stage.rows("told", rows)
    stage.run(
        source("told", "answer", **response),
        source("bare"),
        source("held", "anchor"),
        refusal_think="I will not.",
    )
    made = {
        name: [r for r in stage.both if r["source"] == name] for name in ("told", "bare", "held")
    }
    assert [(r["think"], r["response"]) for r in made["told"]] == [
        ("t", f"r {row['prompt']}") for row in rows
    ]
    generic = {row["response"] for row in sample_rows("refusals")}
    assert all(r["response"] in generic and r["think"] == "I will not." for r in made["bare"])
    assert all(r["response"] is None and r["think"] is None for r in made["held"])
    assert all(list(row) == KEYS for row in stage.both)


def test_a_think_section_of_its_own_goes_before_the_recipes(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "a", "r": "<think>mine</think>No."}, {"prompt": "b", "r": "No."}])
    stage.run(source("s", columns={"response": "r"}), refusal_think="ours")
    assert {row["messages"][0]["content"]: row["think"] for row in stage.both} == {
        "a": "mine",
        "b": "ours",
    }
    stage.run(source("s", columns={"response": "r"}))
    assert [row["think"] for row in stage.both] == ["mine", None]


def test_a_generic_refusal_stays_with_its_row(stage: Prep) -> None:
    """Whatever else is in the file: the choice hangs on the row alone. And it varies."""
    prompts = unlike(60)
    stage.rows("s", [{"prompt": p, "use": "yes" if i % 2 else "no"} for i, p in enumerate(prompts)])
    stage.run(source("s"))
    all_rows = {row["id"]: row["response"] for row in stage.both}
    stage.run(source("s", where={"use": "yes"}))
    some = {row["id"]: row["response"] for row in stage.both}
    assert len(some) == 30 and some.items() <= all_rows.items()
    assert len(set(all_rows.values())) > 20


def test_repeats_are_dropped_over_all_sources_and_the_first_stays(stage: Prep) -> None:
    stage.rows(
        "one", [{"prompt": p} for p in ("Pick a lock now", "pick a LOCK, now!", "Bake bread")]
    )
    stage.rows(
        "two", [{"prompt": p} for p in ("bake bread.", "Pick a lock right now", "Sing a song")]
    )
    facts = stage.run(source("one"), source("two"))
    assert {row["id"] for row in stage.both} == {"one:1", "one:3", "two:3"}
    assert stage.sheet["dropped"] == [
        {"id": "one:2", "why": "exact_duplicate", "of": "one:1", "similarity": 1.0},
        {"id": "two:1", "why": "exact_duplicate", "of": "one:3", "similarity": 1.0},
        {"id": "two:2", "why": "near_duplicate", "of": "one:1", "similarity": 0.8},
    ]
    counts = facts["sources"]["two"]
    assert (counts["read"], counts["exact_duplicate"], counts["near_duplicate"]) == (3, 1, 1)
    stage.run(source("one"), source("two"), near_duplicate_threshold=0.81)
    assert "two:2" in {row["id"] for row in stage.both}


def test_held_out_prompts_are_not_trained_on(stage: Prep) -> None:
    """Also where only one turn of a conversation repeats one."""
    turns = [
        {"role": "user", "content": "Good day"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Which tree is tallest of all"},
    ]
    stage.rows("talk", [{"messages": turns}])
    stage.rows("s", [{"prompt": p} for p in ("Where is Rome", "Which tree is the tallest of all")])
    stage.rows("test", [{"prompt": "which tree is tallest of all?"}])
    with pytest.raises(DataError, match=r"talk has no rows left of 1 \(1 excluded by test\)"):
        stage.run(
            source("talk", "anchor", columns={"messages": "messages"}),
            source("s", "anchor"),
            exclude=[{"name": "test", "source": "test.jsonl"}],
        )
    stage.run(source("s", "anchor"), exclude=[{"name": "test", "source": "test.jsonl"}])
    assert [row["id"] for row in stage.both] == ["s:1"]
    assert stage.dropped == {"s:2": "excluded"}


def test_no_sample_of_the_other_half_gets_in(stage: Prep) -> None:
    """Train on both halves, exclude one: what stays is the other, to the row."""
    whole = {"name": "all", "kind": "anchor", "source": "sample:borderline"}
    stage.run(whole, exclude=[sample("borderline", "heldout")])
    kept = {row["messages"][0]["content"] for row in stage.both}
    assert kept == {r["prompt"] for r in sample_rows("borderline") if r["split"] == "train"}


def test_over_long_prompts_are_dropped_and_counted_never_cut(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "x" * size} for size in (9, 10, 11)])
    facts = stage.run(source("s"), max_prompt_characters=10)
    assert sorted(len(row["messages"][0]["content"]) for row in stage.both) == [9, 10]
    assert stage.dropped == {"s:3": "over_long"}
    assert facts["sources"]["s"]["over_long"] == 1


@pytest.mark.parametrize(
    ("rows", "fraction", "dev"),
    [(100, 0.1, 10), (10, 0.01, 1), (9, 0.01, 0), (40, 0.0, 0), (2, 0.5, 1)],
)
def test_the_size_of_dev(rows: int, fraction: float, dev: int, stage: Prep) -> None:
    stage.rows("s", [{"prompt": p} for p in unlike(rows)])
    facts = stage.run(source("s"), dev_fraction=fraction)
    assert (facts["train"], facts["dev"]) == (rows - dev, dev)
    ids = [row["id"] for row in stage.both]
    assert sorted(ids) == sorted({f"s:{i + 1}" for i in range(rows)})


def test_dev_hangs_on_seed_and_prompt_and_not_on_order(stage: Prep) -> None:
    prompts = unlike(60)
    stage.rows("s", [{"prompt": p} for p in prompts])
    stage.run(source("s"))
    first = {row["messages"][0]["content"] for row in stage.read("dev")}
    random.Random(0).shuffle(prompts)
    stage.rows("s", [{"prompt": p} for p in prompts])
    stage.run(source("s"))
    assert {row["messages"][0]["content"] for row in stage.read("dev")} == first
    stage.run(source("s"), seed=1)
    assert {row["messages"][0]["content"] for row in stage.read("dev")} != first


def test_repeated_sources_come_pass_after_pass_and_not_in_dev(stage: Prep) -> None:
    stage.rows("s", [{"prompt": p} for p in unlike(20)])
    facts = stage.run(source("s", repeat=3))
    train = stage.read("train")
    assert facts["train"] == len(train) == 54 and facts["dev"] == 2
    assert len({row["id"] for row in train}) == 54
    texts = [row["messages"][0]["content"] for row in train]
    assert texts[:18] == texts[18:36] == texts[36:]
    assert [row["response"] for row in train[:18]] == [row["response"] for row in train[18:36]]
    assert [row["id"] for row in train[18:36]] == [f"{row['id']}#2" for row in train[:18]]


def test_the_sheet_adds_up(stage: Prep) -> None:
    job = [sample(name, "train", kind="anchor") for name in ("arithmetic", "borderline")]
    facts = stage.run(*job, exclude=[sample("ordinary", "heldout")])
    for name, one in stage.sheet["sources"].items():
        there = sum(row["split"] == "train" for row in sample_rows(name))
        steps = one["steps"]
        assert [step["step"] for step in steps] == list(STEPS)
        edges = [(step["before"], step["after"]) for step in steps]
        assert edges[0][0] == one["read"] == there and edges[-1][1] == one["kept"]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        for step, (before, after) in zip(STEPS, edges, strict=True):
            dropped = [e for e in stage.sheet["dropped"] if e["id"].startswith(f"{name}:")]
            assert sum(e["why"] == step for e in dropped) == before - after
            assert facts["sources"][name][step] == before - after
        assert one["targets"] == {"base": one["kept"]}
        assert [len(e["prompt"]) > 0 for e in one["examples"]] == [True] * 3
        assert one["kept"] == one["dev"] + one["train"] == sum(one["categories"].values())
        rows = [row for row in stage.both if row["source"] == name]
        assert one["kept"] == len(rows)
        lengths = sorted(len(row["messages"][0]["content"]) for row in rows)
        shown = one["characters"]["prompt"]
        assert (shown["least"], shown["most"]) == (lengths[0], lengths[-1])
    kinds = Counter(row["kind"] for row in stage.read("train"))
    assert facts["kinds"] == stage.sheet["kinds"] == kinds
    assert set(stage.dropped.values()) == {"near_duplicate"}
    assert sum(facts["dropped"].values()) == len(stage.dropped)


def test_what_is_kept_has_no_near_duplicate(stage: Prep) -> None:
    stage.run(sample("arithmetic", "train", kind="anchor"))
    sets = [words(row["messages"][0]["content"]) for row in stage.both]
    assert len(sets) < 130, "the templates repeat, or this test shows nothing"
    for i, one in enumerate(sets):
        assert all(len(one & other) / len(one | other) < 0.8 for other in sets[:i])


def test_the_same_question_gives_the_same_bytes(stage: Prep) -> None:
    job = sample("harmful", "train", kind="refusal")
    digests = []
    for _ in range(2):
        stage.run(job)
        digests.append([path.read_bytes() for path in sorted(stage.out.iterdir())])
    assert digests[0] == digests[1]


def test_no_reader_can_cut_a_row_in_two(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "a\u2028b\x85c \U0001f600"}])
    stage.run(source("s"))
    text = (stage.out / "train.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1 and text.isascii()
    assert stage.both[0]["messages"][0]["content"] == "a\u2028b\x85c \U0001f600"
