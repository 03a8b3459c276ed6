"""What a cluster says, as it says it, in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster.words import State, look


def job(*conditions: dict[str, str], suspend: bool = False) -> dict[str, Any]:
    return {"spec": {"suspend": suspend}, "status": {"conditions": list(conditions)}}


def failed(reason: str, message: str = "") -> dict[str, Any]:
    return job({"type": "Failed", "status": "True", "reason": reason, "message": message})


def pod(phase: str, *states: dict[str, Any], **status: Any) -> dict[str, Any]:
    containers = [{"name": "stage", "state": state} for state in states]
    return {"status": {"phase": phase, "containerStatuses": containers} | status}


def ended(code: int, reason: str = "Error", message: str = "", at: str = "") -> dict[str, Any]:
    return {
        "terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}
    }


def waits(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def first(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of what starts before the stage."""
    return {"initContainerStatuses": [{"name": "serve-base", "state": state} | more]}


def unplaced(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return pod("Pending", conditions=[condition | {"message": message}])


QUEUED = job(suspend=True) | {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team"}}}
BACKOFF = failed("BackoffLimitExceeded", "Job has reached the specified backoff limit")
POLICY = failed("PodFailurePolicy", "Container stage failed with exit code 78")
DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
CASES = [
    (None, [], [], State.ABSENT, "", False),
    (job(), [], [], State.WAITING, "", False),
    (job(), [pod("Running", {"running": {}})], [], State.RUNNING, "", False),
    (job({"type": "Complete", "status": "True"}), [], [], State.COMPLETE, "", False),
    (job({"type": "Failed", "status": "False"}), [], [], State.WAITING, "", False),
    (job(suspend=True), [], [], State.WAITING, "it is suspended", False),
    (QUEUED, [], [], State.WAITING, "it is labelled for Kueue, and the cluster has none", False),
    (job(), [unplaced("0/3 nodes: gpu")], [], State.WAITING, "no node has room for it: 0/3", False),
    (
        job(),
        [pod("Pending", waits("ImagePullBackOff", "not found"))],
        [],
        State.WAITING,
        "the image cannot be pulled: not found",
        False,
    ),
    (
        job(),
        [pod("Pending", waits("CreateContainerConfigError", 'secret "x" not found'))],
        [],
        State.WAITING,
        'a ConfigMap or Secret that the pod names is missing: secret "x"',
        False,
    ),
    (
        job(),
        [],
        [{"reason": "FailedCreate", "message": "exceeded quota: gpus"}],
        State.WAITING,
        "the namespace's quota is used up: exceeded quota",
        False,
    ),
    (
        job(),
        [pod("Pending", waits("ContainerCreating"))],
        [{"reason": "FailedMount", "message": "mount failed: exit status 32"}],
        State.WAITING,
        "a volume cannot be mounted: mount failed",
        False,
    ),
    (
        job(),
        [unplaced('0/1 nodes are available: persistentvolumeclaim "untaxed-runs" not found')],
        [],
        State.WAITING,
        "a volume claim that the pod names is missing or not bound: 0/1",
        False,
    ),
    (
        job(),
        [unplaced("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims")],
        [],
        State.WAITING,
        "a volume claim that the pod names is missing or not bound: 0/1",
        False,
    ),
    *(
        (
            job(),
            [pod("Pending", waits("ContainerCreating"))],
            [
                {
                    "reason": "FailedMount",
                    "message": f'MountVolume.SetUp failed: {kind} "x" not found',
                }
            ],
            State.WAITING,
            "a ConfigMap or Secret that the pod names is missing: MountVolume",
            False,
        )
        for kind in ("configmap", "secret")
    ),
    (
        job(),
        [],
        [{"reason": "FailedCreate", "message": 'serviceaccount "untaxed" not found'}],
        State.WAITING,
        "the cluster takes no pod of this Job: serviceaccount",
        False,
    ),
    (
        job(),
        [
            pod(
                "Pending",
                waits("PodInitializing"),
                **first(waits("CrashLoopBackOff", "back-off 5m")),
            )
        ],
        [],
        State.WAITING,
        "a server beside the stage ends again and again: back-off 5m",
        False,
    ),
    (
        job(),
        [pod("Pending", waits("PodInitializing"), **first({"running": {}}, started=False))],
        [],
        State.WAITING,
        "what it needs in its pod is not up yet: serve-base",
        False,
    ),
    (
        job(),
        [pod("Pending", waits("PodInitializing"), **first({"running": {}}, started=True))],
        [],
        State.WAITING,
        "",
        False,
    ),
    (
        POLICY,
        [pod("Failed", waits("PodInitializing"), **first(ended(65, message="merge: to run")))],
        [],
        State.FAILED,
        "data or an artifact is bad: merge: to run",
        False,
    ),
    (
        BACKOFF,
        [pod("Failed", ended(78), **first(ended(143)))],
        [],
        State.FAILED,
        "the recipe is bad",
        False,
    ),
    (POLICY, [pod("Failed", ended(78))], [], State.FAILED, "the recipe is bad", False),
    (POLICY, [pod("Failed", ended(65, message="a\nb"))], [], State.FAILED, "data or an", False),
    (BACKOFF, [pod("Failed", ended(143))], [], State.FAILED, "it was stopped and saved", True),
    (BACKOFF, [pod("Failed", ended(137, "OOMKilled"))], [], State.FAILED, "it ran out of", False),
    (BACKOFF, [pod("Failed", ended(137))], [], State.FAILED, "it was killed before", True),
    (
        BACKOFF,
        [pod("Failed", ended(137, message="out of memory: the kernel killed 1 process(es)"))],
        [],
        State.FAILED,
        "it ran out of memory",
        False,
    ),
    (
        BACKOFF,
        [pod("Failed", ended(137), conditions=[DISRUPTED])],
        [],
        State.FAILED,
        "its pod was evicted: PreemptionByScheduler",
        True,
    ),
    (
        BACKOFF,
        [pod("Failed", reason="Evicted", message="low on disk")],
        [],
        State.FAILED,
        "its pod was evicted: low on disk",
        True,
    ),
    (failed("DeadlineExceeded"), [], [], State.FAILED, "it took longer than its deadline", False),
    *(
        # a peer ends first, or the clock of its node says so
        (
            BACKOFF,
            [
                pod("Failed", ended(1, message="peer gone", at=f"2026-11-27T12:00:0{peer}Z")),
                pod("Failed", ended(143, at="2026-11-27T12:00:05Z"), conditions=[DISRUPTED]),
            ],
            [],
            State.FAILED,
            "its pod was evicted: PreemptionByScheduler",
            True,
        )
        for peer in (1, 9)
    ),
    (
        BACKOFF,
        [
            pod("Failed", ended(1, message="loss is nan", at="2026-11-27T12:00:01Z")),
            pod("Failed", ended(143, at="2026-11-27T12:00:05Z")),
        ],
        [],
        State.FAILED,
        "it failed: loss is nan",
        False,
    ),
    (BACKOFF, [], [], State.FAILED, "it failed: Job has reached the specified", False),
    (BACKOFF, [pod("Failed", ended(1))], [], State.FAILED, "it failed", False),
    (
        BACKOFF,
        [
            pod("Failed", ended(1, at="2026-11-27T12:00:09Z")),
            pod("Failed", ended(137, "OOMKilled", at="2026-11-27T12:00:01Z")),
        ],
        [],
        State.FAILED,
        "it ran out of memory",
        False,
    ),
]


@pytest.mark.parametrize(("said", "pods", "events", "state", "why", "again"), CASES)
def test_states_in_plain_words(
    said: Any, pods: Any, events: Any, state: State, why: str, again: bool
) -> None:
    seen = look(said, pods, events)
    assert seen.state == state and seen.again is again
    assert seen.why.startswith(why) if why else seen.why == ""
    assert bool(seen.why) == bool(seen.way_out)
    assert "\n" not in seen.why


@pytest.mark.parametrize(
    ("reason", "message", "why", "way_out"),
    [
        (
            "Inadmissible",
            "LocalQueue team doesn't exist",
            "queue team takes nothing: LocalQueue team doesn't exist",
            "have its LocalQueue made",
        ),
        (
            "Pending",
            "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu",
            "queue team has no room for it: couldn't assign flavors",
            "wait, ask for less",
        ),
        (None, "", "it waits in queue team", "Kueue lets it go"),
    ],
)
def test_what_a_queue_says(reason: str | None, message: str, why: str, way_out: str) -> None:
    held = {"type": "QuotaReserved", "status": "False", "reason": reason, "message": message}
    workload = {"status": {"conditions": [held] if reason else []}}
    seen = look(QUEUED, [], [], [workload])
    assert (seen.state, seen.again) == (State.WAITING, False)
    assert seen.why.startswith(why) and seen.way_out.startswith(way_out)
