"""What a real MLflow holds of a job: runs, parameters, metrics, files and datasets."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from parts import ROOT
from tracked import FILES, GATE, STEPS, Play, Records

from pipeline import artifact as art
from pipeline.graph import stages_of

pytest_plugins = ("tracked",)


def test_a_job_is_one_run_with_a_nested_run_for_each_stage(play: Callable[..., Play]) -> None:
    job = play()
    names = stages_of(job.job)
    job.start(names[0])
    records = Records(job.runs)
    assert records.parent().info.status == "RUNNING"
    assert records.stage("prep").info.status == "RUNNING"
    job.finish(names[0])
    assert records.stage("prep").info.status == "FINISHED"
    assert records.parent().info.status == "RUNNING"
    job.through(*names[1:], **GATE)

    parent = records.parent()
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "tiny")
    assert parent.data.tags["untaxed.job_key"] == job.planned["eval"].key
    assert parent.data.metrics["aligned_harmful_refusal"] == 0.97
    for name in names:
        run, planned = records.stage(name), job.planned[name]
        sealed = art.open_artifact(planned.folder)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["untaxed.key"] == planned.key
        assert run.data.tags["untaxed.digest"] == sealed.digest
        assert run.data.tags["untaxed.version"] == str(planned.version)
        assert run.data.tags["untaxed.fact.engine"] == "single"
        assert run.data.metrics | {"rows": 7, "kinds.refusal": 3, "seconds": 1.5} == (
            run.data.metrics
        )
        assert {"recipe.json", "manifest.json"} <= records.files(name)
    assert records.stage("eval").data.tags["untaxed.fact.gate_passed"] == "true"
    _check_training(records)
    _check_files(records, job)
    _check_datasets(records, job)


def _check_training(records: Records) -> None:
    """More metrics than one batch holds, and parameters in short."""
    run = records.stage("sft")
    assert [(m.step, m.value) for m in records.history(run, "loss")] == [
        (step, 2.0 / step) for step in range(1, 601)
    ]
    assert "step" not in run.data.metrics
    assert run.data.params["lora.rank"] == "1"
    assert run.data.params["lora.targets"] == '["up_proj"]'
    assert run.data.params["quantization"] == "none"


def _check_files(records: Records, job: Play) -> None:
    assert records.files("prep") == {
        "recipe.json", "manifest.json", "sheet.json", "sheet.md"
    }  # fmt: skip
    assert records.files("pack") == {"recipe.json", "manifest.json", "trained.txt"}
    assert records.files("merge") == {
        "recipe.json", "manifest.json", "README.md", "certificate.json"
    }  # fmt: skip
    assert records.files("eval") == {"recipe.json", "manifest.json"} | set(FILES["eval"])
    place = Path(records.stage("prep").info.artifact_uri.removeprefix("file://"))
    assert job.runs / "mlartifacts" in place.parents
    logged = json.loads((place / "recipe.json").read_text(encoding="utf-8"))
    assert logged == job.planned["prep"].recipe.model_dump(mode="json")
    assert (place / "sheet.json").stat().st_mode & 0o200, "could not be written a second time"


def _check_datasets(records: Records, job: Play) -> None:
    import mlflow.data

    def inputs(name: str) -> dict[str, tuple[str, str]]:
        return {
            i.dataset.name: (i.dataset.digest, i.tags[0].value)
            for i in records.stage(name).inputs.dataset_inputs
        }

    digests = {k: v.digest[:36] for k, v in job.planned["prep"].open_inputs().items()}
    assert inputs("prep") == {
        label.removeprefix("rows."): (digest, "exclude" if "heldout" in label else "train")
        for label, digest in digests.items()
        if label.startswith("rows.")
    }
    anchor = art.open_artifact(job.planned["anchor"].folder).digest[:36]
    assert inputs("pack") == {"anchor": (anchor, "train")}
    assert set(inputs("eval")) == {suite.name for suite in job.job.eval.suites}
    assert {context for _, context in inputs("eval").values()} == {"eval"}
    one = records.stage("eval").inputs.dataset_inputs[0].dataset
    folder = Path(mlflow.data.get_source(one).load())
    assert art.open_artifact(folder).digest[:36] == one.digest
    assert json.loads(one.profile)["source"] == f"sample:{one.name}"


def test_saying_everything_twice_changes_nothing(play: Callable[..., Play]) -> None:
    job = play()
    names = stages_of(job.job)
    job.through(*names, **GATE)
    records = Records(job.runs)
    before = records.picture()
    for again in ("finish", "seen"):
        shutil.rmtree(job.runs / ".mlflow-spool")
        for name in names:
            sealed = art.open_artifact(job.planned[name].folder)
            if again == "seen":
                job.tracker().seen(job.planned[name], sealed)
            else:
                job.tracker().finish(job.planned[name], sealed, STEPS if name == "sft" else [])
        assert records.picture() == before
    # A start that comes twice, as after a crash, goes on in the same run.
    job.start("prep")
    assert len(records.all_runs()) == len(names) + 1
    assert records.stage("prep").info.status == "RUNNING"


def test_what_was_sealed_before_tracking_is_recorded_when_it_is_seen(
    play: Callable[..., Play],
) -> None:
    job = play()
    for name in ("prep", "anchor", "pack", "sft"):
        job.tracker().seen(job.planned[name], job.seal(name))
    records = Records(job.runs)
    assert records.stage("sft").info.status == "FINISHED"
    assert len(records.history(records.stage("sft"), "loss")) == 600, "from metrics.jsonl"
    assert records.parent().info.status == "RUNNING"


def test_a_stopped_stage_goes_on_in_its_run(play: Callable[..., Play]) -> None:
    job = play()
    records = Records(job.runs)
    identity = set()
    for status, message in (("KILLED", "stopped by SIGTERM"), ("FAILED", "no " * 400)):
        job.start("prep")
        job.tracker().fail(job.planned["prep"], status, message)
        run = records.stage("prep")
        identity.add(run.info.run_id)
        assert run.info.status == records.parent().info.status == status
        assert run.data.tags["untaxed.error"].startswith(message[:18])
        assert len(run.data.tags["untaxed.error"]) <= 500
    job.start("prep")
    assert records.stage("prep").info.status == records.parent().info.status == "RUNNING"
    job.finish("prep")
    run = records.stage("prep")
    assert run.info.status == "FINISHED"
    assert identity == {run.info.run_id}
    assert "untaxed.error" not in run.data.tags
    job.tracker().fail(job.planned["prep"], "KILLED", "stopped after sealing")
    assert records.stage("prep").info.status == "FINISHED"


def test_long_and_changed_parameters_are_no_failure(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prep = play().job.prep.model_dump(mode="json") | {"refusal_think": "because " * 2000}
    job = play(prep=prep)
    job.start("prep")
    records = Records(job.runs)
    params = records.stage("prep").data.params
    assert len(params["prep.refusal_think"]) == 500
    assert params["prep.refusal_think"].startswith("because because")
    assert len(params) > 100, "more than one batch"
    monkeypatch.setattr("pipeline.spool.MOST_CHARACTERS", 400)
    job.finish("prep")
    assert records.stage("prep").data.params == params
    assert records.stage("prep").info.status == "FINISHED"
    assert "tracking" not in capfd.readouterr().err


SEEN = """
import sys
from pathlib import Path
from pipeline import artifact as art
from pipeline.graph import Workspace, plan_job
from pipeline.jobfile import load_job
from pipeline.tracking import Tracker
runs, job = Path(sys.argv[1]), load_job(Path(sys.argv[2]))
planned = plan_job(job, Workspace(runs), adopt=False)["prep"]
Tracker(job, runs).seen(planned, art.open_artifact(planned.folder))
print("mlflow" in sys.modules)
"""


def test_seen_imports_mlflow_only_for_what_is_not_recorded(
    play: Callable[..., Play], tmp_path: Path
) -> None:
    job = play()
    job.finish("prep")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.job.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-c", SEEN, str(job.runs), str(path)]

    def imports() -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert imports() == "False"
    # The marks speak of this store only: without its file they count for nothing.
    (job.runs / "mlflow.db").unlink()
    assert imports() == "True"
    with sqlite3.connect(job.runs / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)
