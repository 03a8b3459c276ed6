"""Tracking when the store is away: a real server that is stopped half-way, and other outages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow_server import Server
from parts import ROOT
from tracked import FILES, GATE, Play, Records, free_port

from pipeline import artifact as art
from pipeline import cli
from pipeline.errors import Stopped
from pipeline.graph import stages_of
from pipeline.spool import flatten, short, uninterrupted

pytest_plugins = ("tracked",)
pytestmark = pytest.mark.slow


@pytest.fixture()
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server")
    shutil.copyfile(empty_database, made.folder / "server.db")
    yield made
    made.stop()


def test_without_a_network_events_wait_for_a_process_that_has_one(
    play: Callable[..., Play],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a cluster, where stages that may run generated code reach no server."""
    job = play()
    words = ["track", "--job", str(ROOT / "jobs/quickstart.yaml"), "--runs", str(job.runs)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("UNTAXED_NO_NETWORK", "1")
    monkeypatch.setattr("pipeline.tracking.connect", lambda runs: 1 / 0)
    job.through("prep")
    assert len(job.waiting()) == 2 and capsys.readouterr().err == ""
    assert cli.main(words) == 1
    assert "2 events still wait; run this command again" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    server.start()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "tracking: nothing waits\n"
    assert job.waiting() == []
    assert Records(job.runs).stage("prep").info.status == "FINISHED"


def test_a_store_of_its_own_needs_no_network(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = play()
    monkeypatch.setenv("UNTAXED_NO_NETWORK", "1")
    job.through("prep")
    assert job.waiting() == []
    assert Records(job.runs).stage("prep").info.status == "FINISHED"


def test_what_a_server_misses_is_replayed_in_order(
    play: Callable[..., Play],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from mlflow.artifacts import download_artifacts
    from transformers import AutoModelForCausalLM

    job = play()
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # tests may share their cores
    job.through("prep")
    job.start("anchor")
    assert "tracking" not in capfd.readouterr().err
    server.stop()

    job.finish("anchor")
    job.start("pack")
    job.tracker().fail(job.planned["pack"], "FAILED", "disk full")
    job.through("pack", "sft", "merge", "baseline", "eval", **GATE)
    job.tracker().seen(job.planned["eval"], art.open_artifact(job.planned["eval"].folder))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 14
    assert all(line.startswith(f"tracking: {server.uri}: ") for line in said)
    assert len(job.waiting()) == 13, "a sealed stage that is seen waits already"

    server.start()
    job.tracker().seen(job.planned["eval"], art.open_artifact(job.planned["eval"].folder))
    assert job.waiting() == []
    records = Records(job.runs)
    statuses = {run.info.run_name: run.info.status for run in records.all_runs()}
    assert statuses == dict.fromkeys(["tiny", *stages_of(job.job)], "FINISHED")
    assert len(records.all_runs()) == len(statuses)
    assert "untaxed.error" not in records.stage("pack").data.tags
    assert len(records.history(records.stage("sft"), "loss")) == 600
    assert records.files("eval") == {"recipe.json", "manifest.json"} | set(FILES["eval"])
    assert records.aliases() == {"candidate": "1", "released": "1"}
    before = records.picture()
    shutil.rmtree(job.runs / ".mlflow-spool")
    for name in ("merge", "eval"):
        job.tracker().seen(job.planned[name], art.open_artifact(job.planned[name].folder))
    assert records.picture() == before

    found = records.client.get_model_version_by_alias("untaxed-tiny", "released")
    folder = download_artifacts(artifact_uri=found.source, tracking_uri=server.uri)
    AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    sealed = art.open_artifact(Path(folder))
    assert sealed.digest == art.open_artifact(job.planned["merge"].folder).digest
    assert "tracking" not in capfd.readouterr().err


def test_a_store_that_cannot_be_opened_costs_one_line_and_little_time(
    play: Callable[..., Play],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = play()
    blocked = tmp_path / "a-file"
    blocked.write_text("no folder", encoding="utf-8")
    began = time.monotonic()
    closed = f"http://user:secret@127.0.0.1:{free_port()}"
    for uri in (closed, f"sqlite:///{blocked}/mlflow.db", "nonsense://x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = job.tracker()
        tracker.start(job.planned["prep"])
        tracker.fail(job.planned["prep"], "FAILED", "no data")
    assert time.monotonic() - began < 60
    said = capfd.readouterr().err
    assert [line.split(":")[0] for line in said.splitlines()] == ["tracking"] * 3
    assert "secret" not in said
    assert len(job.waiting()) == 6
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    job.finish("prep")
    assert job.waiting() == []
    records = Records(job.runs)
    assert records.stage("prep").info.status == "FINISHED"
    assert len(records.all_runs()) == 2


def test_an_event_that_can_never_be_recorded_does_not_hold_up_the_others(
    play: Callable[..., Play], capfd: pytest.CaptureFixture[str]
) -> None:
    job = play()
    spool = job.runs / ".mlflow-spool"
    spool.mkdir()
    (spool / "0000-damaged.json").write_text("{", encoding="utf-8")
    (spool / "0001-other.json").write_text('{"kind": "start"}', encoding="utf-8")
    job.start("prep")
    assert Records(job.runs).stage("prep").info.status == "RUNNING"
    assert job.waiting() == []
    assert sorted(p.name for p in (spool / "refused").iterdir()) == [
        "0000-damaged.json", "0001-other.json"
    ]  # fmt: skip
    assert capfd.readouterr().err.count("tracking:") == 1


CONNECT = """
import sys
from pathlib import Path
from pipeline.tracking import connect
print(connect(Path(sys.argv[1])).experiment)
"""


def test_four_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'shared.db'}",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONNECT, str(tmp_path / f"runs-{number}")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [
        (process.returncode, err) for process, (_, err) in zip(processes, ended, strict=True)
    ] == [(0, "")] * 4
    assert len({out for out, _ in ended}) == 1, "one experiment"


def test_a_stop_during_tracking_is_heard_after_it() -> None:
    def stop(number: int, frame: object) -> None:
        raise Stopped("stopped")

    before = signal.signal(signal.SIGTERM, stop)
    reached = []
    try:
        with pytest.raises(Stopped):
            with uninterrupted():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
                except Exception:  # as libraries do
                    reached.append("swallowed")
                reached.append("end")
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == ["end"]


def test_names_and_values_are_what_mlflow_takes() -> None:
    tree = {"a": {"b": [1, 2], "c": [{"d": None}]}, "odd/name!": True, "empty": {}}
    assert dict(flatten(tree)) == {
        "a.b": [1, 2],
        "a.c.0.d": None,
        "odd_name_": True,
        "empty": {},
    }
    assert [short(v) for v in ("x", "", None, True, 0.1)] == ["x", '""', "null", "true", "0.1"]
    assert short("y" * 501) != short("y" * 502)
    assert len(short("y" * 501)) == 500
