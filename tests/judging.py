"""A small baseline with judges: on a server that says what a test wants, or in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import adopt_folder, sample_rows, sample_suites, seal_as
from served import context
from serving import Answer, Asked, Said, as_json, models

from pipeline import baseline
from pipeline.artifact import Artifact
from pipeline.data.sheet import make_sheet
from pipeline.evals.score import read_lines
from pipeline.graph import BaselineStep
from pipeline.recipes import (
    ChatRecipe,
    JudgeRecipe,
    ServedJudge,
)

NAMES = {
    "harmful": "harmful",
    "borderline": "borderline",
    "benign": "ordinary",
    "reasoning": "arithmetic",
}
SUITES = sample_suites(NAMES, max_new_tokens=12)
SOURCE = {
    "name": "train",
    "kind": "refusal",
    "source": "sample:harmful",
    "where": {"split": "train"},
    "columns": {"response": "response"},
}
ROWS = 4
JUDGED = 3 * ROWS
SHEET = make_sheet([], {"contamination": None, "near_duplicates": None, "languages": None})
GUARD = JudgeRecipe(kind="guard", name="g", endpoint=ServedJudge(model="guard"))
RUBRIC = JudgeRecipe(kind="rubric", endpoint=ServedJudge(model="rubric"))
GUARD_NAME, RUBRIC_NAME = "g", "rubric:rubric"


def judged_inputs(runs: Path, folders: dict[str, Path]) -> dict[str, Artifact]:
    """Base, merged model and suites."""

    def rows(name: str) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            text = "".join(json.dumps(row) + "\n" for row in sample_rows(name)[:ROWS])
            (folder / "rows.jsonl").write_text(text)

        return fill

    return {
        "base": adopt_folder(runs, folders["base"]),
        "merge": adopt_folder(runs, folders["aligned"]),
        **{f"data.{name}": seal_as(runs, "data", rows(name)) for name in NAMES.values()},
    }


def scored(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    *recipes: JudgeRecipe,
    name: str = "out",
    batch_rows: int = 4,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and scores of a baseline with these judges."""
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    step = BaselineStep(
        suites=SUITES,
        chat=ChatRecipe(),
        batch_rows=batch_rows,
        temperature=0.0,
        seed=0,
        judges=recipes,
    )
    baseline.run(step, inputs, out, context(tmp_path / f"{name}.scratch"))
    return read_lines(out / "responses.jsonl"), json.loads((out / "scores.json").read_text())


def saying(text: str | None, finish: str = "stop") -> Said:
    return as_json({"choices": [{"message": {"content": text}, "finish_reason": finish}]})


def site(guard: Said | Answer, rubric: Said | Answer | None = None) -> Answer:
    """Two judges on one server, each of which says one thing, or what a function says."""

    def answer(asked: Asked) -> Said:
        if asked.body is None:
            return models("guard", "rubric")
        assert asked.path.endswith("/v1/chat/completions")
        said = guard if asked.body["model"] == "guard" else rubric
        assert said is not None
        return said if isinstance(said, Said) else said(asked)

    return answer


def verdicts(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row["judges"][name] for row in rows if row["measures"] != "reasoning"]
