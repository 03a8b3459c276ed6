"""The component mlflow as it is rendered: its command line, its variables, its users' database."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow_server import POSTGRES, answers, postgres, wait
from parts import ROOT
from tracked import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not POSTGRES, reason="needs Debian's package postgresql"),
]
# characters that an address would have to quote
SECRETS = {
    "database-password": "p@ss/w%rd: 1",
    "flask-secret": "a secret",
    "admin-password": "a long password",
}
# root may write to any folder; a namespace makes it the user of the image, without capabilities
AS_USER = ["unshare", "--user", "--map-user=10001", "--map-group=10001", "--"]


def render(folder: Path) -> list[dict[str, Any]]:
    own = folder / "own"
    own.mkdir()
    tree = {
        "resources": [os.path.relpath(ROOT / "k8s/overlays/local", own)],
        "components": [os.path.relpath(ROOT / "k8s/components/mlflow", own)],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    made = subprocess.run(
        ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(own)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (only,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return only


@dataclass
class Rendered:
    """The server of the Deployment, with what a pod would mount in ``folder``."""

    folder: Path
    args: list[str]
    env: dict[str, str]
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self, place: str) -> None:
        """In a fresh working directory that cannot be written, with an empty /tmp."""
        here, tmp, log = (self.folder / f"{place}{end}" for end in ("", "-tmp", ".log"))
        here.mkdir(mode=0o555)
        tmp.mkdir()
        prefix = AS_USER if os.getuid() == 0 else []
        refused = subprocess.run([*prefix, "touch", "file"], cwd=here, capture_output=True)
        assert refused.returncode, "the working directory can be written"
        places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*prefix, *self.args],
                cwd=here,
                env=self.env | places | {"PATH": path, "USER": "untaxed", "OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        wait(lambda: answers(f"http://127.0.0.1:{self.port}/health"), self.process, log)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def ask(
        self,
        path: str,
        login: tuple[str, str] | None = None,
        host: str = "mlflow:5000",
        body: dict[str, str] | None = None,
    ) -> int:
        """The status; ``host`` is the name that a Job, or a forwarded port, calls the server by."""
        headers = {"Host": host, "Content-Type": "application/json"}
        if login:
            token = base64.b64encode(":".join(login).encode()).decode()
            headers["Authorization"] = f"Basic {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        path = f"/api/2.0/mlflow/{path}"
        connection.request("POST" if body else "GET", path, json.dumps(body), headers)
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture()
def server(tmp_path: Path) -> Iterator[Rendered]:
    objects = render(tmp_path)
    pod = named(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "$(" not in str(container["args"]), "a Secret stands on the command line"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    moved = re.compile(rf"(?<![^=])({'|'.join(mounts)})(?![^/])")
    for volume in pod["volumes"]:
        folder = tmp_path / volume["name"]
        folder.mkdir()
        if "configMap" in volume:
            held = named(objects, "ConfigMap", volume["configMap"]["name"])["data"]
            for name, text in held.items():
                (folder / name).write_text(text)
    env = {}
    for one in container["env"]:
        key = one.get("valueFrom", {}).get("secretKeyRef")
        assert key is None or key["name"] == "untaxed-mlflow"
        env[one["name"]] = SECRETS[key["key"]] if key else one["value"]
    with postgres(tmp_path / "postgres", SECRETS["database-password"]) as address:
        database = address.split("@")[1].removesuffix("/mlflow")
        port = free_port()

        def here(text: str) -> str:
            text = text.replace("mlflow-database:5432", database)
            return moved.sub(lambda found: str(tmp_path / mounts[found[0]]), text)

        for file in (tmp_path / "auth").iterdir():
            text = file.read_text()
            assert not [secret for secret in SECRETS.values() if secret in text]
            file.write_text(text.replace("mlflow-database:5432", database))
        args = [here(word).replace("--port=5000", f"--port={port}") for word in container["args"]]
        made = Rendered(tmp_path, args, {k: here(v) for k, v in env.items()}, port)
        try:
            yield made
        finally:
            made.stop()


def test_the_server_of_the_component_starts_and_keeps_its_users(server: Rendered) -> None:
    experiments = "experiments/get-by-name?experiment_name=Default"
    admin = ("admin", SECRETS["admin-password"])
    eva = ("eva", "another long password")
    server.start("first")
    assert server.ask(experiments) == 401
    assert server.ask(experiments, ("admin", "wrong")) == 401
    assert server.ask(experiments, admin) == 200
    assert server.ask(experiments, admin, host="localhost:5000") == 200
    assert server.ask(experiments, admin, host="127.0.0.1:5000") == 403
    assert server.ask(experiments, eva) == 401
    assert server.ask("users/create", admin, body={"username": eva[0], "password": eva[1]}) == 200
    assert server.ask(experiments, eva) == 200
    server.stop()
    server.start("second")
    assert server.ask(experiments, eva) == 200
    assert server.ask(experiments, admin) == 200
    assert server.ask(experiments) == 401
    assert not list(server.folder.rglob("*.db")), "users or runs lie in a file"
