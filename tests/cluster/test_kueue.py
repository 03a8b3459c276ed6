"""Jobs in a queue: the label stands in one place, and Kueue alone lets them go."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import yaml
from cluster.minicluster import MiniCluster, running
from cluster.scripted import Scripted
from parts import ROOT

from pipeline import cli
from pipeline.cluster import api, launch
from pipeline.cluster.jobset import jobset_objects
from pipeline.cluster.objects import QUEUE, read_overlay, stage_objects
from pipeline.cluster.rules import mistakes
from pipeline.graph import STAGES, stages_of
from pipeline.jobfile import load_job

JOB = ROOT / "jobs" / "quickstart.yaml"
MISSING = "LocalQueue untaxed doesn't exist"


@pytest.fixture()
def queued(tmp_path: Path) -> Path:
    """An overlay that takes up the component."""
    own = tmp_path / "own"
    own.mkdir()
    tree = {
        "resources": [os.path.relpath(ROOT / "k8s/overlays/local", own)],
        "components": [os.path.relpath(ROOT / "k8s/components/kueue", own)],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    return own


def test_every_job_waits_for_its_queue(queued: Path) -> None:
    import kubernetes_validate

    overlay, job, text = read_overlay(queued), load_job(JOB), JOB.read_text(encoding="utf-8")
    assert {one["metadata"]["labels"][QUEUE] for one in overlay.jobs.values()} == {"untaxed"}
    assert set(overlay.jobs) == set(STAGES)
    assert not [o for o in overlay.standing if QUEUE in o["metadata"].get("labels", {})]
    for stage in stages_of(job):
        *_, made = stage_objects(overlay, job, text, stage)
        assert made["spec"]["suspend"] is True and made["metadata"]["labels"][QUEUE] == "untaxed"
        kubernetes_validate.validate(made, "1.37", strict=True)
        assert mistakes([*overlay.standing, *stage_objects(overlay, job, text, stage)]) == []
    whole = jobset_objects(overlay, job, text, stages_of(job))[-1]
    assert whole["spec"]["suspend"] is True and whole["metadata"]["labels"][QUEUE] == "untaxed"
    for one in whole["spec"]["replicatedJobs"]:
        assert QUEUE not in one["template"]["metadata"]["labels"], "the set waits as a whole"


def test_launch_says_what_the_queue_says_and_leaves_it_to_kueue(
    queued: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(api, "POLL_SECONDS", 0.05)
    cluster = MiniCluster(Scripted({}))
    words = [str(JOB), "--overlay", str(queued), "--stage", "prep"]
    ended: list[int] = []
    options = cli.parser().parse_args(["launch", *words])
    with running(cluster, tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        launcher = threading.Thread(target=lambda: ended.append(cli.cluster(options)), daemon=True)
        launcher.start()
        until = time.monotonic() + 60
        while not cluster.every("Job") and time.monotonic() < until:
            time.sleep(0.02)
        (job,) = cluster.every("Job")
        held = {"type": "QuotaReserved", "status": "False", "reason": "Inadmissible"}
        name = f"job-{job['metadata']['name']}"
        with cluster.lock:
            cluster.objects["Workload", name] = {
                "metadata": {
                    "name": name,
                    "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]},
                },
                "status": {"conditions": [held | {"message": MISSING}]},
            }
        assert cli.main(["status", *words]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "queue untaxed takes nothing" in said and "LocalQueue" in said
        assert not cluster.kubelet.started and not ended, "nobody but Kueue lets it go"  # type: ignore[attr-defined]
        with cluster.lock:
            cluster.objects["Job", job["metadata"]["name"]]["spec"]["suspend"] = False
        launcher.join(60)
    assert ended == [0]
