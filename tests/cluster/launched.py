"""``untaxed launch`` on a cluster in miniature: real HTTP and the real client; pods end by a script.

A plugin of fixtures without asserts (PYTEST_DONT_REWRITE).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.minicluster import MiniCluster, running, status
from cluster.scripted import Scripted
from parts import ROOT

from pipeline import cli
from pipeline.cluster import api, launch
from pipeline.errors import UntaxedError
from pipeline.graph import stages_of
from pipeline.jobfile import load_job

JOB = ROOT / "jobs" / "quickstart.yaml"
LOCAL = ROOT / "k8s" / "overlays" / "local"
STAGES = stages_of(load_job(JOB))
OVERLAYS = {  # and the job that each is made for
    "local": "quickstart",
    "h100": "r1-qwen-14b",
    "a100-80g": "r1-qwen-14b",
    "h100-multinode": "r1-qwen-32b",
    "h100-vllm": "r1-qwen-14b-served",
}

Start = Callable[..., MiniCluster]


@pytest.fixture()
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A running cluster whose pods end by ``ends``."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(api, "POLL_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:

        def make(**ends: list[dict[str, Any]]) -> MiniCluster:
            cluster = MiniCluster(Scripted(ends))
            config = stack.enter_context(running(cluster, tmp_path))
            monkeypatch.setenv("KUBECONFIG", str(config))
            return cluster

        yield make


def untaxed(command: str, *more: str) -> int:
    return cli.main([command, str(JOB), "--overlay", str(LOCAL), *more])


def evicting(start: Start) -> MiniCluster:
    """Training is evicted once, and no pod of it is replaced alone, as over several nodes."""
    lost = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    evicted = status("Failed", 137) | {"conditions": [lost]}
    cluster = start(sft=[evicted, status("Succeeded", 0, message="sealed sft-1")])
    create = cluster.create

    def alone(kind: str, body: dict[str, Any]) -> dict[str, Any]:
        if kind == "Job" and "-sft-" in body["metadata"]["name"]:
            body["spec"]["backoffLimit"] = 0
            body["spec"].pop("podFailurePolicy")
        return create(kind, body)

    cluster.create = alone  # type: ignore[method-assign]
    return cluster


def beside(codes: list[int]) -> threading.Thread:
    """Another launcher, in a thread: without the signals that only a main thread may set."""
    options = cli.parser().parse_args(["launch", str(JOB), "--overlay", str(LOCAL)])

    def go() -> None:
        try:
            codes.append(cli.cluster(options))
        except UntaxedError as error:
            codes.append(error.exit_code)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


def stages_started(cluster: MiniCluster) -> list[str]:
    kubelet = cluster.kubelet
    assert isinstance(kubelet, Scripted)
    return [next(s for s in STAGES if f"-{s}-" in name) for name in kubelet.started]
