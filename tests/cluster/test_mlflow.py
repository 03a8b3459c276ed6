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
pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs Debian's package postgresql")


@pytest.fixture()
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    users = tmp_path / "auth.ini"
    with postgres(tmp_path / "postgres") as store, s3(tmp_path / "s3") as bucket:
        users.write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{tmp_path / 'users.db'}\n"
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
            tmp_path / "server",
            store,
            "s3://untaxed/mlflow",
            settings | KEYS,
            ("--app-name=basic-auth",),
        )
        made.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        for name, value in ADMIN.items():
            monkeypatch.setenv(name, value)
        yield made
        made.stop()


def test_a_job_whose_training_the_server_misses_ends_as_any_other(
    play: Callable[..., Play], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same runs, metrics, files and versions, but for their names and times."""
    stages = [stage for stage in stages_of(play().job) if stage != "sft"]
    quiet = play("quiet")
    quiet.through(*stages[: stages.index("merge")], "sft", *stages[stages.index("merge") :], **GATE)
    whole = Records(quiet.runs).picture()
    shutil.rmtree(quiet.runs)

    missed = play("missed")
    missed.through(*stages[: stages.index("merge")])
    server.stop()
    missed.through("sft")
    assert missed.waiting()
    server.start()
    missed.through(*stages[stages.index("merge") :], **GATE)
    assert missed.waiting() == []
    assert Records(missed.runs).picture() == whole


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
