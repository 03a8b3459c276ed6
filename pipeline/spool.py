"""What happened to the stages, as events on disk until the store of runs has them.

An event is plain JSON: what is to be said of a stage, and the names of sealed folders below
``runs``. It is written before anything is sent and removed once it is recorded, so a store that
does not answer delays an event and never loses one. Knows no MLflow.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import numbers
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, UntaxedError
from pipeline.graph import Planned, Workspace, plan_job
from pipeline.recipes import Job

LOCK_SECONDS = 30.0
MOST_CHARACTERS = 500
NAME_CHARACTERS = 250
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. :]")
FILES = {
    "prep": ("sheet.json", "sheet.md"),
    "pack": ("trained.txt",),
    "sft": ("metrics.jsonl",),
    "choose": ("choice.json", "points.jsonl", "*.png"),
    "merge": ("README.md", "certificate.json"),
    "eval": ("report.json", "report.html", "scores.json", "*.png", "*.svg"),
}
DATASETS = ("rows", "data", "prep", "anchor", "pack")

Event = dict[str, Any]
Metrics = Sequence[tuple[int, Mapping[str, float]]]


class Spool:
    """The folder ``runs/.mlflow-spool``: events in their order, and marks of what is recorded."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / ".mlflow-spool"

    def append(self, event: Event) -> None:
        """Put ``event`` after those that wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{os.getpid()}.json"
        art.write_atomic(self.folder / name, json.dumps(event))

    def waiting(self) -> list[Path]:
        """Files of the events that are not recorded yet, in order."""
        return sorted(self.folder.glob("*.json"))

    def waits(self, event: Event) -> bool:
        """True if an event about the same sealed stage of the same job waits already."""
        found = (read_event(path) for path in self.waiting())
        return any(one and one["digest"] and _name(one) == _name(event) for one in found)

    def set_aside(self, path: Path) -> Path:
        """Take an event that can never be recorded out of the way of those behind it."""
        target = self.folder / "refused" / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        return target

    def mark(self, store: str, event: Event) -> Path:
        """The file whose presence says that this sealed stage is recorded in ``store``."""
        return self.marks(store) / _name(event)

    def marks(self, store: str) -> Path:
        """The folder of all marks of ``store``."""
        return self.folder / "recorded" / _hash(store)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time records, so that events keep their order."""
        return locked(self.folder / "lock")


def _hash(value: object) -> str:
    return hashlib.sha256(art.canonical(value).encode("ascii")).hexdigest()[: art.KEY_LENGTH]


def _name(event: Event) -> str:
    return _hash([event[k] for k in ("job", "job_key", "stage", "key", "digest")])


def read_event(path: Path) -> Event | None:
    """The event in ``path``, or None when the file is damaged."""
    try:
        event = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


@contextlib.contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock file ``path``; UntaxedError after waiting ``seconds`` for another process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + seconds
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise UntaxedError(f"{path} is held by another process") from None
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGTERM and SIGINT, and raise them at the end.

    Libraries catch any Exception in the middle of their work and would swallow a request to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before: dict[int, Any] = {}
    for asking in (signal.SIGTERM, signal.SIGINT):
        before[asking] = signal.signal(asking, lambda caught, frame: asked.append(caught))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for number in asked:
        signal.raise_signal(number)


def still_sealed(folder: Path, digest: str) -> Artifact | None:
    """The sealed artifact in ``folder`` if it is there and still the one with this digest."""
    try:
        found = art.open_artifact(folder)
    except DataError:
        return None
    return found if found.digest == digest else None


def shown(event: Event, runs: Path) -> Iterator[tuple[str, Path]]:
    """Of a stage that is still sealed, the manifest and the small files that people look at."""
    found = still_sealed(runs / event["folder"], event["digest"]) if event["digest"] else None
    if found is None:
        return
    for name in (art.MANIFEST, *found.manifest.files):
        wanted = (art.MANIFEST, *FILES.get(event["stage"], ()))
        if any(fnmatch.fnmatch(name, pattern) for pattern in wanted):
            yield name, found.folder / name


def started(job: Job, planned: Planned) -> Event:
    """A stage begins, or goes on after a stop."""
    return _event(job, planned) | {"kind": "start", "status": "RUNNING", "job_status": "RUNNING"}


def failed(job: Job, planned: Planned, status: str, message: str) -> Event:
    """A stage ended without an artifact; ``status`` is FAILED or KILLED."""
    event = _event(job, planned) | {"kind": "fail", "status": status, "job_status": status}
    event["tags"]["untaxed.error"] = short(message)
    return event


def sealed(kind: str, job: Job, planned: Planned, artifact: Artifact, metrics: Metrics) -> Event:
    """A stage is sealed (``kind`` finish: just now; seen: some time ago).

    The job is finished once its last stage is sealed from the inputs that are there now. All times
    of metrics are that of the manifest: what is said twice is then the same, and not a second point.
    """
    manifest = artifact.manifest
    event = _event(job, planned)
    complete = plan(job, planned)["eval"].state() == "sealed"
    at = calendar.timegm(time.strptime(manifest.created_at, "%Y-%m-%dT%H:%M:%SZ")) * 1000
    facts = {k: v for k, v in manifest.facts.items() if k != "certificate"}
    figures, words = _facts(facts)
    series = [(step, _numbers(values)) for step, values in metrics or _history(artifact)]
    event["tags"] |= {"untaxed.digest": artifact.digest} | words
    code = {"mlflow.source.git.commit": manifest.revision, "untaxed.image": manifest.image}
    event["tags"] |= {name: value for name, value in code.items() if value}
    return event | {
        "kind": kind,
        "begin": at - round(manifest.seconds * 1000),
        "status": "FINISHED",
        "job_status": "FINISHED" if complete else "RUNNING" if kind == "finish" else None,
        "digest": artifact.digest,
        "folder": artifact.folder.name,
        "model": _model(planned, artifact),
        "gate_passed": manifest.facts.get("gate_passed"),
        "served": (manifest.facts.get("generation") or {}).get("engine") == "endpoint",
        "datasets": list(_datasets(planned, manifest.inputs)),
        "metrics_at": at,
        "metrics": [
            *((k, v, 0) for k, v in {"seconds": manifest.seconds, **figures}.items()),
            *((k, v, step) for step, values in series for k, v in values.items() if k != "step"),
        ],
    }


def _event(job: Job, planned: Planned) -> Event:
    now = time.time_ns() // 1_000_000
    recipe = planned.recipe.model_dump(mode="json")
    return {
        "time": now,
        "begin": now,
        "job": job.name,
        "job_key": plan(job, planned)["eval"].key,
        "stage": planned.name,
        "key": planned.key,
        "digest": None,
        "recipe": recipe,
        "params": {name[:NAME_CHARACTERS]: short(value) for name, value in flatten(recipe)},
        "tags": {"untaxed.job": job.name, "untaxed.version": str(planned.version)},
    }


def plan(job: Job, planned: Planned) -> dict[str, Planned]:
    """All stages of the job that ``planned`` is one of."""
    return plan_job(job, Workspace(planned.folder.parent), adopt=False)


def flatten(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested mappings and of lists of mappings."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            part = NOT_IN_NAMES.sub("_", str(key))
            yield from flatten(inner, f"{name}.{part}" if name else part)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{name}.{index}")
    else:
        yield name, value


def short(value: object) -> str:
    """``value`` as a short string: long ones are cut and end with a digest of the whole."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    if len(text) <= MOST_CHARACTERS:
        return text
    end = f"... sha256 {hashlib.sha256(text.encode('utf-8')).hexdigest()[:16]}"
    return text[: MOST_CHARACTERS - len(end)] + end


def _facts(facts: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Facts that are numbers, and as tags those that are text or truth values; lists are neither."""
    flat = dict(flatten({k: v for k, v in facts.items() if not isinstance(v, list)}))
    words = {k: v for k, v in flat.items() if isinstance(v, str | bool)}
    return _numbers(flat), {f"untaxed.fact.{name}": short(value) for name, value in words.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        NOT_IN_NAMES.sub("_", name)[:NAME_CHARACTERS]: float(value)
        for name, value in values.items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    }


def _history(artifact: Artifact) -> Iterator[tuple[int, dict[str, Any]]]:
    """The steps that a sealed stage wrote down itself, if it did."""
    if "metrics.jsonl" in artifact.manifest.files:
        for line in artifact.path("metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield int(row["step"]), row


def _model(planned: Planned, artifact: Artifact) -> dict[str, str] | None:
    """The merged model that a merge made or an evaluation judged."""
    if planned.name == "merge":
        name, digest = artifact.folder.name, artifact.digest
    elif planned.name == "eval":
        name, digest = planned.upstream["merge"].name, artifact.manifest.inputs["merge"]
    else:
        return None
    return {"folder": name, "digest": digest, "key": name.rpartition("-")[2]}


def _datasets(planned: Planned, inputs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows that the stage read: raw sources, and conversations or packed rows of earlier stages.

    Suites are those of the stages that measure: half of a file may be trained on, and prep would have
    that file under one name as two things. Of prep, eval reads the data sheet and no row.
    """
    excluded = {f"rows.{source.name}" for source in planned.job.prep.exclude}
    for label, digest in inputs.items():
        kind, _, name = label.partition(".")
        if kind not in DATASETS or (kind, planned.name) in {("data", "prep"), ("prep", "eval")}:
            continue
        folder = planned.upstream[label]
        origin = art.open_artifact(folder).manifest.recipe if name else {}
        yield {
            "name": name or kind,
            "digest": digest,
            "folder": folder.name,
            "context": "eval" if kind == "data" else "exclude" if label in excluded else "train",
            "origin": {key: origin[key] for key in ("source", "revision") if key in origin},
        }
