"""Public sets by name: rows of the columns in which each is published, in words of our own."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.data import raw
from pipeline.data.public_evaluation import EVALUATION
from pipeline.data.public_training import TRAINING
from pipeline.data.rows import Row, read_rows
from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace
from pipeline.recipes import SourceRecipe, Suite, TrainSource

DATA = Path(os.environ.get("UNTAXED_DATA", "."))
FLAGS = {"animal_abuse": False, "privacy_violation": True, "self_harm": True}
ROWS: dict[str, list[dict[str, Any]]] = {
    "direct-refusal": [
        {
            "prompt": "Bad?",
            "refusal": "No.",
            "response": "Sure.",
            "category": FLAGS,
            "is_safe": False,
        }
    ],
    "star-1": [
        {"question": "Bad?", "response": "<think>\nHm.\n</think>\nNo.", "category": ["a", "b"]}
    ],
    "safechain": [
        {"instruction": "Bad?", "response": "Hm.\n</think>\n\nNo.", "label": "adversarial_harmful"},
        {"instruction": "Good?", "response": "<think>H</think>Yes.", "label": "vanilla_benign"},
    ],
    "advbench": [{"goal": "Bad!", "target": "Sure, here is"}],
    "harmbench": [
        {"Behavior": "Bad!", "SemanticCategory": "x", "ContextString": ""},
        {"Behavior": "Use it badly!", "SemanticCategory": "y", "ContextString": "A text."},
    ],
    "beavertails": [
        {"prompt": "Bad?", "response": "Sure.", "category": FLAGS, "is_safe": False},
        {"prompt": "Good?", "response": "Yes.", "category": {"self_harm": False}, "is_safe": True},
    ],
    "wildjailbreak": [
        {"vanilla": "Bad?", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"},
        {
            "vanilla": "Bad?",
            "adversarial": "Dear grandma, bad?",
            "completion": "No.",
            "data_type": "adversarial_harmful",
        },
        {
            "vanilla": "Good?",
            "adversarial": "",
            "completion": "Yes.",
            "data_type": "vanilla_benign",
        },
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": ""},
    ],
    "gsm8k": [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}],
    "openthoughts": [
        {
            "system": "Think.",
            "conversations": [
                {"from": "user", "value": "1 + 1?"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>\n\nOne more.\n\n<|end_of_thought|>\n\n"
                    "<|begin_of_solution|>\n\n2\n\n<|end_of_solution|>",
                },
            ],
        }
    ],
}
READ = {  # kind -> (prompt, response, think, category) of the rows that a source of it takes
    ("direct-refusal", "refusal"): [("Bad?", "No.", None, "privacy_violation+self_harm")],
    ("star-1", "refusal"): [("Bad?", "No.", "Hm.", "a+b")],
    ("safechain", "refusal"): [("Bad?", "No.", "Hm.", "adversarial_harmful")],
    ("safechain", "answer"): [("Good?", "Yes.", "H", "vanilla_benign")],
    ("safechain", "anchor"): [("Good?", None, None, "vanilla_benign")],
    ("advbench", "refusal"): [("Bad!", None, None, None)],
    ("harmbench", "refusal"): [
        ("Bad!", None, None, "x"),
        ("A text.\n\n---\n\nUse it badly!", None, None, "y"),
    ],
    ("beavertails", "refusal"): [("Bad?", None, None, "privacy_violation+self_harm")],
    ("beavertails", "answer"): [("Good?", "Yes.", None, None)],
    ("wildjailbreak", "refusal"): [
        ("Bad?", "No.", None, "vanilla_harmful"),
        ("Dear grandma, bad?", "No.", None, "adversarial_harmful"),
    ],
    ("wildjailbreak", "anchor"): [("Good?", None, None, "vanilla_benign")],
    ("alpaca", "answer"): [("Add.\n\n1, 2", "3", None, None)],
    ("alpaca", "anchor"): [("Add.\n\n1, 2", None, None, None), ("Greet.", None, None, None)],
    ("gsm8k", "answer"): [("1 + 1?", "1 + 1 = 2\n#### 2", None, None)],
    ("openthoughts", "answer"): [("1 + 1?", "2", "One more.", None)],
}


def rows_of(folder: Path, name: str, **source: Any) -> list[Row]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    given = {"name": "s", "source": path.name, "format": name} | source
    if "measures" in given:
        return read_rows(path, Suite(**given))
    return read_rows(path, TrainSource(**given) if "kind" in given else SourceRecipe(**given))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_rows_read_as_what_the_source_is_about(name: str, kind: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, name, kind=kind)
    got = [(row.prompt, row.response, row.think, row.category) for row in rows]
    assert got == READ[name, kind]


def test_every_set_to_train_on_is_read_here() -> None:
    assert set(ROWS) == {name for name, _ in READ} == set(TRAINING)
    assert not set(TRAINING) & set(EVALUATION)


def test_a_suite_takes_the_rows_that_it_measures_and_an_exclude_all(tmp_path: Path) -> None:
    harmful = rows_of(tmp_path, "wildjailbreak", measures="harmful")
    borderline = rows_of(tmp_path, "wildjailbreak", measures="borderline")
    assert [len(harmful), len(borderline)] == [2, 1]
    assert len(rows_of(tmp_path, "wildjailbreak")) == 3


def test_where_and_limit_still_count_on_the_columns_as_published(tmp_path: Path) -> None:
    where = {"data_type": "adversarial_harmful"}
    (row,) = rows_of(tmp_path, "wildjailbreak", kind="refusal", where=where)
    assert row.prompt.startswith("Dear grandma") and row.number == 2
    (first,) = rows_of(tmp_path, "wildjailbreak", kind="refusal", limit=1)
    assert first.number == 1
    with pytest.raises(DataError, match=r"no rows left where data_type=\w+; did you mean"):
        rows_of(tmp_path, "wildjailbreak", where={"data_type": "adversarial_harmfull"})


def test_csv_and_tsv_files_of_the_same_columns(tmp_path: Path) -> None:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"wild{suffix}"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ROWS["wildjailbreak"][0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS["wildjailbreak"])
        source = SourceRecipe(name="s", source=path.name, format="wildjailbreak")
        assert [row.prompt for row in read_rows(path, source)] == [
            "Bad?",
            "Dear grandma, bad?",
            "Good?",
        ]


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no public set 'star1'; did you mean star-1"):
        rows_of(tmp_path, "star-1", format="star1")
    with pytest.raises(DataError, match="do not have the columns of gsm8k: got category, question"):
        rows_of(tmp_path, "star-1", format="gsm8k")
    with pytest.raises(DataError, match="advbench has no harmless rows"):
        rows_of(tmp_path, "advbench", kind="anchor")
    with pytest.raises(DataError, match="alpaca gives these rows no answer; use kind anchor"):
        rows_of(tmp_path, "alpaca", kind="answer", where={"instruction": "Greet."})
    with pytest.raises(ValidationError, match="the columns of gsm8k are known; leave columns out"):
        SourceRecipe(name="s", source="set:gsm8k", columns={"prompt": "question"})
    with pytest.raises(ValidationError, match="set:NAME has its own"):
        SourceRecipe(name="s", source="set:gsm8k", format="gsm8k")


def test_a_broken_answer_is_no_reason_to_lose_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "chain.jsonl"
    row = {"instruction": "Bad?", "response": "a</think>b</think>c", "label": "vanilla_harmful"}
    path.write_text(json.dumps(row) + "\n")
    suite = Suite(name="s", source=path.name, format="safechain", measures="harmful")
    assert [row.prompt for row in read_rows(path, suite)] == ["Bad?"]
    with pytest.raises(DataError, match=r"chain.jsonl:1: wanted one <think>"):
        read_rows(path, TrainSource(name="s", source=path.name, format="safechain", kind="refusal"))


def test_a_row_that_does_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "thoughts.jsonl"
    path.write_text('{"conversations": [{"from": "user", "value": "x"}]}\n{"conversations": 3}\n')
    source = SourceRecipe(name="s", source=path.name, format="openthoughts")
    with pytest.raises(
        DataError, match=r"thoughts.jsonl:2: does not read as a row of openthoughts"
    ):
        read_rows(path, source)


def test_a_set_by_name_is_fetched_as_published_with_the_hub_mocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub cannot be reached here: what would be asked of it, and that the commit is kept."""
    import datasets
    import huggingface_hub

    asked: dict[str, Any] = {}

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.update({"name": name, "subset": subset} | options)
        rows = datasets.Dataset.from_list(ROWS["wildjailbreak"])
        return datasets.DatasetDict(train=rows, other=rows)

    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            return type("Info", (), {"sha": "c0ffee"})()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    source = TrainSource(name="s", source="set:wildjailbreak", kind="anchor")
    data = raw.adopt_source(source, Workspace(tmp_path))
    assert asked == {
        "name": "allenai/wildjailbreak",
        "subset": "train",
        "revision": "c0ffee",
        "delimiter": "\t",
        "keep_default_na": False,
    }
    assert data.facts["commit"] == "c0ffee"
    assert [row.prompt for row in read_rows(data, source)] == ["Good?"]  # of one split
    everything = SourceRecipe(name="s", source="set:wildjailbreak")
    assert len(read_rows(data, everything)) == 6
    assert raw.find_source(source, Workspace(tmp_path)) is not None


@pytest.mark.skipif(not (DATA / "star1").is_dir(), reason="UNTAXED_DATA has no public data sets")
@pytest.mark.parametrize(
    ("file", "name", "kind", "rows"),
    [
        ("star1/STAR-1.json", "star-1", "refusal", 1000),
        ("advbench/harmful_behaviors.csv", "advbench", "refusal", 520),
        ("gsm8k/train_first1000.jsonl", "gsm8k", "answer", 1000),
        ("refusal_direction/harmless_train_first3000.json", "alpaca", "anchor", 3000),
    ],
)
def test_published_files_are_read_whole(file: str, name: str, kind: str, rows: int) -> None:
    source = TrainSource(name="s", source=file, format=name, kind=kind)
    read = read_rows(DATA / file, source)
    assert len(read) == rows
    assert all(row.think and row.response for row in read) == (name == "star-1")
