"""The rows that a choice is made on: none that is reported or was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parts import sample_rows, seal_as, seal_rows

from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError
from pipeline.evals.development import read_development
from pipeline.recipes import ChooseRecipe, EvalSource


def conversation(source: str, kind: str, number: int, prompt: str) -> dict[str, Any]:
    return {
        "id": f"{source}:{number}",
        "source": source,
        "kind": kind,
        "category": None,
        "messages": [{"role": "user", "content": prompt}],
        "response": "No.",
        "response_ids": [5, 6, 2],
    }


def development(
    runs: Path,
    dev: list[str],
    suite: list[str],
    reported: list[str],
    trained: list[str],
    measures: str = "harmful",
) -> Any:
    """The development rows of these prompts: split off by prep, of a suite, reported, trained on."""

    def fill(folder: Path) -> None:
        split = {
            "dev": [conversation("talk", "anchor", i, text) for i, text in enumerate(dev, 1)],
            "train": [conversation("talk", "anchor", i, text) for i, text in enumerate(trained)],
        }
        for name, rows in split.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    inputs: dict[str, Artifact] = {
        "anchor": seal_as(runs, "anchor", fill),
        "data.own": seal_rows(runs, [{"prompt": text} for text in suite]),
        "data.reported": seal_rows(runs, [{"prompt": text} for text in reported]),
    }
    own = {"name": "own", "measures": measures, "source": "own.jsonl"}
    told = EvalSource(name="reported", measures="harmful", source="other.jsonl")
    recipe = ChooseRecipe.model_validate(
        {"suites": [own], "wanted": [{"metric": "over_refusal", "at_most": 1}]}
    )
    return read_development(recipe, [told], inputs, 0.8)


PROMPTS = [row["prompt"] for row in sample_rows("harmful")[:12]]


def test_rows_that_are_reported_or_trained_on_are_left_out(runs: Path) -> None:
    nearly = PROMPTS[1].upper() + "!"
    found = development(
        runs,
        dev=PROMPTS[6:9],
        suite=PROMPTS[:5],
        reported=[PROMPTS[0], nearly, PROMPTS[6], PROMPTS[11]],
        trained=[PROMPTS[2], PROMPTS[2], PROMPTS[0], PROMPTS[10]],
    )
    assert [item.row.id for item in found.items] == ["own:4", "own:5", "dev/talk:2", "dev/talk:3"]
    assert [row["id"] for row in found.anchors] == ["talk:2", "talk:3"]
    assert found.dropped == {"reported": 3, "trained": 1}
    assert found.measured == {"harmful_refusal", "benign_refusal", "over_refusal", "anchor_nll"}
    assert [item.suite.measures for item in found.items] == ["harmful"] * 2 + ["benign"] * 2


def test_a_suite_that_is_reported_under_another_name_is_refused(runs: Path) -> None:
    with pytest.raises(DataError) as caught:
        development(runs, PROMPTS[6:8], PROMPTS[:3], PROMPTS[:2] + PROMPTS[5:6], PROMPTS[2:3])
    assert (
        "choose: of the 3 rows of own, 2 ask what a suite that is reported asks and 1 what"
        in str(caught.value)
    )


def test_a_suite_of_problems_needs_their_answers(runs: Path) -> None:
    with pytest.raises(RecipeError, match=r"choose\.suites own: measures reasoning and names no"):
        development(runs, PROMPTS[:1], PROMPTS[1:3], [], [], measures="reasoning")


def test_rows_are_compared_without_what_their_set_adds(runs: Path) -> None:
    """Short options and how to answer would make the same question look like another one."""
    rows = [
        {
            "question": f"{word} of these?",
            "options": ["a long first choice", "some other second one", "neither of those two"],
            "answer": "A",
            "answer_index": 0,
            "category": "math",
        }
        for word in ("Which", "Why", "None")
    ]
    choose = ChooseRecipe.model_validate(
        {
            "dev": None,
            "suites": [
                {"name": "own", "measures": "reasoning", "source": "x", "format": "mmlu-pro"}
            ],
            "wanted": [{"metric": "reasoning_accuracy", "at_least": 0.5}],
        }
    )
    reported = EvalSource.model_validate(
        {"name": "told", "measures": "reasoning", "source": "y", "format": "mmlu-pro"}
    )
    inputs = {
        "prep": seal_as(runs, "prep", lambda f: [(f / n).touch() for n in FILES] and None),
        "data.own": seal_rows(runs, rows),
        "data.told": seal_rows(runs, rows[:2]),
    }
    found = read_development(choose, [reported], inputs, 0.8)
    assert [item.row.id for item in found.items] == ["own:3"]
    assert found.dropped == {"reported": 2, "trained": 0}


FILES = ("train.jsonl", "dev.jsonl")
