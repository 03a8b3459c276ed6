"""Judges whose model is in this process: adopted like a base, one in memory at a time."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from breaking import JOB
from judging import (
    GUARD,
    JUDGED,
    SOURCE,
    judged_inputs,
    scored,
    verdicts,
)
from parts import CHATML, adopt_folder, make_model, make_tokenizer
from served import context, log

from pipeline.artifact import Artifact
from pipeline.evals import engines, judges
from pipeline.evals.score import load_for_inference
from pipeline.graph import Planned, Workspace, plan_job
from pipeline.jobfile import parse_job
from pipeline.recipes import (
    BaseRecipe,
    JudgeRecipe,
)


@pytest.fixture()
def inputs(runs: Path, folders: dict[str, Path]) -> dict[str, Artifact]:
    return judged_inputs(runs, folders)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for the rubric."""
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder, num_hidden_layers=1, max_position_embeddings=4096)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["guard", "rubric"])
def test_a_model_that_knows_nothing_judges_nothing(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    judge_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
) -> None:
    """A random model in this process, loaded once, and after the judged one is let go of."""
    seen: list[tuple[Path, weakref.ref[Any]]] = []

    def loads(folder: Path) -> Any:
        gc.collect()
        assert all(alive() is None for _, alive in seen), "two models in memory"
        model = load_for_inference(folder)
        seen.append((folder, weakref.ref(model)))
        return model

    monkeypatch.setattr("pipeline.evals.score.load_for_inference", loads)
    monkeypatch.setattr(judges, "load_for_inference", loads)
    source = adopt_folder(inputs["base"].folder.parent, judge_folder)
    recipe = JudgeRecipe(
        kind=kind, name="j", model=BaseRecipe(source=str(judge_folder)), max_new_tokens=8
    )
    rows, scores = scored(tmp_path, inputs | {"judge.j": source}, recipe)
    assert [folder for folder, _ in seen] == [inputs["base"].folder, source.folder]
    told = verdicts(rows, "j")
    assert len(told) == JUDGED
    assert {one["verdict"] for one in told} == {"invalid"} and all(one["said"] for one in told)
    assert scores["judges"]["invalid"]["j"] == JUDGED


def test_what_does_not_fit_a_judge_is_invalid(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """512 positions take no rubric: no answer of the model is lost over that."""
    recipe = JudgeRecipe(kind="rubric", name="j", model=BaseRecipe(source="./m"))
    rows, _ = scored(tmp_path, inputs | {"judge.j": inputs["merge"]}, recipe)
    assert verdicts(rows, "j") == [{"verdict": "invalid", "said": None}] * JUDGED
    told = log(tmp_path / "out.scratch")
    assert "judge j: 12 could not be asked; the last: row ordinary:" in told
    assert "more than the model's 512 positions" in told


def test_a_judge_is_asked_by_its_own_template(
    tmp_path: Path, inputs: dict[str, Artifact], judge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template of a guard gets request and answer, and writes its policy around them."""
    policy = (
        "POLICY{% for m in messages %}[{{ m['role'] }}: {{ m['content'] }}]{% endfor %} VERDICT:"
    )
    guard = tmp_path / "guard"
    guard.mkdir()
    for path in judge_folder.iterdir():
        text = path.read_bytes()
        (guard / path.name).write_bytes(text)
    (guard / "chat_template.jinja").write_text(policy)
    source = adopt_folder(inputs["base"].folder.parent, guard)
    seen: list[str] = []
    real = engines.Embedded.answers

    def answers(self: engines.Embedded, requests: Any, done: Any, title: str) -> None:
        if "judge" in title:
            seen.extend(self.chat.tokenizer.decode(r.prompt_ids) for r in requests)
        real(self, requests, done, title)

    monkeypatch.setattr(engines.Embedded, "answers", answers)
    recipe = JudgeRecipe(kind="guard", name="j", model=BaseRecipe(source="./g"), max_new_tokens=2)
    rows, _ = scored(tmp_path, inputs | {"judge.j": source}, recipe)
    assert CHATML not in policy and len(seen) == JUDGED
    for text, row in zip(seen, (r for r in rows if r["measures"] != "reasoning"), strict=True):
        said = row["response"].strip()
        assert text == f"POLICY[user: {row['prompt']}][assistant: {said}] VERDICT:"


def test_a_judge_of_the_whole_reads_thoughts_and_answer() -> None:
    row = {"think": " why? ", "response": "So. ", "prompt": "p", "id": "s:1", "sample": 2}
    texts = {}
    for reads in ("answer", "whole"):
        recipe = GUARD.model_copy(update={"reads": reads})
        judge = judges.Judge(recipe, 1, context(Path("/nowhere")), None, None, None)  # type: ignore[arg-type]
        texts[reads] = judge.text_of(row), judge.text_of(row | {"response": ""})
    assert texts == {"answer": ("So.", ""), "whole": ("why?\n\nSo.", "why?")}


def test_keys_hang_on_the_judges_and_on_their_weights(
    tmp_path: Path, runs: Path, folders: dict[str, Path]
) -> None:
    """Of what measures; not of what is trained."""
    folder = tmp_path / "judge"
    shutil.copytree(folders["base"], folder)
    tree = JOB | {"base": {"source": str(folders["base"])}}
    tree = tree | {"prep": {"sources": [SOURCE]}}
    judge = {"kind": "guard", "name": "j", "model": {"source": str(folder)}}
    with_judge = tree | {"eval": tree["eval"] | {"judges": [judge]}}

    def planned(tree: dict[str, Any], adopt: bool = True) -> dict[str, Planned]:
        return plan_job(parse_job(tree, "job.yaml"), Workspace(runs), adopt=adopt)

    without = planned(tree)
    assert planned(with_judge, adopt=False)["baseline"].key == ""
    first = planned(with_judge)
    assert "base-" in first["baseline"].upstream["judge.j"].name
    assert planned(with_judge, adopt=False)["eval"].key == first["eval"].key != ""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for path in folders["aligned"].glob("*.safetensors*"):
        shutil.copy(path, folder)
    other = planned(with_judge)
    for stage in ("baseline", "eval"):
        assert len({plan[stage].key for plan in (without, first, other)}) == 3
    for stage in ("prep", "pack", "sft", "merge"):
        assert len({plan[stage].key for plan in (without, first, other)}) == 1
