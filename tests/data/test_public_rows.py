"""What prep finds in public sets that people train on: the numbers of docs/design.md."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from parts import sample_rows

from pipeline.data.contamination import Suites, Text
from pipeline.data.dedup import normalised
from pipeline.data.languages import foreign
from pipeline.data.tables import read_table

DATA = Path(os.environ.get("UNTAXED_DATA", "."))
TRAIN = {
    "advbench/harmful_behaviors.csv": ("goal",),
    "refusal_direction/harmful_train.json": ("instruction",),
    "refusal_direction/harmless_train_first3000.json": ("instruction",),
    "star1/STAR-1.json": ("question", "response"),
    "gsm8k/train_first1000.jsonl": ("question", "answer"),
}
TEST = {
    "strongreject/strongreject_dataset.csv": ("forbidden_prompt",),
    "xstest/xstest_prompts.csv": ("prompt",),
    "gsm8k/test.jsonl": ("question", "answer"),
}
SAMPLES = ("harmful", "borderline", "ordinary", "arithmetic")
pytestmark = pytest.mark.skipif(
    not all((DATA / name).is_file() for name in (*TRAIN, *TEST)),
    reason="UNTAXED_DATA has no public data sets",
)


def texts(name: str, prompt: str, *others: str) -> list[Text]:
    return [
        Text(r.place, (r.values[prompt],), tuple(r.values[column] for column in others))
        for r in read_table(DATA / name, name)
    ]


def test_rows_to_train_on_that_are_in_evaluation_sets() -> None:
    held = {name: texts(name, *columns) for name, columns in TEST.items()}
    suites = Suites(held)
    assert not any(suites.ignored.values())
    reject = {normalised(text.prompts[0]) for text in held["strongreject/strongreject_dataset.csv"]}
    found = {}
    for name, columns in TRAIN.items():
        rows = texts(name, *columns)
        hits = suites.find(rows, 0.8)
        found[name.partition("/")[0], len(rows)] = Counter(
            (hit.suite.partition("/")[0], "words" if hit.shared else "similar") for hit in hits
        )
        if name.startswith("advbench"):
            same = [hit for hit in hits if normalised(rows[hit.index].prompts[0]) in reject]
            assert len(same) == 25
    assert found == {
        ("advbench", 520): {("strongreject", "similar"): 26, ("strongreject", "words"): 2},
        ("refusal_direction", 260): {("strongreject", "similar"): 1, ("strongreject", "words"): 1},
        ("refusal_direction", 3000): {},
        ("star1", 1000): {},
        ("gsm8k", 1000): {("gsm8k", "words"): 3},
    }


def test_english_prompts_that_are_taken_for_foreign() -> None:
    prompts = [row["prompt"] for name in SAMPLES for row in sample_rows(name)]
    for name, (column, *_) in (TRAIN | TEST).items():
        if name not in ("advbench/harmful_behaviors.csv", "gsm8k/train_first1000.jsonl"):
            prompts += [text.prompts[0] for text in texts(name, column)]
    language = foreign(["en"])
    lost = [prompt for prompt in prompts if language(prompt)]
    assert (len(prompts), len(lost)) == (8162, 2)
    assert all("ranslat" in prompt for prompt in lost), "they quote another language"
