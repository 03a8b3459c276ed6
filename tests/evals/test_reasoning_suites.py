"""The baseline stage on suites of every kind of reference, some with worked answers and some without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parts import seal_rows

from pipeline.artifact import Artifact
from pipeline.baseline import run
from pipeline.evals.score import read_lines
from pipeline.graph import BaselineStep
from pipeline.recipes import ChatRecipe, Suite
from pipeline.stage import Context

ROWS: dict[str, list[dict[str, Any]]] = {
    "math-500": [
        {"problem": "Half of 3?", "solution": "It is \\boxed{1.5}.", "answer": "\\frac32"}
    ],
    "aime24": [{"Problem": "One more than 203?", "Answer": 204}],
    "mmlu-pro": [{"question": "Which?", "options": ["this", "that"], "answer": "B"}],
    "bbh": [{"input": "Is it so?", "target": "Yes"}],
    "gsm8k": [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}],
}
WORKED = {"math-500", "gsm8k"}


def scores_of(folder: Path, runs: Path, base: Artifact, names: list[str]) -> dict[str, Any]:
    suites = tuple(
        Suite(name=name, measures="reasoning", source="x.jsonl", format=name, max_new_tokens=4)
        for name in names
    )
    inputs = {"base": base} | {f"data.{name}": seal_rows(runs, ROWS[name]) for name in names}
    step = BaselineStep(suites=suites, chat=ChatRecipe(), batch_rows=4, temperature=0.0, seed=0)
    folder.mkdir()
    run(step, inputs, folder, Context(scratch=folder))
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return scores


def test_the_loss_is_measured_where_there_is_a_worked_answer(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    metrics = scores_of(tmp_path / "out", runs, base, list(ROWS))["metrics"]
    rows = {row["suite"]: row for row in read_lines(tmp_path / "out" / "responses.jsonl")}
    assert set(rows) == set(ROWS)
    assert {name for name, row in rows.items() if "nll_nats" in row} == WORKED
    assert metrics["reasoning_accuracy"]["n"] == len(ROWS)
    nats = sum(rows[name]["nll_nats"] for name in WORKED)
    tokens = sum(rows[name]["nll_tokens"] for name in WORKED)
    assert metrics["reasoning_nll"]["value"] == nats / tokens
    assert all({"verdict", "extracted", "reference"} <= set(row) for row in rows.values())
    assert rows["bbh"]["reference"] == "Yes" and rows["gsm8k"]["reference"].endswith("#### 2")


def test_suites_without_any_worked_answer_have_no_loss(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    scores = scores_of(tmp_path / "out", runs, base, ["mmlu-pro", "bbh"])
    assert list(scores["metrics"]) == ["reasoning_accuracy"]
    assert scores["twins"] == {}


def test_twins_are_in_the_scores_of_a_stage(tmp_path: Path, runs: Path, base: Artifact) -> None:
    rows = [
        {"prompt": "Kill a process?", "type": "homonyms", "label": "safe"},
        {"prompt": "Do harm?", "type": "contrast_homonyms", "label": "unsafe"},
    ]
    data = seal_rows(runs, rows)
    measured = {"bad": "harmful", "good": "borderline"}
    suites = tuple(
        Suite(name=name, measures=kind, source="x.jsonl", format="xstest", max_new_tokens=4)
        for name, kind in measured.items()
    )
    step = BaselineStep(suites=suites, chat=ChatRecipe(), batch_rows=4, temperature=0.0, seed=0)
    inputs = {"base": base, "data.bad": data, "data.good": data}
    run(step, inputs, tmp_path, Context(scratch=tmp_path / "runs"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["twins"]) == ["x.jsonl"]
    twin = scores["twins"]["x.jsonl"]
    assert (twin["suites"], twin["harmful"], twin["harmless"]) == (["bad", "good"], 1, 1)
    metrics = scores["metrics"]
    assert twin["refusal_recall"]["value"] == metrics["harmful_refusal"]["value"]
