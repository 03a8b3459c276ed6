"""The launcher on a cluster that refuses, lacks something, or goes away: plain words, nothing twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.launched import STAGES, Start, beside, evicting, stages_started, untaxed
from cluster.minicluster import MiniCluster, Refused, running, status
from cluster.scripted import Scripted

from pipeline.cluster import api, launch

pytest_plugins = ("cluster.launched",)
QUOTA = (
    'jobs.batch "x" is forbidden: exceeded quota: few, requested: count/jobs.batch=1, limited: 1'
)
RBAC = (
    'jobs.batch is forbidden: User "ann" cannot create resource "jobs" in the namespace "untaxed"'
)


def refuse(code: int, message: str, wanted: str, times: int = 10**9) -> Callable[[str, str], None]:
    """``METHOD path-end`` is refused so many times."""
    method, end = wanted.split()
    left = [times]

    def trouble(asked: str, target: str) -> None:
        if asked == method and target.partition("?")[0].endswith(end) and left[0] > 0:
            left[0] -= 1
            raise Refused(code, "Refused", message)

    return trouble


def meanwhile(cluster: MiniCluster, stages: int, act: Callable[[], None]) -> threading.Thread:
    """``act`` in a thread, when so many pods have been started."""

    def wait() -> None:
        while len(stages_started(cluster)) < stages:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("code", "message", "wanted", "exit_code", "words"),
    [
        (
            403,
            QUOTA,
            "POST /jobs",
            1,
            ["the quota of namespace untaxed is used up", "launch again"],
        ),
        (403, RBAC, "POST /jobs", 78, ["you may not do this", 'User "ann"', "ask for a role"]),
        (403, RBAC, "GET /jobs", 78, ["namespace untaxed: you may not do this"]),
        (401, "Unauthorized", "GET /jobs", 1, ["does not know you", "expired", "log in again"]),
        (401, "Unauthorized", "POST /configmaps", 1, ["ConfigMap", "does not know you"]),
    ],
)
def test_a_refusal_is_one_line_with_the_way_out(
    start: Start,
    capsys: pytest.CaptureFixture[str],
    code: int,
    message: str,
    wanted: str,
    exit_code: int,
    words: list[str],
) -> None:
    cluster = start()
    cluster.trouble = refuse(code, message, wanted)
    assert untaxed("launch") == exit_code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("untaxed: ") and all(word in last for word in words)
    assert stages_started(cluster) == []
    cluster.trouble = lambda method, target: None
    assert untaxed("launch") == 0, "once it is mended the same command does all"
    assert stages_started(cluster) == STAGES


def test_who_may_not_make_the_namespace_may_use_it(start: Start) -> None:
    cluster = start()
    cluster.trouble = refuse(403, "namespaces is forbidden", "POST /namespaces")
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES


def test_a_namespace_that_does_not_exist(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = start()
    cluster.spaces = True
    cluster.trouble = refuse(403, "namespaces is forbidden", "POST /namespaces")
    assert untaxed("launch") == 78
    said = capsys.readouterr().err
    assert "there is no namespace untaxed; kubectl create namespace untaxed" in said
    assert cluster.every("Job") == []
    cluster.trouble = lambda method, target: None
    assert untaxed("launch") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no kubeconfig: "),
        ("", "its current context names no cluster"),
        ("{", "its current context names no cluster"),
        ("[]", "its current context names no cluster"),
        ("apiVersion: v1\nkind: Config\ncontexts: []\nclusters: []\n", "names no cluster"),
    ],
)
def test_a_kubeconfig_that_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    words: str,
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert untaxed("launch") == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and str(file) in line


def test_an_unknown_context_is_named(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    assert untaxed("launch", "--context", "elsewhere") == 78
    said = capsys.readouterr().err
    assert "context elsewhere names no cluster" in said and "get-contexts" in said


def test_a_token_that_was_replaced_is_read_anew(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()
    load, read = api.config.load_kube_config, [0]

    def counted(*given: Any) -> None:
        read[0] += 1
        load(*given)

    def trouble(method: str, target: str) -> None:
        if read[0] < 2 and len(stages_started(cluster)) > 2:
            raise Refused(401, "Unauthorized", "Unauthorized")

    monkeypatch.setattr(api.config, "load_kube_config", counted)
    cluster.trouble = trouble
    assert untaxed("launch") == 0
    assert read[0] == 2 and stages_started(cluster) == STAGES
    assert "Unauthorized" not in capsys.readouterr().err


def test_credentials_that_expire_leave_what_runs_alone(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = start()

    def expire() -> None:
        cluster.trouble = refuse(401, "Unauthorized", "GET /jobs")

    thread = meanwhile(cluster, 3, expire)
    assert untaxed("launch") == 1
    thread.join()
    assert "what runs there goes on" in capsys.readouterr().err
    cluster.trouble = lambda method, target: None
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES


@pytest.mark.parametrize("code", [410, 429, 500, 504])
def test_an_answer_that_passes_is_asked_for_again(
    start: Start, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    cluster = start()
    cluster.trouble = refuse(code, "too old resource version", "GET /jobs", times=3)
    assert untaxed("launch") == 0
    assert capsys.readouterr().err.count("the cluster does not answer (too old") == 1
    assert stages_started(cluster) == STAGES


def leave_and_come_back(cluster: MiniCluster, folder: Path, close: Callable[[], Any]) -> Any:
    """Connections break and new ones are refused for a second; then it is there as before."""

    def reset(method: str, target: str) -> None:
        raise ConnectionResetError

    config = yaml.safe_load((folder / "kubeconfig").read_text())
    port = int(config["clusters"][0]["cluster"]["server"].rpartition(":")[2])
    cluster.trouble = reset
    close()
    time.sleep(1.0)
    cluster.trouble = lambda method, target: None
    back = running(cluster, folder, port=port)
    back.__enter__()
    return back


def test_a_refused_connection_is_waited_out_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(api, "POLL_SECONDS", 0.05)
    cluster = MiniCluster(Scripted({}))
    first, back = running(cluster, tmp_path), []
    monkeypatch.setenv("KUBECONFIG", str(first.__enter__()))
    close = lambda: first.__exit__(None, None, None)  # noqa: E731
    thread = meanwhile(
        cluster, 3, lambda: back.append(leave_and_come_back(cluster, tmp_path, close))
    )
    try:
        assert untaxed("launch") == 0
    finally:
        thread.join()
        back[0].__exit__(None, None, None)
    assert stages_started(cluster) == STAGES
    assert len(cluster.every("Job")) == len(STAGES)
    assert capsys.readouterr().err.count("the cluster does not answer (") == 1
    assert [one for one in caplog.records if one.name.startswith("urllib3")] == []


def test_a_job_made_in_the_moment_the_cluster_left_is_not_made_twice(start: Start) -> None:
    """The cluster does what it is told, and its answer is lost."""
    cluster, lost = start(), []
    answer = cluster.answer

    def losing(method: str, target: str, body: Any) -> tuple[int, Any]:
        told = answer(method, target, body)
        if method == "POST" and target.endswith("/jobs"):
            lost.append(target)
            if len(lost) % 2:
                raise ConnectionResetError
        return told

    cluster.answer = losing  # type: ignore[method-assign]
    assert untaxed("launch") == 0
    assert lost and stages_started(cluster) == STAGES
    assert len(cluster.every("Job")) == len(STAGES)


@pytest.mark.parametrize("hour", [-3600.0, 3600.0])
def test_a_clock_that_is_set_changes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, hour: float
) -> None:
    """An outage goes on while the wall clock jumps: no patience ends early, or never."""
    cluster, real, jumps = start(), time.time, [0.0]

    def jump() -> None:
        cluster.away.set()
        for _ in range(3):
            jumps[0] += hour
            time.sleep(0.2)
        cluster.away.clear()

    monkeypatch.setattr(time, "time", lambda: real() + jumps[0])
    thread = meanwhile(cluster, 3, jump)
    assert untaxed("launch") == 0
    thread.join()
    assert jumps[0] == 3 * hour and stages_started(cluster) == STAGES


def test_a_quota_on_pods_is_told_while_it_is_waited_out(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Job is there and the cluster makes no pod of it, until there is room."""
    cluster = start()
    make = cluster._start
    held = [True]

    def full(job: Any, index: int, again: int) -> None:
        if not held[0]:
            make(job, index, again)
        elif not cluster.every("Event"):
            said = 'Error creating: pods "x" is forbidden: exceeded quota: gpus, limited: 8'
            cluster.event(job["metadata"]["name"], "FailedCreate", said)

    def free() -> None:
        while not cluster.every("Event"):
            time.sleep(0.01)
        time.sleep(0.5)
        held[0] = False

    cluster._start = full  # type: ignore[method-assign]
    thread = meanwhile(cluster, 0, free)
    assert untaxed("launch") == 0
    thread.join()
    said = capsys.readouterr().err
    assert "prep: waiting: the namespace's quota is used up: Error creating" in said
    assert stages_started(cluster) == STAGES


def test_two_launchers_go_on_after_one_eviction_with_one_job(start: Start) -> None:
    cluster = evicting(start)
    codes: list[int] = []
    other = beside(codes)
    codes.append(untaxed("launch"))
    other.join()
    assert codes == [0, 0]
    assert stages_started(cluster).count("sft") == 2
    assert len(cluster.every("Job")) == len(STAGES) + 1


def test_an_image_of_other_code_is_told_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the last words of the pods, as docker/entrypoint.py writes them."""
    monkeypatch.setattr(launch, "revision", lambda: "b" * 40)
    other = (
        "; other code: an image of aaaaaaaaaaaa runs, launched from bbbbbbbbbbbb; build it again"
    )
    ends = {s: [status("Succeeded", 0, message=f"sealed {s}-01{other}")] for s in STAGES}
    cluster = start(**ends)
    assert untaxed("launch") == 0
    said = capsys.readouterr().err
    assert said.count("other code: an image of aaaaaaaaaaaa runs") == 1
    for job in cluster.every("Job"):
        (stage,) = job["spec"]["template"]["spec"]["containers"]
        told = {one["name"]: one.get("value") for one in stage["env"]}
        assert told["UNTAXED_LAUNCHED_REVISION"] == "b" * 40
    monkeypatch.setattr(launch, "revision", lambda: "c" * 40)
    assert untaxed("launch") == 0, "other code of the launcher is no other Job"
    assert stages_started(cluster) == STAGES
