"""A real ``mlflow server`` that tests may stop and start again, on SQLite and a folder, or as a cluster has
it: on PostgreSQL, with artifacts in S3 (moto's server) and basic authentication."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tracked import free_port

WAIT_SECONDS = 180.0
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
if not POSTGRES and os.environ.get("UNTAXED_NEEDS_CONTAINERS"):
    raise RuntimeError("UNTAXED_NEEDS_CONTAINERS is set: needs Debian's package postgresql")
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a long password"}
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """AssertionError, with the log, for one that ends or is not ready after so long."""
    give_up = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            if ready():
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def answers(uri: str) -> bool:
    with urllib.request.urlopen(uri, timeout=1) as answer:
        return bool(answer.status == 200)


@dataclass
class Server:
    """``folder`` keeps its log, and its data where nothing else is said."""

    folder: Path
    store: str = ""
    artifacts: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        settings = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *self.options]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store or f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", self.artifacts or str(self.folder / "artifacts")]
        log = self.folder / "log"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=inherited | settings | dict(self.settings),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        wait(lambda: answers(f"{self.uri}/health"), self.process, log)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def postgres(folder: Path, password: str = "") -> Iterator[str]:
    """The address of an empty database of a PostgreSQL that is gone afterwards.

    It asks for ``password``, where there is one.
    """
    programs = POSTGRES[-1].parent
    data, port = folder / "data", free_port()
    folder.mkdir()
    (folder / "password").write_text(password or "unused")
    user = _nobody(folder)
    made = [
        str(programs / "initdb"),
        "--username",
        "mlflow",
        "--auth",
        "scram-sha-256" if password else "trust",
        "--pwfile",
        str(folder / "password"),
        "--pgdata",
        str(data),
    ]
    subprocess.run(made, user=user, check=True, capture_output=True, cwd=folder)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
    log = folder / "log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-c", "fsync=off"],
            user=user,
            cwd=folder,
            stdout=stream,
            stderr=stream,
        )
    try:
        ask = [
            str(programs / "createdb"),
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-U",
            "mlflow",
            "mlflow",
        ]
        known = os.environ | {"PGPASSWORD": password}
        wait(
            lambda: not subprocess.run(ask, env=known, capture_output=True).returncode,
            process,
            log,
        )
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _nobody(folder: Path) -> str | None:
    """PostgreSQL does not run as root: who it runs as, who then owns ``folder``."""
    if os.getuid():
        return None
    import shutil

    shutil.chown(folder, "postgres")
    for parent in folder.parents:  # pytest's own are closed to others
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return "postgres"


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """The address of an S3 with the bucket ``untaxed``, by moto."""
    folder.mkdir()
    uri = f"http://127.0.0.1:{(port := free_port())}"
    log = folder / "log"
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        wait(lambda: answers(f"{uri}/moto-api/data.json"), process, log)
        import boto3

        words = {
            name.lower().replace("aws_default_region", "region_name"): v for name, v in KEYS.items()
        }
        boto3.client("s3", endpoint_url=uri, **words).create_bucket(Bucket="untaxed")
        yield uri
    finally:
        process.terminate()
        process.wait()
