"""k8s/run.sh: the order of the stages, and what it does when one fails. The rendering is kubectl's
own; a script stands in for the API server, writes down what is asked and says how Jobs ended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.graph import STAGES

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!/bin/sh
echo "$*" >> {folder}/asked
case "$*" in
kustomize*) exec kubectl "$@" ;;
apply*) cat > {folder}/applied ;;
*"get job {failing} "*message*) echo "exit code 65" ;;
*"get job {failing} "*) echo "FailureTarget Failed" ;;
*"get job"*)
    # the first look finds it running
    if [ -e {folder}/looked ]; then rm {folder}/looked; echo "SuccessCriteriaMet Complete"
    else touch {folder}/looked; fi ;;
*logs*) echo "the stage's last words" ;;
esac
"""


def run(folder: Path, *arguments: str, failing: str = "none") -> subprocess.CompletedProcess[str]:
    stand_in = folder / "stand-in"
    stand_in.write_text(STAND_IN.format(folder=folder, failing=failing), encoding="ascii")
    stand_in.chmod(0o755)
    return subprocess.run(
        ["sh", str(ROOT / "k8s" / "run.sh"), *arguments],
        env=os.environ | {"KUBECTL": str(stand_in), "POLL_SECONDS": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def started(folder: Path) -> list[str]:
    """The stages that were let go, in order."""
    asked = (folder / "asked").read_text(encoding="ascii").splitlines()
    return [line.split(" patch job ")[1].split()[0] for line in asked if " patch job " in line]


def test_all_stages_run_in_the_order_of_the_graph(tmp_path: Path) -> None:
    made = run(tmp_path, "local")
    assert made.returncode == 0, made.stderr
    assert started(tmp_path) == [stage for stage in STAGES if stage != "choose"]
    asked = (tmp_path / "asked").read_text(encoding="ascii").splitlines()
    verbs = [
        next(w for w in line.split() if w in {"kustomize", "delete", "apply"}) for line in asked[:3]
    ]
    assert verbs == ["kustomize", "delete", "apply"], "a Job is deleted before it is made anew"
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text(encoding="utf-8")))
    assert {o["metadata"]["name"] for o in applied if o["kind"] == "Job"} == set(STAGES)


def own_overlay(folder: Path, job: Path) -> Path:
    """An overlay of one's own for ``job``, as docs/cluster.md shows it."""
    overlay = folder / "mine"
    overlay.mkdir()
    h100 = os.path.relpath(ROOT / "k8s" / "overlays" / "h100", overlay)
    file = os.path.relpath(job, overlay)
    maker = {"name": "untaxed-job", "namespace": "untaxed", "behavior": "replace"}
    mine = {
        "resources": [h100],
        "images": [{"name": "untaxed", "newName": "registry.example/team/untaxed"}],
        "configMapGenerator": [maker | {"files": [f"job.yaml={file}"]}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(mine), encoding="ascii")
    return overlay


def test_a_job_that_chooses_has_a_choose_stage(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8")
    section = "choose:\n  wanted:\n    - {metric: over_refusal, at_most: 0.1}\n"
    (tmp_path / "job.yaml").write_text(text + section, encoding="utf-8")
    made = run(tmp_path, str(own_overlay(tmp_path, tmp_path / "job.yaml")))
    assert made.returncode == 0, made.stderr
    assert started(tmp_path) == list(STAGES)


def test_a_job_without_anchors_has_no_anchor_stage(tmp_path: Path) -> None:
    made = run(tmp_path, str(own_overlay(tmp_path, ROOT / "jobs" / "paper-r1-7b.yaml")))
    assert made.returncode == 0, made.stderr
    assert started(tmp_path) == [stage for stage in STAGES if stage not in ("anchor", "choose")]
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text(encoding="utf-8")))
    jobs = [o["spec"]["template"]["spec"] for o in applied if o["kind"] == "Job"]
    images = {container["image"] for spec in jobs for container in spec["containers"]}
    assert images == {"registry.example/team/untaxed:gpu"}
    (config,) = (o for o in applied if o["kind"] == "ConfigMap")
    assert yaml.safe_load(config["data"]["job.yaml"])["name"] == "paper-r1-7b"


def test_it_stops_at_the_stage_that_failed_and_says_why(tmp_path: Path) -> None:
    made = run(tmp_path, "local", failing="pack")
    assert made.returncode == 1
    assert started(tmp_path) == ["prep", "anchor", "pack"]
    assert "the stage's last words" in made.stderr
    assert "pack failed: exit code 65" in made.stderr


def test_named_stages_run_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "h100", "merge", "eval").returncode == 0
    assert started(tmp_path) == ["merge", "eval"]


@pytest.mark.parametrize("arguments", [(), ("moon",)])
def test_an_unknown_overlay_is_answered_with_those_there_are(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    made = run(tmp_path, *arguments)
    assert made.returncode == 64
    assert "h100 local" in made.stderr and not (tmp_path / "asked").exists()
