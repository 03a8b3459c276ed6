"""Tracking on a real server that refuses, fails, hangs or loses its answers: a line, and nothing lost."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from faults import Door, door
from mlflow_server import Server
from tracked import GATE, Play, Records

from pipeline import artifact as art
from pipeline import recorder, stage
from pipeline.errors import DataError
from pipeline.graph import stages_of
from pipeline.recorder import Recorder
from pipeline.tracking import Tracker

pytest_plugins = ("tracked",)
STAGES = ("prep", "anchor", "pack", "sft", "merge", "baseline", "eval")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("faults") / "server")
    shutil.copyfile(empty_database, made.folder / "server.db")
    made.start()
    yield made
    made.stop()


@pytest.fixture()
def faulty(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Door]:
    """An experiment of its own for each test."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    with door(server.uri) as made:
        yield made


@pytest.fixture()
def tracked_job(
    play: Callable[..., Play], faulty: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Play:
    """``play`` takes the address away, so it is set after it."""
    job = play(name=f"job-{abs(hash(tmp_path.name)) % 10**8}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", faulty.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    return job


def held(job: Play, name: str) -> tuple[dict[str, str], list[str]]:
    """Statuses of all runs by their names, of which none is there twice; and the model's versions."""
    records = Records(job.runs)
    found = records.client.get_experiment_by_name(name)
    runs = records.client.search_runs([found.experiment_id], max_results=1000)
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert len(statuses) == len(runs), "a run is there twice"
    for run in runs:
        for metric in run.data.metrics:
            history = records.client.get_metric_history(run.info.run_id, metric)
            assert len({m.step for m in history}) == len(history), f"{metric} is there twice"
    return statuses, [str(v.version) for v in records.versions(job.job.name)]


@pytest.mark.parametrize("fault", [401, 403, 404, 429, 500, 502, 503, "hang"])
@pytest.mark.parametrize("when", ["at the first call", "at the files"])
def test_what_a_server_refuses_is_one_line_and_replayed(
    tracked_job: Play,
    faulty: Door,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    fault: int | str,
    when: str,
) -> None:
    job, part = tracked_job, "/" if when == "at the first call" else "mlflow-artifacts"
    faulty.fault = lambda method, path: fault if part in path else None
    if fault == "hang":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = job.tracker()
    tracker.start(job.planned["prep"])
    sealed = job.seal("prep")
    tracker.finish(job.planned["prep"], sealed, [])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"tracking: {faulty.uri}: ") and "recorded later, from " in line
    assert len(job.waiting()) == 2
    assert not (job.runs / ".mlflow-spool" / "refused").exists()

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    faulty.fault = lambda method, path: None
    job.tracker().seen(job.planned["prep"], sealed)
    assert job.waiting() == []
    assert held(job, tmp_path.name)[0] == {"prep": "FINISHED", job.job.name: "RUNNING"}
    assert capfd.readouterr().err == ""


def test_answers_that_are_lost_one_after_the_other_double_nothing(
    tracked_job: Play, faulty: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each kind of call that changes something is done once by the server, and its answer is lost."""
    job, lost = tracked_job, set[str]()

    def lose(method: str, path: str) -> str | None:
        kind = path.partition("?")[0].partition("/artifacts/")[0]
        if method == "GET" or "search" in kind or kind in lost:
            return None
        lost.add(kind)
        return "lose"

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr("pipeline.registry.UPLOAD_SECONDS", "2")
    faulty.fault = lose
    job.through(*STAGES, **GATE)
    for _ in range(40):
        if not job.waiting():
            break
        job.tracker().seen(job.planned["eval"], art.open_artifact(job.planned["eval"].folder))
        job.tracker().now()
    assert job.waiting() == []
    kinds = " ".join(lost)
    for call in ("experiments/create", "runs/create", "log-batch", "runs/update", "log-inputs"):
        assert call in kinds, kinds
    assert "registered-models/create" in kinds and "model-versions/create" in kinds
    statuses, versions = held(job, tmp_path.name)
    assert statuses == dict.fromkeys([job.job.name, *stages_of(job.job)], "FINISHED")
    assert versions == ["1"]


def wait_for(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_training_never_waits_for_its_recorder(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls put events in the spool: no mlflow, no socket, on the thread that trains."""
    job, looks = play(), []
    monkeypatch.setattr("pipeline.tracking.connect", lambda runs: pytest.fail("asked the store"))
    tracker = Tracker(job.job, job.runs, lambda: looks.append(len(job.waiting())))
    tracker.start(job.planned["prep"])
    tracker.fail(job.planned["prep"], "FAILED", "no data")
    tracker.finish(job.planned["prep"], job.seal("prep"), [])
    assert looks == [1, 2, 3]


def test_the_recorder_records_what_waits_before_it_ends(
    play: Callable[..., Play], capfd: pytest.CaptureFixture[str]
) -> None:
    job = play()
    beside = Recorder(job.runs)
    tracker = Tracker(job.job, job.runs, beside.look)
    tracker.start(job.planned["prep"])
    wait_for(lambda: job.waiting() == [])
    tracker.finish(job.planned["prep"], job.seal("prep"), [])
    beside.close()
    assert job.waiting() == []
    assert Records(job.runs).stage("prep").info.status == "FINISHED"
    assert capfd.readouterr().err == ""


def test_a_server_that_comes_back_gets_its_runs_while_the_training_goes_on(
    tracked_job: Play, faulty: Door, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = tracked_job
    faulty.fault = lambda method, path: 503
    beside = Recorder(job.runs, retry=0.2)
    Tracker(job.job, job.runs, beside.look).start(job.planned["prep"])
    wait_for(lambda: len(faulty.asked) > 3)
    assert len(job.waiting()) == 1
    faulty.fault = lambda method, path: None
    wait_for(lambda: job.waiting() == [])
    beside.close()
    assert held(job, tmp_path.name)[0] == {"prep": "RUNNING", job.job.name: "RUNNING"}
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"tracking: {faulty.uri}: ")


def test_a_store_that_is_away_is_not_waited_for_at_the_end(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It accepts and never answers. What was to be said stays, and no process is left."""
    job = play()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        beside = Recorder(job.runs)
        Tracker(job.job, job.runs, beside.look).start(job.planned["prep"])
        process, now = beside.process, time.monotonic()
        assert process is not None
        assert beside._patience(now) <= recorder.FIRST_SECONDS, "no word yet"
        wait_for(lambda: beside._patience(now) == 0.0)
        assert beside.heard.decode().split() == [recorder.AWAY]
        beside.close()
        assert process.poll() is not None
    assert len(job.waiting()) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"tracking: {uri}: the server has not answered for 1 s; recorded later")


def test_a_store_that_answers_is_waited_for_and_not_for_ever() -> None:
    beside = Recorder(Path("runs"))
    beside.process = subprocess.Popen(
        [sys.executable, "-c", "print('answers', flush=True); input(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    wait_for(lambda: beside._patience(0.0) is not None and beside.heard != b"")
    now = time.monotonic()
    assert 0 < beside._patience(now) <= recorder.LAST_SECONDS
    assert beside._patience(now - recorder.LAST_SECONDS) <= 0
    beside.close()


def test_a_recorder_ends_with_its_stage(play: Callable[..., Play]) -> None:
    """Also where the stage is killed: its end of the pipe closes."""
    job = play()
    beside = Recorder(job.runs)
    beside.look()
    assert beside.process is not None and beside.process.stdin is not None
    beside.process.stdin.close()
    assert beside.process.wait(120) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_training_alone_is_recorded_aside(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    calls: list[str] = []

    class Noted:
        def __init__(self, runs: Path) -> None:
            assert runs == job.runs

        def look(self) -> None:
            calls.append(f"look at {len(job.waiting())}")

        def close(self) -> None:
            calls.append("close")

    def work(recipe: object, inputs: object, out: Path, context: object) -> dict[str, object]:
        if fails:
            raise DataError("no")
        (out / "a").write_text("x")
        return {}

    job = play()
    for name in ("prep", "anchor", "pack"):
        job.seal(name)
    monkeypatch.setattr(stage, "Recorder", Noted)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.job.model_dump(mode="json")), encoding="utf-8")
    asked = ["--job", str(path), "--runs", str(job.runs)]
    assert stage.main("sft", work, asked) == (DataError.exit_code if fails else 0)
    assert calls == ["look at 1", "look at 2", "close"]
    assert len(job.waiting()) == 2
    if not fails:
        assert stage.main("merge", work, asked) == 0
        assert len(calls) == 3 and job.waiting() == []
