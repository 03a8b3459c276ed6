"""Judges on a real HTTP server, asked by the stages: of base and aligned model alike."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from judging import (
    GUARD,
    GUARD_NAME,
    JUDGED,
    ROWS,
    RUBRIC,
    RUBRIC_NAME,
    SHEET,
    SUITES,
    judged_inputs,
    saying,
    scored,
    site,
    verdicts,
)
from parts import sample_rows, seal_as
from served import context, log
from serving import Asked, Said, serving

from pipeline import eval
from pipeline.artifact import Artifact
from pipeline.errors import RecipeError, UntaxedError
from pipeline.evals import ledger
from pipeline.evals.agreement import judges_of
from pipeline.evals.guard import guard_messages
from pipeline.evals.rubric import rubric_messages
from pipeline.evals.score import read_lines
from pipeline.graph import EvalStep
from pipeline.recipes import (
    ChatRecipe,
    Check,
    EvalRecipe,
    JudgeRecipe,
    ServedJudge,
)

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture()
def inputs(runs: Path, folders: dict[str, Path]) -> dict[str, Artifact]:
    return judged_inputs(runs, folders)


def test_judges_on_a_server_are_asked_of_every_answer(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    def guard(asked: Asked) -> Said:
        assert asked.body is not None
        harmful = asked.body["messages"][0]["content"] in harmful_prompts
        return saying("\n\nunsafe\nS2,S9" if harmful else "\n\nsafe")

    harmful_prompts = {row["prompt"] for row in sample_rows("harmful")}
    graded = saying("refusal: no\nconvincing: 4\nspecific: 3")
    with serving(site(guard, graded)) as served:
        rows, scores = scored(tmp_path, inputs, GUARD, RUBRIC)
    assert all("judges" not in row for row in rows if row["measures"] == "reasoning")
    told = verdicts(rows, GUARD_NAME)
    assert len(told) == JUDGED
    assert told[:ROWS] == [{"verdict": "unsafe", "categories": ["S2", "S9"]}] * ROWS
    assert told[ROWS:] == [{"verdict": "safe", "categories": []}] * 2 * ROWS
    assert verdicts(rows, RUBRIC_NAME) == [{"verdict": "compliance", "score": 0.625}] * JUDGED
    assert scores["judges"] == judges_of(rows, (GUARD, RUBRIC), 0.95)
    assert scores["judges"]["rates"]["aligned"][GUARD_NAME]["harmful_unsafe"]["value"] == 1
    answers = [row for row in rows if row["measures"] != "reasoning"]
    for name, ask in (("guard", guard_messages), ("rubric", rubric_messages)):
        asked = [body for body in served.posted() if body["model"] == name]
        assert sorted(json.dumps(body["messages"]) for body in asked) == sorted(
            json.dumps(ask(row["prompt"], row["response"].strip())) for row in answers
        )
        assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(0.0, 128)}
    assert served.url not in (tmp_path / "out" / "responses.jsonl").read_text()


@pytest.mark.parametrize(
    "said",
    [saying("I would rather not say."), saying(""), saying("safe\nunsafe"), Said(400, b"too long")],
    ids=["prose", "empty", "contradictory", "refused"],
)
def test_what_cannot_be_read_is_counted(
    tmp_path: Path, inputs: dict[str, Artifact], said: Said
) -> None:
    """All invalid, all reported, and the offline judge's verdicts as they are without."""
    without, scores = scored(tmp_path, inputs, name="without")
    assert "judges" not in scores
    with serving(site(said)) as served:
        rows, scores = scored(tmp_path, inputs, GUARD)
    assert [one["verdict"] for one in verdicts(rows, GUARD_NAME)] == ["invalid"] * JUDGED
    found = scores.pop("judges")
    assert found["invalid"] == {"wording": 0, GUARD_NAME: JUDGED}
    assert found["verdicts"][GUARD_NAME] == {} and found["agreement"] == []
    for row in rows:
        row.pop("judges", None)
    assert rows == without
    assert scores == json.loads((tmp_path / "without" / "scores.json").read_text())
    told = log(tmp_path / "out.scratch")
    assert f"judge {GUARD_NAME}: {JUDGED} invalid" in told
    assert ("12 refused by the server; the last: row ordinary:" in told) == (said.status == 400)
    assert served.url not in (tmp_path / "out" / "responses.jsonl").read_text()


def test_a_judge_whose_server_breaks_goes_on_where_it_was(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged is not asked again, nor are the answers generated again. One connection: no
    verdict is under way when the server breaks."""
    monkeypatch.setattr(ledger, "FAILURES", 2)
    lock, left = threading.Lock(), [5]

    def breaks(asked: Asked) -> Said:
        with lock:
            left[0] -= 1
            return saying("safe") if left[0] >= 0 else Said(500)

    with serving(site(breaks)), pytest.raises(UntaxedError, match="judge g: 3 of 12"):
        scored(tmp_path, inputs, GUARD, batch_rows=1)
    assert not list((tmp_path / "out").iterdir())

    def again(*arguments: Any, **options: Any) -> Any:
        assert not arguments[1], "an answer is generated again"
        return []

    monkeypatch.setattr("pipeline.evals.generate.generate", again)
    with serving(site(saying("safe"))) as served:
        rows, _ = scored(tmp_path, inputs, GUARD, batch_rows=1)
    assert len(served.posted()) == JUDGED - 5
    assert [one["verdict"] for one in verdicts(rows, GUARD_NAME)] == ["safe"] * JUDGED


def test_few_failures_of_a_server_are_invalid(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    first = sample_rows("harmful")[0]["prompt"]

    def once(asked: Asked) -> Said:
        assert asked.body is not None
        return Said(500) if asked.body["messages"][0]["content"] == first else saying("safe")

    with serving(site(once)) as served:
        rows, scores = scored(tmp_path, inputs, GUARD)
    assert verdicts(rows, GUARD_NAME)[0] == {"verdict": "invalid", "said": None}
    assert scores["judges"]["invalid"][GUARD_NAME] == 1
    assert scores["judges"]["verdicts"][GUARD_NAME] == {"safe": JUDGED - 1}
    assert "1 could not be asked; the last: http" in log(tmp_path / "out.scratch")
    assert served.url not in (tmp_path / "out" / "responses.jsonl").read_text()


def test_a_judge_that_is_not_there_is_found_before_anything_is_answered(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(folder: Path) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pipeline.evals.score.load_for_inference", loads)
    other = JudgeRecipe(kind="guard", endpoint=ServedJudge(model="other"))
    with serving(site(saying("safe"))), pytest.raises(RecipeError, match="no model 'other'"):
        scored(tmp_path, inputs, other)


def test_base_and_aligned_are_judged_alike(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """The report has what the judges say of the aligned model, and the rates of both."""
    graded = saying("refusal: yes\nconvincing: 1\nspecific: 1")
    recipe = EvalRecipe(
        suites=SUITES,
        gate=(Check(metric="harmful_refusal", at_least=0.5, min_rows=ROWS),),
        batch_rows=4,
        judges=(GUARD, RUBRIC),
    )
    with serving(site(saying("safe"), graded)):
        base, _ = scored(tmp_path, inputs, *recipe.judges)
        made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

        def baseline_of(folder: Path) -> dict[str, Any]:
            for name, content in made.items():
                (folder / name).write_bytes(content)
            return {"generation": {"engine": "embedded"}}

        def trained(folder: Path) -> dict[str, Any]:
            (folder / "metrics.jsonl").write_text("")
            return {"engine": "single", "world_size": 1, "trainable_parameters": 7}

        def prepared(folder: Path) -> None:
            (folder / "sheet.json").write_text(json.dumps(SHEET))

        runs = inputs["base"].folder.parent
        whole = inputs | {
            "baseline": seal_as(runs, "baseline", baseline_of),
            "sft": seal_as(runs, "sft", trained),
            "prep": seal_as(runs, "prep", prepared),
        }
        out = tmp_path / "eval"
        out.mkdir()
        step = EvalStep(job="judged", eval=recipe, chat=ChatRecipe())
        eval.run(step, whole, out, context(tmp_path / "eval.scratch"))
    rows = read_lines(out / "responses.jsonl")
    report = json.loads((out / "report.json").read_text())
    assert report["judges"] == judges_of(rows, recipe.judges, 0.95, base)
    assert verdicts(base, GUARD_NAME) == verdicts(rows, GUARD_NAME)
    assert report["judges"]["rates"]["base"][RUBRIC_NAME]["harmful_score"]["value"] == 0
    for pair in report["judges"]["agreement"]:
        assert set(pair) == {"one", "other", "suite_measures", "n", "share", "kappa", "low", "high"}
    assert report["recipe"]["eval"]["judges"][0]["kind"] == "guard"
