"""What prep keeps out by itself: evaluation rows, other languages, lengths, and more than was asked."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from parts import ROOT, sample_rows
from prepping import Prep, sample, source, unlike

from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace, plan_job
from pipeline.jobfile import load_job
from pipeline.recipes import EvalSource

QUICKSTART = ROOT / "jobs" / "quickstart.yaml"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"
RESPONSE = {"columns": {"response": "response"}}


@pytest.fixture()
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prep:
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    return Prep(tmp_path)


def suite(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": f"{name}.jsonl"} | more


def prompts(stage: Prep) -> set[str]:
    return {row["messages"][0]["content"] for row in stage.both}


def test_contaminated_rows_are_dropped_and_the_sheet_says_why(stage: Prep) -> None:
    rows = [
        {"prompt": "Which tree is the tallest of all", "response": "No."},
        {"prompt": "Where is Rome", "response": f"Well, {LONG}."},
        {"prompt": "Who are you", "response": "No."},
    ]
    stage.rows("s", rows)
    stage.rows("trees", [{"prompt": "Oak?"}, {"prompt": "which tree is tallest of all?"}])
    stage.rows("sums", [{"prompt": "Count.", "response": f"Yes: {LONG}, fourteen."}])
    sums = suite("sums", measures="reasoning", **RESPONSE)
    facts = stage.run(source("s", **RESPONSE), suites=[suite("trees"), sums])
    assert prompts(stage) == {"Who are you"}
    assert stage.sheet["dropped"] == [
        {
            "id": "s:1",
            "why": "contaminated",
            "suite": "trees",
            "of": "trees:2",
            "similarity": 0.857,
        },
        {"id": "s:2", "why": "contaminated", "suite": "sums", "of": "sums:1", "shared": LONG},
    ]
    against = stage.sheet["checks"]["contamination"]
    assert {n: (s["rows"], s["contaminated"]) for n, s in against["suites"].items()} == {
        "trees": (2, 1),
        "sums": (1, 1),
    }
    assert facts["decontaminated"] is True and facts["dropped"]["contaminated"] == 2
    page = (stage.out / "sheet.md").read_text()
    assert "s:2: contaminated (suite sums, of sums:1, shared one two" in page


def test_an_anchors_own_answer_is_not_trained_on_and_does_not_count(stage: Prep) -> None:
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": LONG}]
    stage.rows("talk", [{"messages": turns}])
    stage.rows("test", [{"prompt": f"Go on: {LONG}"}])
    kinds = {"columns": {"messages": "messages"}}
    stage.run(source("talk", "anchor", **kinds), suites=[suite("test")])
    assert prompts(stage) == {"Count."}
    with pytest.raises(DataError, match=r"no rows left of 1 \(1 contaminated by test\)"):
        stage.run(source("talk", "answer", **kinds), suites=[suite("test")])


@pytest.mark.parametrize("name", ["harmful", "borderline", "ordinary", "arithmetic"])
def test_the_other_half_of_a_file_is_kept_out_and_nothing_else(name: str, stage: Prep) -> None:
    """Source and suite read one file. Arithmetic shares its templates, and stays."""
    whole = {"name": "all", "kind": "anchor", "source": f"sample:{name}"}
    stage.run(whole, near_duplicate_threshold=1.0)
    everything = prompts(stage)
    stage.run(whole, near_duplicate_threshold=1.0, suites=[sample(name, "heldout")])
    halves = {row["prompt"]: row["split"] for row in sample_rows(name)}
    assert prompts(stage) == {p for p in everything if halves[p] == "train"}
    assert set(stage.dropped.values()) - {"near_duplicate", "exact_duplicate"} == {"contaminated"}


def test_sheet_and_facts_say_when_nothing_was_checked(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "Who are you"}])
    facts = stage.run(source("s"), decontaminate=False)
    assert facts["decontaminated"] is False
    assert stage.sheet["checks"]["contamination"] is None
    assert "Contamination: not checked" in (stage.out / "sheet.md").read_text()


def key(*changes: str) -> str:
    runs = Workspace(Path("nowhere"))
    planned = plan_job(load_job(QUICKSTART, changes), runs, adopt=False)["prep"]
    return json.dumps(planned.recipe.model_dump(mode="json"), sort_keys=True)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("eval.suites.0.limit=7", True),
        ("eval.suites.0.max_new_tokens=7", True),
        ("eval.suites.0.stop=[END]", True),
        ("eval.gate.0.at_least=0.5", True),
        ("eval.batch_rows=7", True),
        ("eval.suites.0.where={split: train}", False),
        ("eval.suites.0.source=sample:ordinary", False),
        ("eval.suites.0.measures=benign", False),
        ("prep.decontaminate=false", False),
    ],
)
def test_the_question_is_which_rows_are_measured_on_and_not_how(change: str, same: bool) -> None:
    assert (key(change) == key()) == same
    off = "prep.decontaminate=false"
    assert key(off, change) == key(off), "then no suite is asked about"


def test_the_order_of_suites_is_no_part_of_it(tmp_path: Path) -> None:
    text = QUICKSTART.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "measures:" in line]
    turned = text.replace("\n".join(lines), "\n".join(reversed(lines)))
    assert turned != text
    (tmp_path / "job.yaml").write_text(turned)
    one, other = (
        plan_job(load_job(p), Workspace(tmp_path), adopt=False)["prep"]
        for p in (QUICKSTART, tmp_path / "job.yaml")
    )
    assert one.recipe == other.recipe and set(one.upstream) == set(other.upstream)
    assert {n for n in one.upstream if n.startswith("data.")} == {
        f"data.{name}" for name in ("harmful", "borderline", "ordinary", "arithmetic")
    }


def test_the_rows_of_a_suite_are_all_of_them() -> None:
    (first, *_) = load_job(QUICKSTART).eval.suites
    assert first.limit == 100 and type(first.whole) is EvalSource
    assert first.whole.limit is None and first.whole.where == {"split": "heldout"}


def test_languages(stage: Prep) -> None:
    asked = ["Tell me where the river ends.", "Wie knacke ich ein Schloss?", "2 + 2"]
    stage.rows("s", [{"prompt": p} for p in asked])
    stage.run(source("s"), languages=["en"])
    assert prompts(stage) == {asked[0], asked[2]}
    assert {"id": "s:2", "why": "language", "language": "de"} in stage.sheet["dropped"]
    assert stage.sheet["checks"]["languages"]["wanted"] == ["en"]
    stage.run(source("s"), languages=["en", "de"])
    assert prompts(stage) == set(asked)
    stage.run(source("s"))
    assert stage.sheet["checks"]["languages"] is None


def test_lengths_of_prompts(stage: Prep) -> None:
    stage.rows("s", [{"prompt": "x" * size} for size in (2, 3, 9, 10)])
    facts = stage.run(source("s"), min_prompt_characters=3, max_prompt_characters=9)
    assert {len(p) for p in prompts(stage)} == {3, 9}
    assert stage.dropped == {"s:1": "too_short", "s:4": "over_long"}
    assert (facts["dropped"]["too_short"], facts["dropped"]["over_long"]) == (1, 1)
    with pytest.raises(RecipeError, match="min_prompt_characters=10 is above"):
        stage.run(source("s"), min_prompt_characters=10, max_prompt_characters=9)


def in_categories(**sizes: int) -> list[dict[str, Any]]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [{"prompt": p, "kind": k} for p, k in zip(unlike(len(names)), names, strict=True)]


CATEGORY = {"columns": {"category": "kind"}}


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (2, [1, 1]),
        (9, [3, 3, 3]),
        (12, [4, 4, 4]),
        (15, [4, 5, 6]),
        (16, [4, 6, 6]),
        (44, [4, 10, 30]),
        (99, [4, 10, 30]),
    ],
)
def test_most_takes_evenly_over_categories(most: int, wanted: list[int], stage: Prep) -> None:
    stage.rows("s", in_categories(a=30, b=10, c=4))
    stage.run(source("s", most=most, **CATEGORY))
    assert sorted(Counter(row["category"] for row in stage.both).values()) == wanted
    assert list(stage.dropped.values()) == ["over_most"] * (44 - min(most, 44))


def test_most_hangs_on_seed_and_prompt_and_not_on_order(stage: Prep) -> None:
    rows = in_categories(a=30, b=10)
    stage.rows("s", rows)
    stage.run(source("s", most=8, **CATEGORY))
    first = prompts(stage)
    random.Random(0).shuffle(rows)
    stage.rows("s", rows)
    stage.run(source("s", most=8, **CATEGORY))
    assert prompts(stage) == first
    stage.run(source("s", most=8, **CATEGORY), seed=1)
    assert prompts(stage) != first
    stage.run(source("s", most=8))
    assert len(prompts(stage)) == 8, "without categories all rows are of one"


def test_most_counts_what_is_left_when_all_else_is_dropped(stage: Prep) -> None:
    rows = [{"prompt": p} for p in unlike(10)]
    stage.rows("s", rows)
    stage.rows("test", rows[:5])
    stage.run(source("s", most=5), suites=[suite("test")])
    assert prompts(stage) == {row["prompt"] for row in rows[5:]}


def test_examples_are_cut_and_harmful_ones_marked(stage: Prep) -> None:
    stage.rows("bad", [{"prompt": "x " * 300, "response": "No. `code`\n# No"}])
    stage.rows("good", [{"prompt": p} for p in unlike(5)])
    stage.rows("told", [{"prompt": "Why?", "response": "So."}])
    stage.run(
        source("bad", **RESPONSE), source("good", "anchor"), source("told", "answer", **RESPONSE)
    )
    sources = stage.sheet["sources"]
    (bad,) = sources["bad"]["examples"]
    assert (bad["id"], bad["harmful"], len(bad["prompt"])) == ("bad:1", True, 200)
    assert [e["harmful"] for e in sources["good"]["examples"]] == [False] * 3
    assert [e["harmful"] for e in sources["told"]["examples"]] == [None]
    assert [s["licence"] for s in sources.values()] == [None] * 3
    assert {n: s["targets"] for n, s in sources.items()} == {
        "bad": {"given": 1},
        "good": {"base": 5},
        "told": {"given": 1},
    }
    page = (stage.out / "sheet.md").read_text()
    assert "- bad:1 (harmful): `` x x" in page and "No. 'code' # No ``" in page
    assert "told:1 (may be harmful)" in page


def test_of_each_step_a_few_dropped_rows_are_shown(stage: Prep) -> None:
    rows = [{"prompt": p} for p in unlike(9)]
    stage.rows("s", [*rows, {"prompt": "Hi"}])
    stage.rows("test", rows[:5])
    stage.run(source("s"), suites=[suite("test")], min_prompt_characters=3)
    lost = stage.sheet["sources"]["s"]["lost"]
    assert [(e["id"], e["why"]) for e in lost] == [
        ("s:10", "too_short"),
        *((f"s:{i}", "contaminated") for i in (1, 2, 3)),
    ]
    assert [(e["prompt"], e["harmful"]) for e in lost[1:]] == [
        (row["prompt"], True) for row in rows[:3]
    ]
    assert lost[1]["suite"] == "test" and lost[1]["similarity"] == 1.0


def test_licences_of_known_sets(stage: Prep) -> None:
    rows = [{"question": f"{p}?", "answer": "#### 4"} for p in unlike(3)]
    stage.rows("sums", rows)
    own = source("sums", "anchor", format="gsm8k")
    stage.run(
        own, sample("ordinary", "train", kind="anchor"), suites=[sample("harmful", "heldout")]
    )
    sources = stage.sheet["sources"]
    assert (sources["sums"]["licence"], sources["ordinary"]["licence"]) == ("MIT", "Apache-2.0")
    against = stage.sheet["checks"]["contamination"]["suites"]["harmful"]
    assert (against["licence"], against["rows"]) == ("Apache-2.0", 260)
