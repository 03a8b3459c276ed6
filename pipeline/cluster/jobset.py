"""A whole pipeline as one JobSet: the cluster runs stage after stage, with no launcher alive.

Needs the JobSet controller (jobset.x-k8s.io/v1alpha2, dependsOn: 0.8 and later). A failure that may
pass makes all Jobs anew: stages that are sealed end at once, and training goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from pipeline.cluster.objects import (
    CLOSED,
    JOB_CHARACTERS,
    JOB_LABEL,
    KEY_DIGITS,
    KEY_LABEL,
    QUEUE,
    TRACKING,
    Manifest,
    Overlay,
    stage_objects,
    tracking_objects,
)
from pipeline.origin import revision
from pipeline.recipes import Job

RESTARTS = 20
OWN = ("suspend", "ttlSecondsAfterFinished")  # the JobSet's to say, not those of its Jobs


def jobset_objects(
    overlay: Overlay, job: Job, text: str, stages: Sequence[str]
) -> tuple[Manifest, ...]:
    """The ConfigMap with the job file, and the JobSet of ``stages`` in their order."""
    here = revision()
    made = {s: stage_objects(overlay, job, text, s, revision=here) for s in stages}
    closed = [stage for stage in stages if stage in CLOSED]
    served = [one for one in overlay.standing if one["metadata"]["name"] == TRACKING]
    if closed and served:
        key = made[closed[-1]][-1]["metadata"]["labels"][KEY_LABEL]
        made["track"] = tracking_objects(overlay, job, text, key, 1)
    keys = [objects[-1]["metadata"]["labels"][KEY_LABEL] for objects in made.values()]
    key = hashlib.sha256("/".join(keys).encode()).hexdigest()[:KEY_DIGITS]
    name = f"{job.name[:JOB_CHARACTERS].rstrip('-')}-{key}"
    queue = {k: v for k, v in overlay.jobs[stages[0]]["metadata"]["labels"].items() if k == QUEUE}
    replicated = [_replicated(name, stage, objects[-1]) for stage, objects in made.items()]
    for before, after in itertools.pairwise(replicated):
        after["dependsOn"] = [{"name": before["name"], "status": "Complete"}]
    ttl = overlay.jobs[stages[0]]["spec"].get("ttlSecondsAfterFinished")
    return made[stages[0]][0], {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": overlay.namespace,
            "labels": {"app.kubernetes.io/name": "untaxed", JOB_LABEL: job.name} | queue,
        },
        "spec": {
            **({"suspend": True} if queue else {}),
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                # a bad recipe or bad data stays bad
                "rules": [
                    {
                        "name": "bad",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            **({} if ttl is None else {"ttlSecondsAfterFinished": ttl}),
            "replicatedJobs": replicated,
        },
    }


def _replicated(name: str, stage: str, job: Manifest) -> Manifest:
    """One Job of the set; its pods find rank 0 by the name that the set gives it."""
    spec = {key: value for key, value in job["spec"].items() if key not in OWN}
    pod = spec["template"]["spec"]
    pod.pop("subdomain", None)
    for container in pod["containers"]:
        for variable in container.get("env", []):
            if variable["name"] == "PET_MASTER_ADDR":
                variable["value"] = f"{name}-{stage}-0-0.{name}"
    labels = {key: value for key, value in job["metadata"]["labels"].items() if key != QUEUE}
    return {
        "name": stage,
        "replicas": 1,
        "template": {"metadata": {"labels": labels}, "spec": spec},
    }
