"""Job and stage runs in MLflow. The only module that imports mlflow, and only when it must.

Truth is the manifest; MLflow is an index of it. Where: a SQLite file and a folder of artifacts
beside the sealed ones, unless MLFLOW_TRACKING_URI names a store. The experiment is "untaxed"
(MLFLOW_EXPERIMENT_NAME).

A job has one run, found by its name and ``untaxed.job_key``: the key of its eval stage, which is a
hash over the keys of all its stages, so that a changed recipe or changed data is another run. Its
stages are nested runs found by ``untaxed.key``; a stage that runs again goes on in the same run.

Tracking never costs a training: what cannot be recorded now is one warning line and waits in the
spool. What goes wrong in the store is tried again with the next event; an event that the store
refuses for what it says is set aside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, UntaxedError, one_line
from pipeline.graph import Planned
from pipeline.reach import reach
from pipeline.recipes import Job
from pipeline.registry import (
    ARTIFACTS,
    TIMEOUT,
    TIMEOUT_SECONDS,
    Registry,
    cut_off,
    database_of,
    log_files,
    served,
)
from pipeline.spool import (
    Event,
    Metrics,
    Spool,
    failed,
    locked,
    read_event,
    sealed,
    started,
    uninterrupted,
)

EXPERIMENT = "untaxed"
# The spool tries again, so one short try is enough; files get longer.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: TIMEOUT_SECONDS,
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
MOST_METRICS, MOST_PARAMS, MOST_TAGS = 1000, 100, 100
DATASET_DIGEST = 36
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def store_uri(runs: Path) -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or a SQLite file beside the artifacts."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def _experiment() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


class Replay:
    """Brings the spool below ``runs`` to the store; ``opened`` is called when that answers."""

    def __init__(self, runs: Path, opened: Callable[[], None] | None = None) -> None:
        self.runs = runs.resolve()
        self.spool = Spool(self.runs)
        self.opened = opened or (lambda: None)
        self.warned = False

    def now(self) -> bool:
        """Record what waits; False, and one line for the first time, where that cannot be."""
        try:
            with self.spool.held():
                self._drain()
            return True
        except Exception as error:
            self._warn(f"{one_line(error)[:300]}; recorded later, from {self.spool.folder}")
            return False

    def _drain(self) -> None:
        """Record all events that wait, in order; stops at the first one that it cannot record."""
        waiting = self.spool.waiting()
        if not waiting or cut_off(store_uri(self.runs)):
            return
        store = connect(self.runs)
        self.opened()
        for path in waiting:
            event = read_event(path)
            try:
                if event is None:
                    raise DataError("damaged event")
                mark = self.spool.mark(store.name, event)
                if event["kind"] != "seen" or not mark.exists():
                    apply(store, event)
            except Exception as error:
                if not _refused(error):
                    raise
                aside = self.spool.set_aside(path)
                self._warn(f"{one_line(error)[:300]}; not recorded, kept as {aside}")
                continue
            if event["digest"]:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            path.unlink()

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            uri = store_uri(self.runs)
            secret = urlsplit(uri).netloc.rpartition("@")[0]
            line = f"tracking: {uri}: {message}"
            line = line.replace(f"{secret}@", "") if secret else line
            print(line, file=sys.stderr, flush=True)


class Tracker(Replay):
    """Records what happens to the stages of one job. Nothing here raises but a request to stop.

    With ``aside`` events are put in the spool and no more, and it is told that there is one.
    """

    def __init__(self, job: Job, runs: Path, aside: Callable[[], None] | None = None) -> None:
        super().__init__(runs)
        self.job, self.aside = job, aside

    def start(self, planned: Planned) -> None:
        """A stage begins or goes on."""
        self._record(lambda: started(self.job, planned))

    def finish(self, planned: Planned, artifact: Artifact, metrics: Metrics) -> None:
        """A stage is sealed; ``metrics`` are (step, values)."""
        self._record(lambda: sealed("finish", self.job, planned, artifact, metrics))

    def fail(self, planned: Planned, status: str, message: str) -> None:
        """A stage ended as FAILED or KILLED. What is sealed did not fail, whatever came after."""
        if not (planned.folder / art.MANIFEST).exists():
            self._record(lambda: failed(self.job, planned, status, message))

    def seen(self, planned: Planned, artifact: Artifact) -> None:
        """A sealed stage is skipped: record it if it is not. Costs no import when it is."""
        self._record(lambda: sealed("seen", self.job, planned, artifact, ()))

    def send(self) -> int:
        """Record what waits; returns how many events still do."""
        self._record(None)
        return len(self.spool.waiting())

    def _record(self, make: Callable[[], Event] | None) -> None:
        with uninterrupted():
            try:
                event = make() if make else None
                if event and event["kind"] == "seen" and self._recorded(event):
                    return
                if event and not (event["kind"] == "seen" and self.spool.waits(event)):
                    self.spool.append(event)
                if self.aside:
                    self.aside()
                    return
            except Exception as error:
                self._warn(f"{one_line(error)[:300]}; recorded later, from {self.spool.folder}")
                return
            self.now()

    def _recorded(self, event: Event) -> bool:
        uri = store_uri(self.runs)
        database = database_of(uri)
        gone = database is not None and not database.exists()
        return not gone and self.spool.mark(f"{uri} {_experiment()}", event).exists()


def _refused(error: Exception) -> bool:
    """True if the event is at fault and not the store: it would fail for ever."""
    own = isinstance(error, LookupError | TypeError | FileNotFoundError | DataError)
    return own or getattr(error, "error_code", None) in REFUSALS


@dataclass(frozen=True)
class Store:
    """An open store; ``name`` says which, ``experiment`` is an id."""

    client: Any
    name: str
    experiment: str
    runs: Path
    registry: Registry


def load_mlflow() -> Callable[..., Any]:
    """Import mlflow with our settings, which it reads as it is imported; returns its client."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow.MlflowClient  # type: ignore[no-any-return]


def connect(runs: Path) -> Store:
    """Open the store and make its experiment; any error means that it cannot be used now."""
    uri = store_uri(runs)
    if served(uri):
        reach(uri, float(os.environ.get(TIMEOUT) or TIMEOUT_SECONDS))
    make_client = load_mlflow()
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    if not served(uri):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 3  # ten take minutes of a training
    store = f"{uri} {_experiment()}"
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    database = database_of(uri)
    # Processes that create the tables of one SQLite file together break each other.
    first = locked(database.with_name(f"{database.name}.lock")) if database else None
    with first or contextlib.nullcontext():
        if database and not database.exists():
            shutil.rmtree(Spool(runs).marks(store), ignore_errors=True)
        client = make_client(tracking_uri=uri)
        experiment = _open_experiment(client, uri, runs)
    registry = Registry(client, experiment, runs, served(registry_uri))
    return Store(client, store, experiment, runs, registry)


def _open_experiment(client: Any, uri: str, runs: Path) -> str:
    """Id of the experiment. A server has its own place for artifacts; else they lie below runs."""
    from mlflow.exceptions import MlflowException

    name = _experiment()
    found = client.get_experiment_by_name(name)
    if found is None:
        place = None if served(uri) else (runs / ARTIFACTS).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UntaxedError(
            f"experiment {name} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME"
        )
    return str(found.experiment_id)


def apply(store: Store, event: Event) -> None:
    """Make the store say what ``event`` says. Doing it twice changes nothing."""
    job = {"untaxed.job": event["job"], "untaxed.job_key": event["job_key"]}
    parent = _run(store, event["job"], job, event["begin"])
    stage = {"untaxed.stage": event["stage"], "untaxed.key": event["key"]}
    stage["mlflow.parentRunId"] = parent.info.run_id
    run = _run(store, event["stage"], stage, event["begin"])
    if "untaxed.error" in run.data.tags and "untaxed.error" not in event["tags"]:
        store.client.delete_tag(run.info.run_id, "untaxed.error")
    # A parameter cannot be changed; what the run has is left as it is.
    missing = {k: v for k, v in event["params"].items() if k not in run.data.params}
    _log(store, run, event["tags"], missing, event.get("metrics", ()), event.get("metrics_at"))
    log_files(store.client, run.info.run_id, event, store.runs)
    if event["digest"]:
        _log_datasets(store, run, event["datasets"])
        if event["stage"] == "eval":
            first = [metric for metric in event["metrics"] if metric[2] == 0]
            _log(store, parent, {}, {}, first, event["metrics_at"])
    _set_status(store, run, event["status"], event["time"])
    if event["job_status"]:
        _set_status(store, parent, event["job_status"], event["time"])
    if event["digest"] and event["stage"] == "merge":
        store.registry.offer(event, run.info.run_id)
    elif event["digest"] and event["stage"] == "eval":
        store.registry.release(event)


def _run(store: Store, name: str, identity: Mapping[str, str], begin: int) -> Any:
    """The run with these tags, made when there is none."""
    wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
    found = store.client.search_runs([store.experiment], wanted, max_results=1)
    if found:
        return found[0]
    return store.client.create_run(
        store.experiment, start_time=begin, tags=dict(identity), run_name=name
    )


def _set_status(store: Store, run: Any, status: str, at: int) -> None:
    if status != "RUNNING":
        store.client.set_terminated(run.info.run_id, status, end_time=at)
    elif run.info.status != "RUNNING":
        store.client.update_run(run.info.run_id, status="RUNNING")


def _log(
    store: Store,
    run: Any,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    metrics: Sequence[tuple[str, float, int]],
    at: int | None,
) -> None:
    """Log in batches of the sizes that MLflow takes; metrics are (name, value, step)."""
    from mlflow.entities import Metric, Param, RunTag

    groups: tuple[tuple[str, list[Any], int], ...] = (
        ("tags", [RunTag(*item) for item in tags.items()], MOST_TAGS),
        ("params", [Param(*item) for item in params.items()], MOST_PARAMS),
        ("metrics", [Metric(name, value, at, step) for name, value, step in metrics], MOST_METRICS),
    )
    for kind, entries, most in groups:
        for first in range(0, len(entries), most):
            store.client.log_batch(run.info.run_id, **{kind: entries[first : first + most]})


def _log_datasets(store: Store, run: Any, datasets: Sequence[Mapping[str, Any]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=one["name"],
                digest=one["digest"][:DATASET_DIGEST],
                source_type="local",
                source=json.dumps({"uri": (store.runs / one["folder"]).as_uri()}),
                profile=json.dumps(one["origin"]),
            ),
            tags=[InputTag("mlflow.data.context", one["context"])],
        )
        for one in datasets
    ]
    if inputs:
        store.client.log_inputs(run.info.run_id, inputs)
