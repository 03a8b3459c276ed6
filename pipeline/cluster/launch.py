"""Launching a job: one Job a stage, watched to its end, by a launcher that may be killed at any time.

What runs is read from the cluster each time: Jobs are named by what they do, so a second launcher
follows what the first one started, and two at once make no Job twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.cluster.objects import (
    ATTEMPT_LABEL,
    CLOSED,
    JOB_LABEL,
    KEY_LABEL,
    PART,
    QUEUE,
    TRACKING,
    Manifest,
    Overlay,
    key_of,
    otherwise,
    stage_objects,
    tracking_objects,
)
from pipeline.cluster.words import Seen, State, look
from pipeline.errors import DataError, RecipeError, UntaxedError
from pipeline.origin import revision
from pipeline.recipes import Job

if TYPE_CHECKING:
    from pipeline.cluster.api import Cluster

POLL_SECONDS = 5.0
RESUMED = 20  # evictions of one stage that a launcher goes on after by itself
LAST_LINES = 20
OTHER_CODE = "other code: "  # as docker/entrypoint.py begins what it says of revisions


@dataclass(frozen=True)
class Sight:
    """One look at one stage."""

    stage: str
    name: str
    attempt: int
    seen: Seen
    pods: Sequence[Manifest] = ()
    line: str = ""


@dataclass
class Launcher:
    """``watch`` gets every look."""

    cluster: Cluster
    overlay: Overlay
    job: Job
    text: str
    watch: Callable[[Sight], None]
    say: Callable[[str], None]
    again: bool = False
    _resumed: dict[str, int] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def run(self, stages: Sequence[str]) -> None:
        """All ``stages`` to their ends. DataError where one failed and would fail again."""
        self.stand()
        for stage in stages:
            self._stage(stage)
        self._track(stages)

    def stand(self) -> None:
        """What stands beside the Jobs. RecipeError where the cluster has it otherwise, and that matters."""
        for manifest in self.make(self.overlay.standing):
            if manifest["kind"] not in ("NetworkPolicy", "PersistentVolumeClaim"):
                continue
            there = self.cluster.read(manifest)
            what = f"{manifest['kind']} {manifest['metadata']['name']}"
            if there is None:
                self.say(f"{what}: is there and cannot be read; not known to be the overlay's")
            elif wrong := otherwise(manifest, there):
                raise RecipeError(
                    f"{what}: is there, and {wrong}; kubectl apply the overlay's, or delete it, and"
                    " launch again"
                )

    def make(self, objects: Sequence[Manifest]) -> list[Manifest]:
        """Those that are not there yet; returns the others."""
        there = []
        for manifest in objects:
            if self.cluster.create(manifest):
                self.say(f"{manifest['kind']} {manifest['metadata']['name']}: made")
            else:
                there.append(manifest)
        return there

    def unfinished(self) -> list[Manifest]:
        """Jobs of this job file's name that run or wait, whatever their keys."""
        return [
            one
            for one in self.cluster.jobs({JOB_LABEL: self.job.name})
            if look(one, (), ()).state not in (State.COMPLETE, State.FAILED)
        ]

    def sight(self, stage: str) -> Sight:
        """The latest attempt of ``stage`` under its present key."""
        key = key_of(self.job, stage, self.overlay.jobs[stage])
        labels = {JOB_LABEL: self.job.name, PART: stage, KEY_LABEL: key}
        attempts = {
            int(j["metadata"]["labels"][ATTEMPT_LABEL]): j for j in self.cluster.jobs(labels)
        }
        if not attempts:
            return Sight(stage, "", 0, look(None, (), ()))
        attempt = max(attempts)
        name = attempts[attempt]["metadata"]["name"]
        pods = self.cluster.pods(name)
        names = {name, *(pod["metadata"]["name"] for pod in pods)}
        latest = attempts[attempt]
        queued = latest["spec"].get("suspend") and QUEUE in latest["metadata"]["labels"]
        workloads = self.cluster.workloads(latest) if queued else None
        seen = look(latest, pods, self.cluster.events(names), workloads)
        return Sight(stage, name, attempt, seen, pods, self._line(pods))

    def _stage(self, stage: str) -> None:
        began_here = False
        while True:
            sight = self.sight(stage)
            self.watch(sight)
            state = sight.seen.state
            if state == State.COMPLETE:
                self._check_sealed(sight)
                return
            if state == State.ABSENT and began_here:
                raise UntaxedError(
                    f"{stage}: its Job was deleted while it was watched; launch again to go on"
                )
            if state == State.ABSENT:
                self._alone(stage)
                self._submit(stage, 1)
                began_here = True
            elif state == State.FAILED:
                self._go_on(sight, began_here)
                began_here = True
            else:
                began_here = True
                time.sleep(POLL_SECONDS)

    def _go_on(self, sight: Sight, began_here: bool) -> None:
        """The next attempt of what was stopped from outside, or is asked for; else DataError."""
        stage, seen = sight.stage, sight.seen
        if seen.again and self._resumed.get(stage, 0) < RESUMED:
            self._resumed[stage] = self._resumed.get(stage, 0) + 1
            self.say(f"{stage}: {seen.why}; going on as attempt {sight.attempt + 1}")
        elif self.again and not began_here:
            self.say(f"{stage}: {seen.why}; again, as attempt {sight.attempt + 1}")
        else:
            for line in self._last_lines(sight.pods):
                self.say(f"  {line}")
            before = "" if began_here else "has failed before: "
            raise DataError(
                f"{stage} (Job {sight.name}): {before}{seen.why}; {seen.way_out}"
                + ("" if began_here else ", or launch with --again to try the same once more")
            )
        self._submit(stage, sight.attempt + 1)

    def _alone(self, stage: str) -> None:
        """RecipeError where ``stage`` goes on under another key: both would want the same folder."""
        # another launcher may just have made it under this key
        own = key_of(self.job, stage, self.overlay.jobs[stage])
        for one in self.unfinished():
            labels = one["metadata"]["labels"]
            if labels[PART] == stage and labels[KEY_LABEL] != own:
                raise RecipeError(
                    f"{stage}: Job {one['metadata']['name']} has not ended, and is of another recipe or"
                    " overlay; wait for it, untaxed cancel it, or launch this as a job of another name"
                )

    def _submit(self, stage: str, attempt: int) -> None:
        here = revision()
        for one in stage_objects(self.overlay, self.job, self.text, stage, attempt, here):
            self.cluster.create(one)

    def _track(self, stages: Sequence[str]) -> None:
        """Have the tracking server told of what ran without network. Nobody waits for that: it is tried
        again by the Job, and by the next stage that reaches the server."""
        closed = [stage for stage in stages if stage in CLOSED]
        if not closed or not self.cluster.has_config_map(TRACKING):
            return
        key = key_of(self.job, closed[-1], self.overlay.jobs[closed[-1]])
        attempt = max(1, self.sight(closed[-1]).attempt)
        labels = {JOB_LABEL: self.job.name, PART: "track", KEY_LABEL: key}
        before = {int(j["metadata"]["labels"][ATTEMPT_LABEL]): j for j in self.cluster.jobs(labels)}
        if before:
            latest = before[max(before)]
            pods = self.cluster.pods(latest["metadata"]["name"])
            seen = look(latest, pods, ())
            if seen.state == State.FAILED:
                self.say(f"tracking: Job {latest['metadata']['name']}: {seen.why}; once more")
                attempt = max(before) + 1
        objects = tracking_objects(self.overlay, self.job, self.text, key, attempt)
        if [self.cluster.create(manifest) for manifest in objects][-1]:
            self.say(
                f"tracking: Job {objects[-1]['metadata']['name']} tells of {', '.join(closed)}"
            )

    def _check_sealed(self, sight: Sight) -> None:
        """A stage that ends well says what it sealed; pods that are gone said it to another launcher."""
        said = [
            str(state["state"]["terminated"].get("message") or "")
            for pod in sight.pods
            for state in pod["status"].get("containerStatuses") or ()
            if state.get("state", {}).get("terminated")
        ]
        for text in said:
            _, mark, other = text.partition(OTHER_CODE)
            if mark and other not in self._told:  # once, not once a stage
                self._told.add(other)
                self.say(f"{sight.stage}: {mark}{other}")
        if said and not any(f"{sight.stage}-" in text for text in said):
            raise UntaxedError(
                f"{sight.stage} (Job {sight.name}): complete, and says of no sealed artifact; see"
                f" untaxed logs --stage {sight.stage}"
            )

    def _line(self, pods: Sequence[Manifest]) -> str:
        """What the first pod that runs printed last."""
        running = [p for p in pods if p["status"].get("phase") == "Running"]
        lines = self.cluster.log(running[0]["metadata"]["name"], 1) if running else []
        return lines[-1] if lines else ""

    def _last_lines(self, pods: Sequence[Manifest]) -> list[str]:
        failed = [p for p in pods if p["status"].get("phase") == "Failed"] or list(pods)
        return self.cluster.log(failed[0]["metadata"]["name"], LAST_LINES) if failed else []
