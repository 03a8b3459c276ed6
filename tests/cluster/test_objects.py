"""What launch makes of a job and an overlay: names, and what has to agree with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from parts import ROOT

from pipeline.cluster.objects import (
    Overlay,
    key_of,
    name_of,
    overlay_of,
    read_overlay,
    stage_objects,
)
from pipeline.errors import RecipeError
from pipeline.graph import STAGES
from pipeline.jobfile import load_job

JOB = ROOT / "jobs" / "quickstart.yaml"
LOCAL = ROOT / "k8s" / "overlays" / "local"


@pytest.fixture(scope="module")
def overlay() -> Overlay:
    return read_overlay(LOCAL)


def made(overlay: Overlay, stage: str, *assignments: str, attempt: int = 1) -> dict[str, Any]:
    job = load_job(JOB, assignments)
    objects = stage_objects(overlay, job, JOB.read_text(encoding="utf-8"), stage, attempt)
    return {one["kind"]: one for one in objects}


def test_jobs_whose_names_begin_alike_stay_apart(overlay: Overlay) -> None:
    one, two = (made(overlay, "prep", f"name={'a' * 35}-{end}")["Job"] for end in ("one", "two"))
    assert one["metadata"]["name"] != two["metadata"]["name"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("version", ["1.33", "1.34", "1.35", "1.36", "1.37"])
def test_objects_are_strictly_valid(overlay: Overlay, stage: str, version: str) -> None:
    import kubernetes_validate

    choose = "choose={wanted: [{metric: harmful_refusal, at_least: 0.9}]}"
    for one in made(overlay, stage, *([choose] if stage == "choose" else [])).values():
        kubernetes_validate.validate(one, version, strict=True)


def test_what_has_a_name_and_what_refers_to_it_agree(overlay: Overlay) -> None:
    objects = made(overlay, "sft", attempt=3)
    job, service, carried = objects["Job"], objects["Service"], objects["ConfigMap"]
    name = job["metadata"]["name"]
    assert name.startswith("quickstart-sft-") and name.endswith("-3")
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    values = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert values["PET_MASTER_ADDR"] == f"{name}-0.{name}"
    (volume,) = [v for v in pod["volumes"] if v["name"] == "job"]
    assert volume["configMap"]["name"] == carried["metadata"]["name"]
    assert carried["data"]["job.yaml"] == JOB.read_text(encoding="utf-8")
    assert job["spec"]["suspend"] is False
    assert (
        job["metadata"]["labels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    )


def test_the_overlay_is_left_as_it_was(overlay: Overlay) -> None:
    before = copy.deepcopy(overlay.jobs["sft"])
    made(overlay, "sft")
    assert overlay.jobs["sft"] == before
    assert {one["kind"] for one in overlay.standing} >= {"Namespace", "PersistentVolumeClaim"}
    assert not [one for one in overlay.standing if one["kind"] in ("Job", "ConfigMap")]


def test_a_key_is_of_what_the_stage_does(overlay: Overlay) -> None:
    def key(stage: str, *assignments: str, **changed: Any) -> str:
        template = copy.deepcopy(overlay.jobs[stage])
        template["spec"].update(changed)
        return key_of(load_job(JOB, assignments), stage, template)

    assert key("sft") == key("sft", "eval.batch_rows=3") == key("sft", "name=other")
    assert key("sft") != key("sft", "prep.seed=1")
    assert key("sft") != key("sft", "base.source=./elsewhere")
    assert key("sft") != key("sft", activeDeadlineSeconds=7)
    assert key("prep") == key("prep", "sft.seed=1") != key("eval")


@pytest.mark.parametrize("stage", STAGES)
def test_the_longest_name_leaves_room_for_an_index(stage: str) -> None:
    job = load_job(JOB, (f"name={'a' * 29}-{'b' * 10}",))
    name = name_of(job, stage, "0" * 8, 99)
    assert len(f"{name}-1023") <= 63
    assert "--" not in name
    with pytest.raises(RecipeError, match="99 times"):
        name_of(job, stage, "0" * 8, 100)


def test_bad_overlays_are_told(tmp_path: Path, overlay: Overlay) -> None:
    with pytest.raises(RecipeError, match=r"no kustomization\.yaml there; see k8s/overlays"):
        read_overlay(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    with pytest.raises(RecipeError, match=r"cannot build it: .*gone"):
        read_overlay(tmp_path)
    jobs = [job for stage, job in overlay.jobs.items() if stage != "merge"]
    with pytest.raises(RecipeError, match=r"no Job with the label .*: merge; begin"):
        overlay_of(tmp_path, jobs)
    elsewhere = copy.deepcopy(overlay.jobs["merge"])
    elsewhere["metadata"]["namespace"] = "elsewhere"
    with pytest.raises(RecipeError, match=r"namespaces \['elsewhere', 'untaxed'\]; wanted one"):
        overlay_of(tmp_path, [*jobs, elsewhere])
