"""Files of a run, and merged models as versions in the model registry. Gets an open client; imports no
mlflow.

A merged model becomes a version of ``untaxed-<job>``, one for each digest, and is never loaded. A
store that this process writes itself (SQLite, PostgreSQL) gets a file URI: a folder of hard links
below runs/mlartifacts/models, so nothing is copied and the version keeps its bytes when a rebuild
moves the artifact aside. A server refuses file URIs, so there the folder is uploaded, once, as a
logged model; with an artifact root that clients reach directly it does not pass through the server.

Alias ``candidate`` is set at merge. Alias ``released`` is set at eval on the version with the
evaluated digest when the gate passed, and taken from that version when it did not; the version says
in a tag how its gate ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError
from pipeline.files import link_or_copy
from pipeline.releasing import CANDIDATE, GATE, NOT_PASSED, PASSED, RELEASED, Releases
from pipeline.spool import Event, shown, still_sealed

ARTIFACTS = "mlartifacts"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
TIMEOUT_SECONDS = "10"
UPLOAD_SECONDS = "600"
NO_NETWORK = "UNTAXED_NO_NETWORK"


def database_of(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def served(uri: str) -> bool:
    """Whether a server stands before the store."""
    return uri.startswith(("http:", "https:"))


def cut_off(uri: str) -> bool:
    """Whether this machine is said to have no network, and the store is on a server."""
    return bool(os.environ.get(NO_NETWORK)) and served(uri)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Wait longer for files, unless the user has set the time."""
    before = os.environ.get(TIMEOUT, TIMEOUT_SECONDS)
    if before == TIMEOUT_SECONDS:
        os.environ[TIMEOUT] = UPLOAD_SECONDS
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def log_files(client: Any, run_id: str, event: Event, runs: Path) -> None:
    """The recipe, and for a sealed stage its manifest and its small files.

    They go through a folder of copies: sealed files are read-only, and so would be what MLflow
    makes of them, which could not be written a second time.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "recipe.json").write_text(json.dumps(event["recipe"], indent=1), encoding="utf-8")
        for name, path in shown(event, runs):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / name)
        with patient():
            client.log_artifacts(run_id, str(place))


@dataclass(frozen=True)
class Registry:
    """The registry behind ``client``. ``served``: a server stands before it."""

    client: Any
    experiment: str
    runs: Path
    served: bool

    def offer(self, event: Event, run_id: str) -> None:
        """Register a merged model, unless its folder holds another one by now."""
        version = self._version(event, run_id)
        if version:
            self.client.set_registered_model_alias(version.name, CANDIDATE, version.version)

    def release(self, event: Event) -> None:
        """Let ``released`` follow the gate; DataError when the model that passed is gone.

        What a server answered passes nothing here: which weights it has is not known.
        """
        if event.get("served") and event["gate_passed"]:
            return
        version = self._version(event, None)
        if version is None:
            if event["gate_passed"]:
                raise DataError(f"{event['model']['folder']}: the model that passed is not there")
            return
        said = PASSED if event["gate_passed"] else NOT_PASSED
        self.client.set_model_version_tag(version.name, version.version, GATE, said)
        if event["gate_passed"]:
            Releases(self.client).release(version)
        else:
            aliases = self.client.get_registered_model(version.name).aliases
            if str(aliases.get(RELEASED)) == str(version.version):
                self.client.delete_registered_model_alias(version.name, RELEASED)

    def _version(self, event: Event, run_id: str | None) -> Any:
        """The version with this digest, registered now if it is not; None if its folder is gone."""
        model, name = event["model"], f"untaxed-{event['job']}"
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("untaxed.digest") == model["digest"]:
                return version
        found = still_sealed(self.runs / model["folder"], model["digest"])
        if found is None:
            return None
        try:
            self.client.create_registered_model(name, tags={"untaxed.job": event["job"]})
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {"untaxed.digest": model["digest"], "untaxed.key": model["key"]}
        if self.served:
            model_id = self._upload(name, found, tags, run_id)
            source = f"models:/{model_id}"
        else:
            model_id, source = None, self._link(found).as_uri()
        return self.client.create_model_version(
            name, source, run_id=run_id, tags=tags, model_id=model_id, await_creation_for=0
        )

    def _link(self, found: Artifact) -> Path:
        """A folder of hard links to the sealed files, named by their digest."""
        final = self.runs / ARTIFACTS / "models" / found.digest[: art.KEY_LENGTH]
        if not final.exists():
            staging = art.stage_folder(final)
            for name in (art.MANIFEST, *found.manifest.files):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(found.folder / name, staging / name)
            os.rename(staging, final)
        return final

    def _upload(
        self, name: str, found: Artifact, tags: Mapping[str, str], run_id: str | None
    ) -> str:
        """Upload the folder as a logged model, going on with one that was not finished; its id."""
        wanted = f"tags.`untaxed.digest` = '{found.digest}'"
        models = self.client.search_logged_models([self.experiment], wanted)
        model = next((one for one in models if one.name == name), None)
        if model is None:
            model = self.client.create_logged_model(
                self.experiment, name=name, source_run_id=run_id, tags=dict(tags)
            )
        if str(model.status) != "READY":
            with patient():
                self.client.log_model_artifacts(model.model_id, str(found.folder))
            self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)
