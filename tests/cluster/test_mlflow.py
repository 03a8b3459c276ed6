"""Tracking on a server as a cluster has it: PostgreSQL, artifacts in S3, and a password."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow_server import ADMIN, KEYS, POSTGRES, Server, postgres, s3
from tracked import GATE, Play, Records

from pipeline import artifact as art
from pipeline.graph import stages_of

pytest_plugins = ("tracked",)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not POSTGRES, reason="needs Debian's package postgresql"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("cluster")
    users = folder / "auth.ini"
    with postgres(folder / "postgres") as store, s3(folder / "s3") as bucket:
        users.write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'users.db'}\n"
            "admin_username = admin\n"
            "admin_password = a long password\n"
            "auth_cache_ttl_seconds = 300\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        settings = {
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret",
            "MLFLOW_S3_ENDPOINT_URL": bucket,
        }
        made = Server(
            folder / "server",
            store,
            "s3://untaxed/mlflow",
            settings | KEYS,
            ("--app-name=basic-auth",),
        )
        made.start()
        yield made
        made.stop()


@pytest.fixture()
def server(
    started: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Server:
    """The one server, where each test has an experiment of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    return started


def test_a_job_whose_training_the_server_misses_ends_as_any_other(
    play: Callable[..., Play], server: Server, tmp_path: Path
) -> None:
    """The same runs, metrics, datasets, files and versions as with the server up."""
    job = play()
    stages = stages_of(job.job)
    before, after = stages[: stages.index("sft")], stages[stages.index("sft") + 1 :]
    shutil.copytree(job.runs, tmp_path / "again")
    job.through(*before, "sft", *after, **GATE)
    records = Records(job.runs)
    whole, files = (
        records.without_ids(records.picture()),
        {stage: records.files(stage) for stage in stages},
    )
    records.client.delete_registered_model("untaxed-tiny")
    for run in records.all_runs():
        records.client.delete_run(run.info.run_id)
    shutil.rmtree(job.runs)
    shutil.move(tmp_path / "again", job.runs)

    job.through(*before)
    server.stop()
    job.through("sft")
    assert job.waiting()
    server.start()
    job.through(*after, **GATE)
    assert job.waiting() == []
    assert records.without_ids(records.picture()) == whole
    assert {stage: records.files(stage) for stage in stages} == files
    assert len(records.history(records.stage("sft"), "loss")) == 600


def test_a_wrong_password_costs_a_line_and_nothing_else(
    play: Callable[..., Play],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = play()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    job.through("prep")
    said = capfd.readouterr().err
    assert "tracking: " in said and len(said.splitlines()) <= 2
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN["MLFLOW_TRACKING_PASSWORD"])
    job.tracker().seen(job.planned["prep"], art.open_artifact(job.planned["prep"].folder))
    assert job.waiting() == []
    assert Records(job.runs).stage("prep").info.status == "FINISHED"
