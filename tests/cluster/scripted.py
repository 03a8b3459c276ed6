"""A kubelet without containers, for the cluster in miniature."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cluster.minicluster import Manifest, status


class Scripted:
    """How the pods of a stage end, one after the other, is given.

    ``ends``: by stage, a status for each pod in turn, the last one for all that follow; a callable gets
    the pod. What a stage of the pipeline would say when it seals is said unless the script says more.
    """

    def __init__(self, ends: dict[str, list[Manifest]] | None = None, looks: int = 2) -> None:
        self.ends, self.looks = ends or {}, looks
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.seen: dict[str, int] = {}
        self.scripts: dict[str, Iterator[Manifest]] = {}
        self.mine: dict[str, Manifest] = {}

    def start(self, pod: Manifest) -> None:
        name = pod["metadata"]["name"]
        stage = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        self.started.append(name)
        script = self.ends.get(stage, [status("Succeeded", 0, message=f"sealed {stage}-0123")])
        turn = self.scripts.setdefault(
            stage, itertools.chain(script[:-1], itertools.repeat(script[-1]))
        )
        self.mine[name] = next(turn)

    def look(self, pod: Manifest) -> Manifest:
        name = pod["metadata"]["name"]
        self.seen[name] = self.seen.get(name, 0) + 1
        if self.mine[name]["phase"] in ("Pending", "Running"):
            return self.mine[name]
        return self.mine[name] if self.seen[name] > self.looks else status("Running")

    def stop(self, pod: Manifest) -> None:
        self.stopped.append(pod["metadata"]["name"])

    def log(self, pod: Manifest) -> str:
        return f"{pod['metadata']['name']} says hello\nand goes on\n"
