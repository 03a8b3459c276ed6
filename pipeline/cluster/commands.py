"""``untaxed launch``, ``status``, ``logs`` and ``cancel``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from rich.console import Console

from pipeline.cluster.jobset import jobset_objects
from pipeline.cluster.launch import Launcher, Sight
from pipeline.cluster.objects import PART, Overlay, read_overlay, stage_objects
from pipeline.cluster.rules import mistakes
from pipeline.cluster.screen import Screen
from pipeline.cluster.words import State
from pipeline.errors import DataError, RecipeError
from pipeline.graph import stages_of
from pipeline.origin import revision
from pipeline.recipes import Job

FOLLOW_SECONDS = 2.0
ALL_LINES = 10_000
MOST_TOLD = 3


def launch(options: argparse.Namespace, job: Job, text: str) -> int:
    """All stages of the job on the cluster, or with ``--dry-run`` the objects that would be made."""
    overlay = read_overlay(options.overlay)
    stages = _stages(options, job)
    here = revision()
    made = [o for s in stages for o in stage_objects(overlay, job, text, s, revision=here)]
    wrong = mistakes([*overlay.standing, *made])
    if wrong:
        more = f" (and {len(wrong) - MOST_TOLD} more)" if wrong[MOST_TOLD:] else ""
        raise RecipeError(f"--overlay {options.overlay}: {'; '.join(wrong[:MOST_TOLD])}{more}")
    if options.jobset:
        made = list(jobset_objects(overlay, job, text, stages))
    if options.dry_run:
        unique = {(one["kind"], one["metadata"]["name"]): one for one in made}
        yaml.safe_dump_all([*overlay.standing, *unique.values()], sys.stdout, sort_keys=False)
        return 0
    console = Console(stderr=True)
    screen = Screen(console, stages)
    launcher = _launcher(options, overlay, job, text, screen.show, screen.say)
    if options.jobset:
        launcher.stand()
        launcher.make(made)
        screen.say(
            f"JobSet {made[-1]['metadata']['name']} runs; untaxed status tells how far it is"
        )
        return 0
    with screen.on():
        launcher.run(stages)
    return 0


def status(options: argparse.Namespace, job: Job, text: str) -> int:
    """How far each stage is."""
    screen = Screen(Console(), _stages(options, job))
    launcher = _launcher(options, read_overlay(options.overlay), job, text, screen.show, screen.say)
    sights = [launcher.sight(stage) for stage in _stages(options, job)]
    screen.sights |= {sight.stage: sight for sight in sights}
    screen.console.print(screen.table())
    told = {sight.name for sight in sights}
    for one in launcher.unfinished():
        if one["metadata"]["name"] not in told and not options.stage:
            screen.console.print(f"also: Job {one['metadata']['name']} has not ended")
    return 0


def logs(options: argparse.Namespace, job: Job, text: str) -> int:
    """What the pods of the latest stage, or of ``--stage``, print; with ``--follow`` to their end."""
    launcher = _launcher(options, read_overlay(options.overlay), job, text, _nothing, print)
    sights = [launcher.sight(stage) for stage in _stages(options, job)]
    there = [sight for sight in sights if sight.pods]
    if not there:
        raise DataError(f"{job.name}: no pod of {', '.join(_stages(options, job))} is there")
    stage, told = there[-1].stage, dict[str, int]()
    while True:
        sight = launcher.sight(stage)
        for pod in sight.pods:
            name = pod["metadata"]["name"]
            lines = launcher.cluster.log(name, ALL_LINES)
            for line in lines[told.get(name, 0) :]:
                print(f"{name}: {line}" if len(sight.pods) > 1 else line)
            told[name] = len(lines)
        if not options.follow or sight.seen.state not in (State.RUNNING, State.WAITING):
            return 0
        time.sleep(FOLLOW_SECONDS)


def cancel(options: argparse.Namespace, job: Job, text: str) -> int:
    """Delete the Jobs that run or wait, also those of an earlier recipe or overlay: their pods are asked
    to stop and save their place."""
    launcher = _launcher(options, read_overlay(options.overlay), job, text, _nothing, print)
    stopped = [
        (one["metadata"]["labels"][PART], one["metadata"]["name"])
        for one in launcher.unfinished()
        if not options.stage or one["metadata"]["labels"][PART] in options.stage
    ]
    for stage, name in stopped:
        launcher.cluster.delete_job(name)
        print(f"{stage}: {name} is stopped; launch again to go on")
    if not stopped:
        print(f"{job.name}: nothing runs")
    return 0


def _launcher(
    options: argparse.Namespace,
    overlay: Overlay,
    job: Job,
    text: str,
    watch: Callable[[Sight], None],
    say: Callable[[str], None],
) -> Launcher:
    from pipeline.cluster.api import Cluster  # the client takes a second to import

    cluster = Cluster(overlay.namespace, options.context, say)
    again = bool(getattr(options, "again", False))
    return Launcher(cluster, overlay, job, text, watch, say, again)


def _stages(options: argparse.Namespace, job: Job) -> Sequence[str]:
    has = stages_of(job)
    lost = [stage for stage in options.stage if stage not in has]
    if lost:
        raise RecipeError(f"--stage {lost[0]}: {job.name} has {', '.join(has)}")
    return [stage for stage in has if not options.stage or stage in options.stage]


def _nothing(sight: Sight) -> None:
    """For who only asks."""


def add_options(command: argparse.ArgumentParser) -> None:
    """What all four have in common."""
    command.add_argument("job", type=Path, help="job file")
    command.add_argument(
        "--overlay", type=Path, required=True, help="folder of k8s/overlays, or your own"
    )
    command.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    command.add_argument(
        "--stage", action="append", default=[], help="this stage only; may be repeated"
    )
    command.add_argument("--context", help="of kubeconfig; default: the current one")
