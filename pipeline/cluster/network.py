"""The rule that generated code runs without network: what a job file has run, and what policies open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.cluster.servers import job_of, stage_of
from pipeline.recipes import Job, Suite

Manifest = dict[str, Any]
CODE_SETS = {"humaneval", "mbpp"}  # public sets whose answers are programs that are run
NO_NETWORK = "UNTAXED_NO_NETWORK"


def code_suites(job: Job, stage: str) -> list[str]:
    """Names of the suites whose answers ``stage`` runs."""
    suites: tuple[Suite, ...] = ()
    if stage in ("baseline", "eval"):
        suites = job.eval.suites
    elif stage == "choose" and job.choose:
        suites = job.choose.suites
    return [suite.name for suite in suites if suite.public in CODE_SETS]


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels."""
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(name) != value for name, value in wanted.items()):
        return False
    for one in selector.get("matchExpressions") or ():
        there, value = one["key"] in labels, labels.get(one["key"])
        holds = {
            "In": there and value in (one.get("values") or ()),
            "NotIn": value not in (one.get("values") or ()),
            "Exists": there,
            "DoesNotExist": not there,
        }[one["operator"]]
        if not holds:
            return False
    return True


def code_is_alone(job: Manifest, objects: Sequence[Manifest]) -> Iterator[str]:
    """Of a Job that runs generated code: its pods are closed, and no policy opens anything to them."""
    said, stage = job_of(job, objects), stage_of(job)
    suites = code_suites(said, stage) if said else []
    if not suites:
        return
    why = f"runs code that a model wrote (suite {suites[0]})"
    template = job["spec"]["template"]
    labels = template["metadata"].get("labels") or {}
    policies = [
        one
        for one in objects
        if one["kind"] == "NetworkPolicy" and selects(one["spec"].get("podSelector") or {}, labels)
    ]
    for direction in ("Ingress", "Egress"):
        rules = direction.lower()
        if not any(_governs(one["spec"], direction) for one in policies):
            yield f"{why}, and no NetworkPolicy denies {rules}: wanted default-deny of k8s/base"
        for one in policies:
            if one["spec"].get(rules):
                yield (
                    f"{why}, and NetworkPolicy {one['metadata']['name']} opens {rules} to it: wanted"
                    f" none; leave {stage} out of its podSelector, or the suite out of the job"
                )
    for container in template["spec"]["containers"]:
        if NO_NETWORK not in {variable["name"] for variable in container.get("env") or ()}:
            yield f"{why}, and {NO_NETWORK} is not set: it would wait for a tracking server in vain"


def _governs(spec: Manifest, direction: str) -> bool:
    implied = ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return direction in (spec.get("policyTypes") or implied)
