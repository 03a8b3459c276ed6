"""The launcher on a cluster in miniature: real HTTP and the real client; pods end by a script."""

from __future__ import annotations

import ast
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.launched import JOB, LOCAL, STAGES, Start, beside, evicting, stages_started, untaxed
from cluster.minicluster import status
from parts import ROOT

from pipeline import cli
from pipeline.cluster import launch

pytest_plugins = ("cluster.launched",)


def test_all_stages_run_in_their_order(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = start()
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES
    made = [job["metadata"]["name"] for job in cluster.every("Job")]
    assert len(made) == len(STAGES) and all(name.endswith("-1") for name in made)
    assert {one["metadata"]["name"] for one in cluster.every("PersistentVolumeClaim")} == {
        "untaxed-runs",
        "untaxed-data",
    }
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.endswith(": complete")] == [
        f"{stage}: complete" for stage in STAGES
    ]


def test_a_tracking_server_is_told_of_stages_without_network(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()
    where = {"name": "untaxed-tracking", "namespace": "untaxed"}
    address = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": where,
        "data": {"uri": "http://m"},
    }
    cluster.create("ConfigMap", address)
    for told in (1, 0):
        assert untaxed("launch") == 0
        assert capsys.readouterr().err.count(" tells of baseline, eval") == told
    (job,) = [one for one in cluster.every("Job") if "-track-" in one["metadata"]["name"]]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["untaxed", "track"] and job["spec"]["suspend"] is False


def test_a_second_launch_makes_nothing(start: Start) -> None:
    cluster = start()
    assert untaxed("launch") == 0
    before = len([one for one in cluster.asked if one[0] == "POST"])
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES
    posted = [target for method, target in cluster.asked if method == "POST"][before:]
    assert not [target for target in posted if target.endswith("/jobs")]


def test_another_recipe_is_another_job(start: Start) -> None:
    cluster = start()
    assert untaxed("launch") == 0
    assert untaxed("launch", "--set", "sft.seed=1") == 0
    assert stages_started(cluster) == [*STAGES, "sft", "merge", "eval"]


@pytest.mark.parametrize("code", [65, 78])
def test_what_is_bad_is_not_tried_again(
    start: Start, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    cluster = start(pack=[status("Failed", code, message="pack: row 7 is empty")])
    assert untaxed("launch") == 65
    assert stages_started(cluster) == STAGES[: STAGES.index("pack") + 1]
    said = capsys.readouterr().err
    assert "row 7 is empty" in said and "says hello" in said
    assert untaxed("launch") == 65
    said = capsys.readouterr().err
    assert "has failed before" in said and "--again" in said
    assert stages_started(cluster).count("pack") == 1
    cluster.kubelet.scripts.clear()  # type: ignore[attr-defined]
    cluster.kubelet.ends.clear()  # type: ignore[attr-defined]
    assert untaxed("launch", "--again") == 0
    assert stages_started(cluster)[-len(STAGES) + STAGES.index("pack") :] == STAGES[2:]
    assert [j["metadata"]["name"][-2:] for j in cluster.every("Job") if "-pack-" in str(j)][
        -1
    ] == "-2"


def test_what_may_pass_is_tried_again_by_the_cluster(start: Start) -> None:
    cluster = start(anchor=[status("Failed", 1), status("Succeeded", 0, message="sealed anchor-1")])
    assert untaxed("launch") == 0
    assert stages_started(cluster).count("anchor") == 2
    assert len([j for j in cluster.every("Job") if "-anchor-" in j["metadata"]["name"]]) == 1


def test_evicted_training_goes_on(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no pod is replaced alone, the launcher submits the whole Job again."""
    cluster = evicting(start)
    assert untaxed("launch") == 0
    said = capsys.readouterr().err
    assert "its pod was evicted: PreemptionByScheduler; going on as attempt 2" in said
    assert stages_started(cluster).count("sft") == 2


def test_complete_without_a_seal_is_not_believed(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(prep=[status("Succeeded", 0, message="all done")])
    assert untaxed("launch") == 1
    assert "complete, and says of no sealed artifact" in capsys.readouterr().err


def test_two_launchers_make_no_job_twice(start: Start) -> None:
    cluster = start()
    codes: list[int] = []
    other = beside(codes)
    codes.append(untaxed("launch"))
    other.join()
    assert codes == [0, 0]
    assert stages_started(cluster) == STAGES


def test_a_job_that_another_launcher_has_just_made_is_followed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, look = start(), launch.Launcher._alone

    def late(self: launch.Launcher, stage: str) -> None:
        self._submit(stage, 1)
        look(self, stage)

    monkeypatch.setattr(launch.Launcher, "_alone", late)
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES


def test_a_cluster_that_goes_away_is_waited_for(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()

    def leave() -> None:
        while len(stages_started(cluster)) < 3:
            time.sleep(0.01)
        cluster.away.set()
        time.sleep(0.5)
        cluster.away.clear()

    leaving = threading.Thread(target=leave)
    leaving.start()
    assert untaxed("launch") == 0
    leaving.join()
    assert stages_started(cluster) == STAGES
    assert capsys.readouterr().err.count("the cluster does not answer (") >= 1


def test_status_logs_and_cancel(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = start(sft=[status("Running")])
    codes: list[int] = []
    other = beside(codes)
    until = time.monotonic() + 30
    while "sft" not in stages_started(cluster) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    capsys.readouterr()
    assert untaxed("status") == 0
    said = capsys.readouterr().out
    assert "running: and goes on" in said and said.count("complete") == 3
    assert untaxed("logs") == 0
    assert "says hello\nand goes on" in capsys.readouterr().out
    assert untaxed("cancel", "--stage", "sft") == 0
    assert "is stopped; launch again to go on" in capsys.readouterr().out
    assert [name for name in cluster.kubelet.stopped if "-sft-" in name]  # type: ignore[attr-defined]
    other.join(30)
    assert codes == [1] and stages_started(cluster).count("sft") == 1, "it stays cancelled"


def test_a_stage_that_runs_under_another_key_is_not_joined(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would want one folder of artifacts, or one set of devices."""
    cluster = start(sft=[status("Running")])
    other = beside([])
    until = time.monotonic() + 30
    while "sft" not in stages_started(cluster) and time.monotonic() < until:
        time.sleep(0.02)
    changed = ("--set", "sft.seed=1")
    assert untaxed("launch", *changed) == 78
    said = capsys.readouterr().err
    assert "has not ended, and is of another recipe or overlay; wait for it, untaxed cancel" in said
    assert untaxed("status", *changed) == 0
    assert re.search(r"also: Job quickstart-sft-\w+-1 has not ended", capsys.readouterr().out)
    assert untaxed("cancel", *changed) == 0
    other.join(30)
    cluster.kubelet.scripts.clear()  # type: ignore[attr-defined]
    cluster.kubelet.ends.clear()  # type: ignore[attr-defined]
    assert untaxed("launch", *changed) == 0
    assert stages_started(cluster).count("sft") == 2


def test_a_tracking_job_that_failed_is_told_and_tried_again(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()
    where = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"uri": "http://m"}}
    where |= {"metadata": {"name": "untaxed-tracking", "namespace": "untaxed"}}
    cluster.create("ConfigMap", where)
    real = cluster._verdict

    def failing(spec: Any, pods: Any) -> Any:
        if pods and "-track-" in pods[0]["metadata"]["name"]:
            return "Failed", "BackoffLimitExceeded", "the server said 403"
        return real(spec, pods)

    cluster._verdict = failing  # type: ignore[method-assign]
    assert untaxed("launch") == 0
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(
        j["status"].get("conditions", [{}])[0].get("type") == "Failed" for j in cluster.every("Job")
    ):
        time.sleep(0.02)
    capsys.readouterr()
    cluster._verdict = real  # type: ignore[method-assign]
    assert untaxed("launch") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "-track-" in said and "the server said 403; once more" in said
    made = [j["metadata"]["name"] for j in cluster.every("Job") if "-track-" in str(j["metadata"])]
    assert [name[-2:] for name in made] == ["-1", "-2"]


def test_an_overlay_with_a_mistake_makes_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()
    own = tmp_path / "own"
    own.mkdir()
    patch = [{"op": "replace", "path": "/spec/parallelism", "value": 2}]
    tree = {
        "resources": [os.path.relpath(LOCAL, own)],
        "patches": [{"target": {"kind": "Job", "name": "sft"}, "patch": yaml.safe_dump(patch)}],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["launch", str(JOB), "--overlay", str(own)]) == 78
    said = capsys.readouterr().err
    assert "parallelism=2 and completions=1: ranks wait for one another" in said
    assert not [target for method, target in cluster.asked if method == "POST"]


def test_no_part_of_the_launcher_reads_the_wall_clock() -> None:
    for path in sorted((ROOT / "pipeline" / "cluster").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in {"time.time", "time.time_ns", "datetime.now"}, path.name
