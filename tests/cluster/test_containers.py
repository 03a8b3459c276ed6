"""The real launcher and the real image: pods are containers, and all of a small job runs in them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.minicluster import Manifest, MiniCluster, running
from cluster.podman import USER, Podman, missing, wait_for
from parts import ROOT, make_model, make_tokenizer, sample_rows

from pipeline.cluster.objects import PART

pytestmark = [pytest.mark.containers, pytest.mark.skipif(bool(missing()), reason=missing())]
LOCAL = ROOT / "k8s" / "overlays" / "local"
STAGES = ["prep", "anchor", "pack", "sft", "choose", "merge", "baseline", "eval"]
SUITES = [
    {"name": "harmful", "measures": "harmful", "source": "dev.jsonl", "max_new_tokens": 4},
    {"name": "ordinary", "measures": "benign", "source": "sample:ordinary", "limit": 4}
    | {"where": {"split": "heldout"}, "max_new_tokens": 4},
]
JOB: dict[str, Any] = {
    "name": "small",
    "base": {"source": "base"},
    "prep": {
        "sources": [
            {"name": "harmful", "kind": "refusal", "source": "rows.jsonl"},
            {"name": "benign", "kind": "anchor", "source": "sample:ordinary", "limit": 8}
            | {"where": {"split": "train"}},
        ],
        "dev_fraction": 0.2,
    },
    "anchor": {"max_new_tokens": 4, "truncated": "keep"},
    "sft": {
        "lora": {"rank": 2, "targets": ["up_proj"], "layers": {"first": 2, "last": 4}},
        "optimizer": {"learning_rate": 0.02},
        "batch": {"rows": 4},
        "epochs": 12,
        "precision": "fp32",
        "anchors": {"objective": "kl"},
    },
    "choose": {
        "scales": [1.0],
        "wanted": [{"metric": "benign_refusal", "at_most": 1.0}],
    },
    "eval": {"suites": SUITES, "gate": [{"metric": "benign_refusal", "at_most": 1.0}]},
    "execution": {"checkpoint_seconds": 1},
}
TWO_PODS = {
    "completions": 2,
    "parallelism": 2,
    "backoffLimit": 0,
    "template": {
        "spec": {
            "containers": [
                {
                    "name": "stage",
                    "env": [
                        {"name": "PET_NNODES", "value": "2"},
                        {"name": "PET_NPROC_PER_NODE", "value": "1"},
                    ],
                }
            ]
        }
    },
}


@dataclass
class Place:
    """A cluster with the claims of one test, and the job and overlay that are launched there."""

    folder: Path
    cluster: MiniCluster
    kubelet: Podman
    job: Path
    overlay: Path

    @property
    def runs(self) -> Path:
        return self.kubelet.claim("untaxed-runs")

    def launch(self, *more: str) -> tuple[int, str]:
        done = subprocess.run(self.words(*more), cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def begin(self, *more: str) -> subprocess.Popen[bytes]:
        """A launcher that is not waited for."""
        with (self.folder / "launcher.log").open("ab") as log:
            return subprocess.Popen(self.words(*more), cwd=ROOT, stdout=log, stderr=log)

    def said(self) -> str:
        """By launchers that were not waited for."""
        return (self.folder / "launcher.log").read_text()

    def words(self, *more: str) -> list[str]:
        options = ["launch", str(self.job), "--overlay", str(self.overlay), *more]
        return [sys.executable, "-m", "pipeline.cli", *options]

    def pods(self, stage: str) -> list[Manifest]:
        found = self.cluster.every("Pod")
        return [pod for pod in found if pod["metadata"]["labels"][PART] == stage]

    def sealed(self, stage: str) -> Path:
        return next(f for f in self.runs.glob(f"{stage}-*") if (f / "manifest.json").exists())

    def adapter(self) -> dict[str, bytes]:
        """All files of the last epoch, but those that say when and where."""
        folder = self.sealed("sft")
        files = [f for f in folder.rglob("*.safetensors") if f.is_file()]
        assert files
        return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@dataclass
class Whole:
    """What was seen of a whole job whose launcher was killed, and what it left on its claims."""

    said: str
    jobs: list[str]
    pods: dict[str, list[Manifest]]
    place: Place


@contextmanager
def own_place(folder: Path) -> Iterator[Place]:
    """A cluster of its own, with an empty claim for runs and a model and rows on the other."""
    kubelet = Podman(folder, f"mini-{uuid.uuid4().hex[:8]}")
    cluster = kubelet.cluster = MiniCluster(kubelet)
    data = kubelet.claim("untaxed-data")
    make_model(data / "base")
    make_tokenizer(data / "base")
    for name, rows in (("rows", sample_rows("harmful")[:16]), ("dev", sample_rows("harmful")[-4:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in data.rglob("*"):
        os.chown(file, USER, USER)
    job = folder / "small.yaml"
    job.write_text(yaml.safe_dump(JOB, sort_keys=False))
    try:
        with running(cluster, folder, pause=0.2) as config, pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(config))
            yield Place(folder, cluster, kubelet, job, own_overlay(folder, {}))
    finally:
        kubelet.close()


@pytest.fixture()
def place(tmp_path: Path) -> Iterator[Place]:
    with own_place(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with own_place(tmp_path_factory.mktemp("whole")) as place:
        first = place.begin()
        wait_for(lambda: place.pods("anchor") or first.poll(), 240, "a pod of anchor")
        assert first.poll() is None, place.said()
        first.send_signal(signal.SIGKILL)
        first.wait()
        code, said = place.launch()
        assert code == 0, said
        jobs = [job["metadata"]["name"] for job in place.cluster.every("Job")]
        yield Whole(said, jobs, {stage: place.pods(stage) for stage in STAGES}, place)


def own_overlay(folder: Path, changes: dict[str, Manifest]) -> Path:
    """The local overlay with the spec of some stages' Jobs changed."""
    own = folder / f"overlay-{len(list(folder.glob('overlay-*')))}"
    own.mkdir()
    base = os.path.relpath(LOCAL, own)
    patches = [
        {
            "target": {"kind": "Job", "name": stage},
            "patch": yaml.safe_dump(
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": stage}, "spec": spec}
            ),
        }
        for stage, spec in changes.items()
    ]
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [base], "patches": patches})
    )
    return own


def only(*stages: str) -> list[str]:
    return [word for stage in stages for word in ("--stage", stage)]


def memory(text: str) -> Manifest:
    """The spec of a Job whose container may use no more."""
    asked = {"cpu": "2", "memory": text, "ephemeral-storage": "2Gi"}
    pod = {
        "containers": [{"name": "stage", "resources": {"requests": asked, "limits": asked}}],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    }
    return {"template": {"spec": pod}}


def test_a_whole_job_with_a_launcher_that_is_killed(whole: Whole) -> None:
    assert [line for line in whole.said.splitlines() if line.endswith(": complete")] == [
        f"{stage}: complete" for stage in STAGES
    ]
    assert len(whole.jobs) == len(STAGES), whole.jobs
    assert all(len(pods) == 1 for pods in whole.pods.values())
    assert all(whole.place.sealed(stage) for stage in STAGES)


@pytest.mark.parametrize("evicted", [False, True])
def test_two_pods_equal_two_processes(whole: Whole, place: Place, evicted: bool) -> None:
    """ZeRO-3, the same world size and threads: the adapters are the same bytes."""
    for folder in whole.place.runs.iterdir():
        if folder.name.split("-")[0] in ("adopted", "base", "prep", "anchor", "pack"):
            subprocess.run(["cp", "-a", folder, place.runs], check=True)
    place.overlay = own_overlay(place.folder, {"sft": TWO_PODS})
    launcher = place.begin(*only("sft"))
    if evicted:
        pods = wait_for(lambda: going(place), 180, "a checkpoint and two pods that train")
        place.kubelet.evict(pods[1], grace=20)
    assert launcher.wait(400) == 0, place.said()
    assert place.adapter() == whole.place.adapter()
    pods = place.pods("sft")
    ended = [pod["status"]["phase"] for pod in pods]
    assert ended.count("Succeeded") == 2 and (len(ended) > 2) == evicted
    resumed = any("going on after step" in place.kubelet.log(pod) for pod in pods)
    assert resumed == evicted


def going(place: Place) -> list[Manifest]:
    """The pods of two-pod training once a checkpoint is there."""
    pods = [p for p in place.pods("sft") if p["status"]["phase"] == "Running"]
    saved = list(place.runs.glob(".sft-*/**/checkpoint-*"))
    return pods if len(pods) == 2 and saved else []


def test_too_little_memory_is_told_and_not_hidden(place: Place) -> None:
    place.overlay = own_overlay(place.folder, {"prep": memory("64Mi") | {"backoffLimit": 0}})
    code, said = place.launch()
    assert code != 0
    assert "it ran out of memory" in said and "raise the memory of the stage" in said


def test_bad_data_is_not_tried_again(place: Place) -> None:
    rows = place.kubelet.claim("untaxed-data") / "rows.jsonl"
    rows.write_text('{"prompt": ""}\n')
    code, said = place.launch()
    assert code == 65, said
    assert len(place.pods("prep")) == 1
    assert "rows.jsonl" in said


PROBE = """
import errno, json, os, pathlib
def written(folder):
    try:
        pathlib.Path(folder, "probe").touch()
    except OSError as error:
        return errno.errorcode[error.errno]
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
said = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
folders = ("/", "/opt/untaxed", "/var/tmp", "/data", "/tmp", "/dev/shm", "/runs")
print(json.dumps([os.getresuid(), said, {folder: written(folder) for folder in folders}]))
"""


def test_what_pods_may_not_do(place: Place) -> None:
    """Root, a writable root file system and capabilities: a container in place of prep has none."""
    stage = {"name": "stage", "args": ["python3", "-c", PROBE]}
    spec = {"backoffLimit": 0, "template": {"spec": {"containers": [stage]}}}
    place.overlay = own_overlay(place.folder, {"prep": spec})
    _, told = place.launch(*only("prep"))
    assert "says of no sealed artifact" in told, told
    users, said, written = json.loads(place.kubelet.log(place.pods("prep")[0]))
    assert users == [USER] * 3 and said["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(said[name], 16) == 0, name
    refused = {folder for folder, error in written.items() if error == "EROFS"}
    assert refused == {"/", "/opt/untaxed", "/var/tmp", "/data"}
    assert [folder for folder, error in written.items() if error is None] == [
        "/tmp",
        "/dev/shm",
        "/runs",
    ]
