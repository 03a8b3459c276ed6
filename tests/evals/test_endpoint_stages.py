"""Stages that ask a server: the same rows as with the model in this process, and nothing lost."""

from __future__ import annotations

import _thread
import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parts import adopt_folder, sample_rows, sample_suites, seal_as
from prepping import Prep, sample
from served import context, log
from serving import Answer, Asked, RealModels, Said, serving

from pipeline import anchor, baseline, eval
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError, UntaxedError
from pipeline.evals.client import ALIGNED_ADDRESS
from pipeline.evals.score import measure, read_lines, tally
from pipeline.graph import AnchorStep, BaselineStep, EvalStep
from pipeline.recipes import AnchorRecipe, ChatRecipe, Check, EvalEndpoint, EvalRecipe, ServedModel

pytestmark = pytest.mark.usefixtures("no_waiting")
SECRET = "sk-do-not-tell-4711"
NAMES = {"harmful": "harmful", "benign": "ordinary", "reasoning": "arithmetic"}
SUITES = sample_suites(NAMES, max_new_tokens=16)
ROWS = 8


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]
) -> dict[str, Artifact]:
    """Base, suites, prompts to answer, and a merged model after a training."""
    runs = tmp_path_factory.mktemp("inputs")
    prep = Prep(tmp_path_factory.mktemp("prep"))
    prep.run(sample("ordinary", "train", kind="anchor", limit=12))

    def rows(name: str) -> Callable[[Path], None]:
        text = "".join(json.dumps(row) + "\n" for row in sample_rows(name)[:ROWS])
        return lambda folder: void((folder / "rows.jsonl").write_text(text))

    def conversations(folder: Path) -> None:
        made = [
            {
                "id": f"o:{i}",
                "kind": "anchor",
                "messages": [{"role": "user", "content": r["prompt"]}],
            }
            for i, r in enumerate(sample_rows("ordinary")[:10])
        ]
        (folder / "sheet.json").write_text(json.dumps(prep.sheet))
        for name, part in (("dev", made[:2]), ("train", made[2:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text)

    def trained(folder: Path) -> dict[str, Any]:
        (folder / "metrics.jsonl").write_text("")
        return {"engine": "single", "world_size": 1, "trainable_parameters": 7}

    merged = adopt_folder(runs, folders["aligned"])
    return {
        "base": adopt_folder(runs, folders["base"]),
        "merge": merged,
        "sft": seal_as(runs, "sft", trained),
        "prep": seal_as(runs, "prep", conversations),
        **{f"data.{name}": seal_as(runs, "data", rows(name)) for name in NAMES.values()},
    }


def void(value: object) -> None:
    """For the sake of what ``value`` was computed for."""


def anchored(
    tmp_path: Path, inputs: dict[str, Artifact], name: str, **recipe: Any
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / name
    out.mkdir()
    options = {"max_new_tokens": 16, "truncated": "keep", "batch_rows": 4} | recipe
    step = AnchorStep(anchor=AnchorRecipe(**options), chat=ChatRecipe())
    return out, anchor.run(step, inputs, out, context(tmp_path / f"{name}.scratch"))


def scored(
    tmp_path: Path, inputs: dict[str, Artifact], name: str, **change: Any
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / name
    out.mkdir()
    step = BaselineStep(suites=SUITES, chat=ChatRecipe(), batch_rows=4, temperature=0.0, seed=0)
    step = step.model_copy(update=change)
    return out, baseline.run(step, inputs, out, context(tmp_path / f"{name}.scratch"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Artifact]) -> Path:
    """The baseline of the model in this process, which those of a server are held against."""
    return scored(tmp_path_factory.mktemp("here"), inputs, "here")[0]


def served(prompt: Any = "tokens") -> dict[str, Any]:
    return {"endpoint": ServedModel(model="base", prompt=prompt)}


def without_loss(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("nll")} for row in rows]


def test_anchors_of_a_server_are_the_embedded_ones(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels
) -> None:
    here, facts = anchored(tmp_path, inputs, "here")
    with serving(real):
        there, found = anchored(tmp_path, inputs, "there", endpoint=ServedModel(model="base"))
    for name in ("train.jsonl", "dev.jsonl"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert facts.pop("generation") == {"engine": "embedded"}
    assert found.pop("generation") == {
        "engine": "endpoint",
        "prompt": "tokens",
        "served": {"id": "base", "root": "/models/base", "max_model_len": 512},
    }
    assert facts == found and facts["kept"] > 0


def test_a_baseline_of_a_server_is_the_embedded_one(
    tmp_path: Path, inputs: dict[str, Artifact], here: Path, real: RealModels
) -> None:
    with serving(real):
        there, facts = scored(tmp_path, inputs, "there", **served())
    one, other = (read_lines(folder / "responses.jsonl") for folder in (here, there))
    assert without_loss(one) == without_loss(other)
    for a, b in zip(one, other, strict=True):
        assert a.get("nll_tokens") == b.get("nll_tokens")
        assert a.get("nll_nats", 0) == pytest.approx(b.get("nll_nats", 0), rel=1e-5)
    scores = json.loads((there / "scores.json").read_text())
    assert scores["metrics"] == measure(other, 0.95)
    assert facts["generation"]["engine"] == "endpoint" and facts["reasoning_nll"] > 0


@pytest.mark.parametrize("form", ["text", "chat"])
def test_without_a_loss_all_else_is_measured(
    tmp_path: Path, inputs: dict[str, Artifact], here: Path, real: RealModels, form: str
) -> None:
    with serving(real):
        there, facts = scored(tmp_path, inputs, "there", **served(form))
    one, other = (read_lines(folder / "responses.jsonl") for folder in (here, there))
    same = ("id", "response", "think", "verdict", "truncated")
    assert [[row[k] for k in same] for row in one] == [[row[k] for k in same] for row in other]
    assert "reasoning_nll" not in facts and "reasoning_accuracy" in facts
    assert "no reasoning_nll" in log(tmp_path / "there.scratch")


class Failing:
    """The real models, until so many answers are given; then ``after`` takes over."""

    def __init__(self, real: RealModels, good: int, after: Answer) -> None:
        self.real, self.good, self.after, self.lock = real, good, after, threading.Lock()

    def __call__(self, asked: Asked) -> Said:
        generates = asked.body is not None and asked.body["max_tokens"] > 1
        with self.lock:
            self.good -= generates
            over = generates and self.good < 0
        return self.after(asked) if over else self.real(asked)


def interrupting() -> Answer:
    """Ctrl-C in this process with the first request, and nothing more."""
    left = [True]

    def answer(asked: Asked) -> Said:
        if left:
            left.clear()
            _thread.interrupt_main()
        return Said(502)

    return answer


@pytest.mark.parametrize(
    ("after", "stopped_by"),
    [
        (lambda asked: Said(401), RecipeError),
        (lambda asked: Said(502), UntaxedError),
        (interrupting(), KeyboardInterrupt),
    ],
    ids=["refused", "broken", "stopped"],
)
def test_what_is_finished_is_never_asked_again(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    here: Path,
    real: RealModels,
    after: Answer,
    stopped_by: type[BaseException],
) -> None:
    """Of nine good answers three may be under way when the end comes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(Failing(real, 9, after)), pytest.raises(stopped_by):
            scored(tmp_path, inputs, "again", **served())
    finally:
        signal.signal(signal.SIGINT, before)
    kept = (tmp_path / "again.scratch" / "responses.jsonl").read_text().splitlines()[1:]
    assert 6 <= len(kept) <= 9
    (tmp_path / "again").rmdir()
    with serving(real) as site:
        out, _ = scored(tmp_path, inputs, "again", **served())
    asked = [body for body in site.posted() if body["max_tokens"] > 1]
    assert len(asked) == ROWS * len(SUITES) - len(kept)
    one, other = (read_lines(folder / "responses.jsonl") for folder in (here, out))
    assert without_loss(one) == without_loss(other)


def test_another_model_under_the_same_name_starts_anew(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels
) -> None:
    """What was finished before the server was given other weights is not mixed with what comes."""

    def moved(asked: Asked) -> Said:
        said = real(asked)
        renamed = said.body.replace(b"/models/base", b"/models/newer")
        return replace(said, body=renamed)

    with serving(Failing(real, 9, lambda asked: Said(502))), pytest.raises(UntaxedError):
        scored(tmp_path, inputs, "again", **served())
    (tmp_path / "again").rmdir()
    with serving(moved) as site:
        scored(tmp_path, inputs, "again", **served())
    assert len([b for b in site.posted() if b["max_tokens"] > 1]) == ROWS * len(SUITES)


def test_few_failures_count_against_the_model(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels
) -> None:
    """No answer is no refusal of what is harmful, no help with what is not, and solves nothing."""

    def answer(asked: Asked) -> Said:
        body = asked.body or {}
        bad = body.get("max_tokens", 1) > 1 and len(body["prompt"]) in lengths
        return Said(200, b"<html>") if bad else real(asked)

    lengths: set[int] = set()
    with serving(answer) as site:
        scored(tmp_path, inputs, "all", batch_rows=1, **served())  # one after the other
        asked = [b["prompt"] for b in site.posted() if b["max_tokens"] > 1]
        lengths |= {len(asked[0]), len(asked[ROWS])}
        out, _ = scored(tmp_path, inputs, "some", **served())
    rows = read_lines(out / "responses.jsonl")
    failed = [row for row in rows if row["verdict"] == "error"]
    assert 2 <= len(failed) <= 10
    assert all((row["response"], row["truncated"]) == ("", False) for row in failed)
    scores = json.loads((out / "scores.json").read_text())
    count = sum(row["measures"] == "benign" for row in failed)
    assert scores["responses"]["ordinary"]["error"] == count > 0
    assert scores["metrics"]["benign_refusal"]["value"] >= count / ROWS
    assert scores["metrics"] == measure(rows, 0.95) and scores["responses"] == tally(rows)
    told = log(tmp_path / "some.scratch")
    assert f"{len(failed)} of {len(rows)} answers could not be had; the last: http" in told
    assert site.url not in (out / "responses.jsonl").read_text() + (out / "scores.json").read_text()


def evaluated(
    tmp_path: Path, inputs: dict[str, Artifact], aligned: str, **change: Any
) -> tuple[Path, dict[str, Any]]:
    """The eval stage after the baseline, both on a server."""
    folder, facts = scored(tmp_path, inputs, f"base-{aligned}", **served())
    made = [(path.name, path.read_bytes()) for path in folder.iterdir()]

    def copy(out: Path) -> dict[str, Any]:
        for name, content in made:
            (out / name).write_bytes(content)
        return facts

    sealed = seal_as(inputs["base"].folder.parent, "baseline", copy)
    recipe = EvalRecipe(
        suites=SUITES,
        gate=(Check(metric="harmful_refusal", at_least=0.5, min_rows=ROWS),),
        batch_rows=4,
        endpoint=EvalEndpoint(base="base", aligned=aligned),
    )
    out = tmp_path / f"eval-{aligned}"
    out.mkdir()
    step = EvalStep(job="served", eval=recipe, chat=ChatRecipe())
    whole = inputs | {"baseline": sealed}
    return out, eval.run(step, whole, out, context(tmp_path / f"eval-{aligned}.scratch"))


def test_an_evaluation_of_a_server(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(folder: Path) -> None:
        raise AssertionError("a model was loaded, though a server answers")

    monkeypatch.setattr("pipeline.evals.score.load_for_inference", loads)
    monkeypatch.setattr("pipeline.eval.load_for_inference", loads)
    with serving(real, key=SECRET) as site:
        out, facts = evaluated(tmp_path, inputs, "aligned")
    monkeypatch.undo()
    report = json.loads((out / "report.json").read_text())
    assert [report["generation"][role]["served"]["id"] for role in ("base", "aligned")] == [
        "base",
        "aligned",
    ]
    assert facts["generation"] == report["generation"]["aligned"]
    assert (report["samples"], report["engine"]) == (1, "single")
    assert report["pairs"]["reasoning_nll"]["n"] == ROWS
    want, _ = scored(tmp_path, inputs | {"base": inputs["merge"]}, "merged")
    rows = read_lines(out / "responses.jsonl")
    assert without_loss(rows) == without_loss(read_lines(want / "responses.jsonl"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        content = path.read_bytes()
        assert SECRET.encode() not in content and site.url.encode() not in content, path


def test_each_model_on_a_server_of_its_own(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod with two servers: neither knows the other's model."""

    with serving(real) as after, serving(real) as before:
        monkeypatch.setenv(ALIGNED_ADDRESS, after.url)
        _, facts = evaluated(tmp_path, inputs, "aligned")
    assert facts["generation"]["served"]["id"] == "aligned"
    for site, name in ((before, "base"), (after, "aligned")):
        assert {body["model"] for body in site.posted()} == {name}


def test_the_base_in_place_of_the_merged_model_is_not_scored(
    tmp_path: Path, inputs: dict[str, Artifact], real: RealModels
) -> None:
    with serving(real), pytest.raises(DataError, match="twin answers 8 probes as base does"):
        evaluated(tmp_path, inputs, "twin")
    assert not (tmp_path / "eval-twin" / "report.json").exists()


def test_no_key_of_the_recipe_holds_an_address_or_a_key() -> None:
    """What has identity is which model is asked and how, never where it is."""
    for model in (ServedModel, EvalEndpoint):
        assert set(model.model_fields) <= {"model", "base", "aligned", "prompt"}
