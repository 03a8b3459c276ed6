"""What a Job, its pods and their events say, in plain words, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.cluster.objects import QUEUE
from pipeline.errors import DataError, RecipeError, Stopped

Manifest = dict[str, Any]
SIGKILL = 137
NO_MEMORY = "out of memory"  # how the entry point begins its last words
ABSENT = re.compile(r'(configmap|secret|persistentvolumeclaim) "[^"]*" not found')


class State(StrEnum):
    """How far a Job is."""

    ABSENT = "absent"
    WAITING = "waiting"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Seen:
    """``why`` and ``way_out`` are empty where all is as it should be. ``again``: of a failed Job,
    whether the same thing may go better the next time."""

    state: State
    why: str = ""
    way_out: str = ""
    again: bool = False


@dataclass(frozen=True)
class Word:
    """What one reason means."""

    why: str
    way_out: str
    again: bool = False


MISSING = Word(
    "a ConfigMap or Secret that the pod names is missing", "create it; the pod then starts"
)
NO_CLAIM = Word(
    "a volume claim that the pod names is missing or not bound",
    "apply the overlay's claims and see kubectl get pvc; the pod then starts",
)
NO_ROOM = Word("no node has room for it", "free one, or ask for less in the overlay")
QUOTA = Word("the namespace's quota is used up", "raise the quota, or ask for less")
WAITING = {
    "ImagePullBackOff": Word("the image cannot be pulled", "push it, or name it in the overlay"),
    "ErrImagePull": Word("the image cannot be pulled", "push it, or name it in the overlay"),
    "ErrImageNeverPull": Word("the image is not on the node", "load it there, or let it be pulled"),
    "InvalidImageName": Word("the image's name is not a name", "mend it in the overlay"),
    "CreateContainerConfigError": MISSING,
    "CreateContainerError": Word("the container cannot be made", "see kubectl describe pod"),
    "RunContainerError": Word("the container cannot be started", "see kubectl describe pod"),
    "CrashLoopBackOff": Word(
        "a server beside the stage ends again and again", "see kubectl logs POD -c its name"
    ),
}
SUSPENDED = Word("it is suspended", "a queue lets it go when it has room")
NO_KUEUE = Word(
    "it is labelled for Kueue, and the cluster has none",
    "install Kueue, or leave components/kueue out of the overlay",
)
STARTING = Word("what it needs in its pod is not up yet", "wait: a server has to load its model")
EVENTS = {
    "FailedMount": Word("a volume cannot be mounted", "see that the claim is bound and free"),
    "FailedAttachVolume": Word(
        "a volume is still attached to another node", "wait, or use a claim that is ReadWriteMany"
    ),
    "FailedCreate": Word("the cluster takes no pod of this Job", "mend what it names"),
}
EXITS = {
    RecipeError.exit_code: Word("the recipe is bad", "mend the job file and launch again"),
    DataError.exit_code: Word("data or an artifact is bad", "mend what it names and launch again"),
    Stopped.exit_code: Word("it was stopped and saved its place", "launch again to go on", True),
}
EVICTED = Word("its pod was evicted", "launch again: it goes on where it was", True)
KILLED = Word("it was killed before it could end", "launch again: it goes on where it was", True)
OUT_OF_MEMORY = Word(
    "it ran out of memory",
    "raise the memory of the stage in the overlay, or lower batch_rows or micro-batch",
)
LATE = Word(  # what hangs once may hang each time, for as long as a deadline allows
    "it took longer than its deadline",
    "raise activeDeadlineSeconds in the overlay and launch again; it goes on there",
)
ELSE = Word("it failed", "see its last lines")


def look(
    job: Manifest | None,
    pods: Sequence[Manifest],
    events: Sequence[Manifest],
    workloads: Sequence[Manifest] | None = None,
) -> Seen:
    """The state of one Job, from what the cluster says of it; ``workloads``: what Kueue has made of it,
    None where there is no Kueue."""
    if job is None:
        return Seen(State.ABSENT)
    for condition in job.get("status", {}).get("conditions") or ():
        if condition["status"] == "True" and condition["type"] == "Complete":
            return Seen(State.COMPLETE)
        if condition["status"] == "True" and condition["type"] == "Failed":
            return _failed(condition, pods)
    if any(pod["status"].get("phase") == "Running" for pod in pods):
        return Seen(State.RUNNING)
    if job["spec"].get("suspend"):
        return _suspended(job, workloads)
    return _waiting(pods, events)


def _failed(condition: Manifest, pods: Sequence[Manifest]) -> Seen:
    if condition.get("reason") == "DeadlineExceeded":
        return _seen(State.FAILED, LATE, condition.get("message", ""))
    # What names a cause tells more than what followed from it, whatever the clocks of the nodes say;
    # of the rest, peers of a pod that failed are killed or time out after it: the first tells why.
    for _, word, detail in sorted(_ended(pods), key=lambda end: (_rank(end[1]), end[0])):
        return _seen(State.FAILED, word, detail)
    return _seen(State.FAILED, ELSE, condition.get("message", ""))


def _ended(pods: Sequence[Manifest]) -> Iterator[tuple[str, Word, str]]:
    """Of each pod that failed: when, why, and its last words."""
    for pod in pods:
        status = pod["status"]
        conditions = status.get("conditions") or ()
        disrupted = next((c for c in conditions if c["type"] == "DisruptionTarget"), None)
        terminated = [
            state["state"]["terminated"]
            for state in _containers(pod)
            if state.get("state", {}).get("terminated")
        ]
        when = min((t.get("finishedAt") or "" for t in terminated), default="")
        if disrupted is not None and disrupted["status"] == "True":
            yield when, EVICTED, disrupted.get("message", disrupted.get("reason", ""))
        elif status.get("reason") == "Evicted":
            yield when, EVICTED, status.get("message", "")
        for end in terminated:
            if end["exitCode"] != 0:
                yield when, _exit(end), " ".join(str(end.get("message") or "").split())


def _rank(word: Word) -> int:
    if word in (EXITS[RecipeError.exit_code], EXITS[DataError.exit_code], OUT_OF_MEMORY):
        return 0
    return 1 if word == EVICTED else 2


def _containers(pod: Manifest) -> list[Manifest]:
    """What is told of each: the stage first, whose end is the pod's, then what starts before it."""
    status = pod["status"]
    return [
        *(status.get("containerStatuses") or ()),
        *(status.get("initContainerStatuses") or ()),
    ]


def _exit(end: Manifest) -> Word:
    if end.get("reason") == "OOMKilled" or str(end.get("message") or "").startswith(NO_MEMORY):
        return OUT_OF_MEMORY
    if end["exitCode"] == SIGKILL:
        return KILLED
    return EXITS.get(end["exitCode"], ELSE)


def _suspended(job: Manifest, workloads: Sequence[Manifest] | None) -> Seen:
    """Why a queue has not let it go yet, in Kueue's own words where it has said some."""
    queue = job.get("metadata", {}).get("labels", {}).get(QUEUE)
    if queue is None:
        return _seen(State.WAITING, SUSPENDED, "")
    if workloads is None:
        return _seen(State.WAITING, NO_KUEUE, "")
    conditions = [c for one in workloads for c in one.get("status", {}).get("conditions") or ()]
    held = [c for c in conditions if c["type"] == "QuotaReserved" and c["status"] == "False"]
    if held and held[-1].get("reason") == "Inadmissible":
        word = Word(
            f"queue {queue} takes nothing",
            "have its LocalQueue made in the namespace, or correct its name in the overlay",
        )
        return _seen(State.WAITING, word, held[-1].get("message", ""))
    if held:
        word = Word(
            f"queue {queue} has no room for it", "wait, ask for less, or have its quota raised"
        )
        return _seen(State.WAITING, word, held[-1].get("message", ""))
    return _seen(State.WAITING, Word(f"it waits in queue {queue}", "Kueue lets it go"), "")


def _waiting(pods: Sequence[Manifest], events: Sequence[Manifest]) -> Seen:
    for pod in pods:
        for condition in pod["status"].get("conditions") or ():
            unplaced = condition["type"] == "PodScheduled" and condition["status"] == "False"
            if unplaced:
                said = condition.get("message", "")
                word = NO_CLAIM if "persistentvolumeclaim" in said.lower() else NO_ROOM
                return _seen(State.WAITING, word, said)
        for container in _containers(pod):
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in WAITING:
                return _seen(State.WAITING, WAITING[waiting["reason"]], waiting.get("message", ""))
        for container in pod["status"].get("initContainerStatuses") or ():
            if "running" in container.get("state", {}) and not container.get("started"):
                return _seen(State.WAITING, STARTING, container["name"])
    for event in reversed(events):
        if event.get("reason") in EVENTS:
            return _seen(State.WAITING, _word(event), event.get("message", ""))
    return Seen(State.WAITING)


def _word(event: Manifest) -> Word:
    """What an event means, which its message may say better than its reason."""
    said = event.get("message", "")
    if "exceeded quota" in said:
        return QUOTA
    if event["reason"] == "FailedMount" and ABSENT.search(said):
        return NO_CLAIM if "persistentvolumeclaim" in said else MISSING
    return EVENTS[event["reason"]]


def _seen(state: State, word: Word, detail: str) -> Seen:
    told = f"{word.why}: {' '.join(detail.split())}" if detail.strip() else word.why
    return Seen(state, told, word.way_out, word.again)
