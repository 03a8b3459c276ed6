"""Rules for servers of models: those beside a stage in its pod, and those that a job file asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from pipeline.graph import STAGES, AnchorStep, BaselineStep, EvalStep
from pipeline.jobfile import parse_job
from pipeline.recipes import Job, JudgeRecipe

Manifest = dict[str, Any]
PART = "app.kubernetes.io/component"
ADDRESS, ALIGNED_ADDRESS = "UNTAXED_ENDPOINT", "UNTAXED_ALIGNED_ENDPOINT"
LOOPBACK = re.compile(r"http://127\.0\.0\.1:(\d+)/v1/?")
QUIET = ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
GPU = "nvidia.com/gpu"


def job_of(job: Manifest, objects: Sequence[Manifest]) -> Job | None:
    """The job file that the pods of ``job`` read, where it is among ``objects``."""
    volumes = job["spec"]["template"]["spec"].get("volumes") or ()
    names = {v["configMap"].get("name") for v in volumes if "configMap" in v}
    for one in objects:
        text = one.get("data", {}).get("job.yaml") if one["kind"] == "ConfigMap" else None
        if text is not None and one["metadata"]["name"] in names:
            return parse_job(yaml.safe_load(text), one["metadata"]["name"])
    return None


def stage_of(job: Manifest) -> str:
    """The stage that a Job runs; an empty text for one that runs none."""
    stage = (job["metadata"].get("labels") or {}).get(PART, "")
    return stage if stage in STAGES else ""


def models_asked(job: Job, stage: str) -> dict[str, set[str]]:
    """By the variable that says where the server is: the names of the models that ``stage`` asks."""
    recipe = STAGES[stage].recipe(job)
    asked: dict[str, set[str]] = {ADDRESS: set(), ALIGNED_ADDRESS: set()}
    judges: tuple[JudgeRecipe, ...] = ()
    if isinstance(recipe, AnchorStep) and recipe.anchor.endpoint:
        asked[ADDRESS].add(recipe.anchor.endpoint.model)
    if isinstance(recipe, BaselineStep):
        judges = recipe.judges
        if recipe.endpoint:
            asked[ADDRESS].add(recipe.endpoint.model)
    if isinstance(recipe, EvalStep):
        judges = recipe.eval.judges
        if recipe.eval.endpoint:
            asked[ADDRESS].add(recipe.eval.endpoint.base)
            asked[ALIGNED_ADDRESS].add(recipe.eval.endpoint.aligned)
    asked[ADDRESS] |= {judge.endpoint.model for judge in judges if judge.endpoint}
    return {variable: names for variable, names in asked.items() if names}


def _option(container: Manifest, name: str) -> str | None:
    """The value of ``--name``, in one word or two."""
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    for number, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return str(word.partition("=")[2])
        if word == f"--{name}" and number + 1 < len(words):
            return str(words[number + 1])
    return None


def _serves(container: Manifest) -> bool:
    return _option(container, "served-model-name") is not None


def _gpus(container: Manifest) -> bool:
    return GPU in ((container.get("resources") or {}).get("limits") or {})


def servers_beside(job: Manifest, objects: Sequence[Manifest]) -> Iterator[str]:
    """Of servers in the pod: up before the stage begins, reached by nobody else, with the GPU."""
    pod = job["spec"]["template"]["spec"]
    first, main = pod.get("initContainers") or [], pod.get("containers") or []
    for container in filter(_serves, main):
        yield (
            f"{container['name']}: a server never ends, so the Job would not: wanted it among the"
            " initContainers, with restartPolicy Always"
        )
    servers = [container for container in first if _serves(container)]
    for container in servers:
        name = container["name"]
        if container.get("restartPolicy") != "Always":
            yield f"{name}: is waited for to its end, which never comes: wanted restartPolicy Always"
        probe = container.get("startupProbe")
        if probe is None:
            yield f"{name}: no startupProbe: the stage would ask before the model is loaded"
        elif "exec" not in probe:
            yield f"{name}: a probe of the kubelet does not reach 127.0.0.1: wanted startupProbe.exec"
        if _option(container, "host") != "127.0.0.1":
            yield f"{name}: answers whoever reaches the pod: wanted --host=127.0.0.1"
        if not _gpus(container):
            yield f"{name}: no limit of {GPU}"
        said = {variable["name"] for variable in container.get("env") or ()}
        for variable in QUIET:
            if variable not in said:
                yield f"{name}: {variable} is not set: it would look for the internet"
        yield from _linked_late(container, first)
    for port, count in Counter(_option(one, "port") or "8000" for one in servers).items():
        if count > 1:
            yield f"{count} servers listen on port {port}"
    for container in main if servers else ():
        if _gpus(container):
            yield f"{container['name']}: asks for a GPU beside that of its server: wanted none"


def _linked_late(server: Manifest, containers: Sequence[Manifest]) -> Iterator[str]:
    reads = {m["name"] for m in server.get("volumeMounts") or () if m.get("readOnly")}
    for container in containers[containers.index(server) + 1 :]:
        writes = {m["name"] for m in container.get("volumeMounts") or () if not m.get("readOnly")}
        if reads & writes and not _serves(container):
            yield f"{server['name']}: starts before {container['name']}, which makes what it reads"


def models_served(job: Manifest, objects: Sequence[Manifest]) -> Iterator[str]:
    """What the job file asks a server for, and what the pod has."""
    said, stage = job_of(job, objects), stage_of(job)
    if said is None or not stage:
        return
    pod = job["spec"]["template"]["spec"]
    servers = {
        _option(one, "port") or "8000": _option(one, "served-model-name")
        for one in pod.get("initContainers") or ()
        if _serves(one)
    }
    asked = models_asked(said, stage)
    if servers and not asked:
        yield f"has a server, and the job file gives {stage} no endpoint, so nobody would ask it"
    variables = {
        variable["name"]: variable
        for container in pod.get("containers") or ()
        for variable in container.get("env") or ()
    }
    for variable, names in asked.items():
        there = variables.get(variable) or variables.get(ADDRESS)
        if there is None:
            yield (
                f"the job file asks a server for {', '.join(sorted(names))}, and {ADDRESS} is not set:"
                " take up k8s/components/vllm, or set it"
            )
            continue
        place = LOOPBACK.fullmatch(str(there.get("value", "")))
        for name in sorted(names) if place else ():
            found = servers.get(place[1])  # type: ignore[index]
            if found is None:
                yield f"{there['name']}={there['value']}: no server in the pod listens there"
            elif found != name:
                yield f"{there['name']}: the job file asks for model {name}, the server has {found}"
