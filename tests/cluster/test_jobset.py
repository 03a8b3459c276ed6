"""A whole pipeline as one JobSet: held to its published models, and each of its Jobs to the schemas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.launched import OVERLAYS
from cluster.minicluster import MiniCluster, running
from cluster.scripted import Scripted
from parts import ROOT

from pipeline import cli
from pipeline.cluster import jobset
from pipeline.cluster.jobset import jobset_objects
from pipeline.cluster.objects import LAUNCHED, Overlay, read_overlay
from pipeline.graph import stages_of
from pipeline.jobfile import load_job

GOLDEN = ROOT / "k8s" / "overlays" / "jobset" / "jobset.yaml"


def made(name: str) -> tuple[dict[str, Any], dict[str, Any], Overlay]:
    """(ConfigMap, JobSet, overlay) of an overlay's own job; of no revision, as a file that ships is."""
    file = ROOT / "jobs" / f"{OVERLAYS[name]}.yaml"
    job, overlay = load_job(file), read_overlay(ROOT / "k8s" / "overlays" / name)
    text = file.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobset, "revision", lambda: None)
        carried, whole = jobset_objects(overlay, job, text, stages_of(job))
    return carried, whole, overlay


@pytest.mark.parametrize("name", OVERLAYS)
def test_it_is_what_the_published_models_know(name: str) -> None:
    """They do not forbid what they do not know, so what comes back is compared."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    _, whole, _ = made(name)
    known = models.JobsetV1alpha2JobSet.from_dict(whole).to_dict()
    assert known == whole


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("version", ["1.33", "1.34", "1.35", "1.36", "1.37"])
def test_each_of_its_jobs_is_strictly_valid(name: str, version: str) -> None:
    import kubernetes_validate

    _, whole, _ = made(name)
    for one in whole["spec"]["replicatedJobs"]:
        metadata = one["template"]["metadata"] | {"name": one["name"]}
        job = {"apiVersion": "batch/v1", "kind": "Job"} | one["template"] | {"metadata": metadata}
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_stages_follow_one_another_and_ranks_find_one_another(name: str) -> None:
    carried, whole, overlay = made(name)
    jobs = whole["spec"]["replicatedJobs"]
    stages = stages_of(load_job(ROOT / "jobs" / f"{OVERLAYS[name]}.yaml"))
    assert [one["name"] for one in jobs] == stages
    assert "dependsOn" not in jobs[0]
    assert [one["dependsOn"] for one in jobs[1:]] == [
        [{"name": stage, "status": "Complete"}] for stage in stages[:-1]
    ]
    own = whole["metadata"]["name"]
    for one in jobs:
        spec = one["template"]["spec"]
        assert "suspend" not in spec and spec["podFailurePolicy"]
        pod = spec["template"]["spec"]
        assert len(f"{own}-{one['name']}-0-{spec.get('completions', 1) - 1}") <= 63
        (volume,) = [v for v in pod["volumes"] if v["name"] == "job"]
        assert volume["configMap"]["name"] == carried["metadata"]["name"]
        values = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        if "PET_MASTER_ADDR" in values:
            assert values["PET_MASTER_ADDR"] == f"{own}-sft-0-0.{own}"
        was = overlay.jobs[one["name"]]["spec"]["template"]["spec"]
        assert pod["containers"][0]["resources"] == was["containers"][0]["resources"]


def test_the_overlay_that_ships_is_what_launch_makes() -> None:
    carried, whole, _ = made("local")
    found = list(yaml.safe_load_all(GOLDEN.read_text(encoding="ascii")))
    assert found == [carried, whole], (
        "write it anew: PYTHONPATH=.:tests python tests/cluster/test_jobset.py"
    )


def test_the_last_job_tells_a_tracking_server_that_the_overlay_knows() -> None:
    _, _, overlay = made("local")
    address = {"kind": "ConfigMap", "metadata": {"name": "untaxed-tracking"}}
    known = replace(overlay, standing=(*overlay.standing, address))
    file = ROOT / "jobs" / "quickstart.yaml"
    job = load_job(file)
    _, whole = jobset_objects(known, job, file.read_text(encoding="utf-8"), stages_of(job))
    last = whole["spec"]["replicatedJobs"][-1]
    assert (last["name"], last["dependsOn"]) == ("track", [{"name": "eval", "status": "Complete"}])
    (container,) = last["template"]["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["untaxed", "track"]


def test_launch_makes_it_once_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under one name from any checkout, whose revision its pods are told."""
    cluster = MiniCluster(Scripted({}))
    words = [str(ROOT / "jobs" / "quickstart.yaml"), "--overlay", str(ROOT / "k8s/overlays/local")]
    with running(cluster, tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        for here in ("a" * 40, "b" * 40):
            monkeypatch.setattr(jobset, "revision", lambda here=here: here)
            assert cli.main(["launch", *words, "--jobset"]) == 0
    (one,) = cluster.every("JobSet")
    for job in one["spec"]["replicatedJobs"]:
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert {"name": LAUNCHED, "value": "a" * 40} in container["env"]
    assert f"JobSet {one['metadata']['name']} runs" in capsys.readouterr().err
    assert not cluster.every("Job")


if __name__ == "__main__":
    GOLDEN.write_text(yaml.safe_dump_all(made("local")[:2], sort_keys=False), encoding="ascii")
