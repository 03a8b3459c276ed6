"""Planted mistakes in the objects of a launch: each is found, and sound objects are left in peace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from parts import ROOT

from pipeline.cluster.objects import read_overlay, stage_objects
from pipeline.cluster.rules import amount, mistakes
from pipeline.graph import stages_of
from pipeline.jobfile import load_job

# but that with a JobSet in place of Jobs, which is made of the local one
OVERLAYS = sorted({path.name for path in (ROOT / "k8s" / "overlays").iterdir()} - {"jobset"})
Objects = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sound() -> list[dict[str, Any]]:
    overlay = read_overlay(ROOT / "k8s" / "overlays" / "h100-multinode")
    path = ROOT / "jobs" / "r1-qwen-32b.yaml"
    made = stage_objects(overlay, load_job(path), path.read_text(encoding="utf-8"), "sft")
    return [*overlay.standing, *made]


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_the_project_ships_is_sound(name: str) -> None:
    overlay = read_overlay(ROOT / "k8s" / "overlays" / name)
    served = (ROOT / "k8s" / "overlays" / name / "kustomization.yaml").read_text()
    path = ROOT / "jobs" / f"{'r1-qwen-14b-served' if 'vllm' in served else 'r1-qwen-32b'}.yaml"
    job, text = load_job(path), path.read_text(encoding="utf-8")
    for stage in stages_of(job):
        assert mistakes([*overlay.standing, *stage_objects(overlay, job, text, stage)]) == []


def spec(made: Objects) -> dict[str, Any]:
    found: dict[str, Any] = made["Job"]["spec"]
    return found


def pod(made: Objects) -> dict[str, Any]:
    found: dict[str, Any] = spec(made)["template"]["spec"]
    return found


def box(made: Objects) -> dict[str, Any]:
    found: dict[str, Any] = pod(made)["containers"][0]
    return found


def env(made: Objects, name: str) -> dict[str, Any]:
    (found,) = [one for one in box(made)["env"] if one["name"] == name]
    assert isinstance(found, dict)
    return found


def rule(made: Objects, number: int) -> dict[str, Any]:
    found: dict[str, Any] = spec(made)["podFailurePolicy"]["rules"][number]
    return found


def volume(made: Objects, name: str) -> dict[str, Any]:
    (found,) = [one for one in pod(made)["volumes"] if one["name"] == name]
    assert isinstance(found, dict)
    return found


Plant = Callable[[Objects], Any]
PLANTED: list[tuple[Plant, str]] = [
    (lambda m: m["Job"]["metadata"].update(name="Sft_1"), "name 'Sft_1': wanted small letters"),
    (lambda m: m["Job"]["metadata"].update(name="a" * 60), "name of 60 characters"),
    (lambda m: m["Job"]["metadata"].pop("namespace"), "no namespace"),
    (lambda m: spec(m).update(activeDeadlineSeconds=-1), "activeDeadlineSeconds=-1: wanted"),
    (lambda m: spec(m).pop("activeDeadlineSeconds"), "no activeDeadlineSeconds"),
    (lambda m: spec(m).update(ttlSecondsAfterFinished=-5), "ttlSecondsAfterFinished=-5"),
    (lambda m: spec(m).update(backoffLimit=-1), "backoffLimit=-1: wanted at least 0"),
    (lambda m: spec(m).update(completionMode="indexed"), "completionMode=indexed: wanted one of"),
    (lambda m: spec(m).update(parallelism=2), "parallelism=2 and completions=4"),
    (lambda m: spec(m).pop("completions"), "completionMode Indexed without completions"),
    (lambda m: pod(m).update(restartPolicy="Always"), "restartPolicy=Always: a Job takes"),
    (lambda m: pod(m).update(restartPolicy="OnFailure"), "podFailurePolicy wants restartPolicy"),
    (lambda m: spec(m).pop("podReplacementPolicy"), "podFailurePolicy wants podReplacementPolicy"),
    (lambda m: spec(m).update(podReplacementPolicy="failed"), "podReplacementPolicy=failed"),
    (lambda m: rule(m, 0).update(action="Fail"), "rule 1: action=Fail: wanted one of Count"),
    (lambda m: rule(m, 0).update(action="FailIndex"), "FailIndex wants backoffLimitPerIndex"),
    (lambda m: rule(m, 0).update(onPodConditions=[]), "rule 1: wanted one of onExitCodes and"),
    (lambda m: rule(m, 0)["onExitCodes"].update(values=[0, 78]), "rule 1: 0 is a success"),
    (lambda m: rule(m, 0)["onExitCodes"].update(values=[]), "rule 1: values=[]: wanted some"),
    (lambda m: rule(m, 0)["onExitCodes"].update(operator="in"), "rule 1: operator=in: wanted In"),
    (lambda m: rule(m, 0)["onExitCodes"].update(containerName="x"), "rule 1: no container x"),
    (lambda m: rule(m, 1)["onPodConditions"][0].update(status=True), "rule 2: status=True: wanted"),
    (lambda m: pod(m)["volumes"].append({"name": "tmp", "emptyDir": {}}), "volume tmp: is there 2"),
    (lambda m: volume(m, "tmp").pop("emptyDir"), "volume tmp: no source"),
    (lambda m: volume(m, "tmp").update(hostPath={"path": "/"}), "volume tmp: emptyDir, hostPath"),
    (
        lambda m: volume(m, "runs")["persistentVolumeClaim"].update(claimName="run"),
        "volume runs: no PersistentVolumeClaim run",
    ),
    (lambda m: volume(m, "job")["configMap"].update(name="job"), "volume job: no ConfigMap job"),
    (lambda m: volume(m, "tmp")["emptyDir"].update(sizeLimit="2 GB"), "sizeLimit=2 GB: wanted a"),
    (lambda m: box(m)["volumeMounts"][0].update(name="jobs"), "mounts jobs, which is no volume"),
    (lambda m: box(m)["volumeMounts"][1].update(mountPath="/job"), "mounts 2 volumes at /job"),
    (lambda m: box(m)["volumeMounts"][1].update(mountPath="runs"), "mountPath runs: wanted an abs"),
    (lambda m: volume(m, "shm")["emptyDir"].pop("medium"), "/dev/shm is not in memory"),
    (lambda m: volume(m, "shm")["emptyDir"].pop("sizeLimit"), "/dev/shm has no sizeLimit"),
    (lambda m: volume(m, "shm")["emptyDir"].update(sizeLimit="1Ti"), "/dev/shm of 1Ti takes all"),
    (lambda m: box(m)["resources"]["limits"].update(memory="512GB"), "limits.memory=512GB: wanted"),
    (lambda m: box(m)["resources"]["limits"].pop("memory"), "stage: no limit of memory"),
    (lambda m: box(m)["resources"]["requests"].update(cpu="65"), "asks 65 of cpu, and may have 64"),
    (
        lambda m: box(m)["resources"]["requests"].update({"nvidia.com/gpu": "4"}),
        "nvidia.com/gpu: requests and limits have to be equal",
    ),
    (
        lambda m: [r.update({"nvidia.com/gpu": "500m"}) for r in box(m)["resources"].values()],
        "nvidia.com/gpu=500m: wanted a whole number",
    ),
    (lambda m: box(m)["env"].append({"name": "PET_NNODES", "value": "4"}), "PET_NNODES is set 2"),
    (lambda m: env(m, "PET_NODE_RANK").update(value="0"), "has a value and valueFrom"),
    (
        lambda m: env(m, "PET_NODE_RANK")["valueFrom"]["fieldRef"].update(
            fieldPath="metadata.index"
        ),
        "fieldPath metadata.index is none",
    ),
    (
        lambda m: env(m, "MLFLOW_TRACKING_URI")["valueFrom"]["configMapKeyRef"].pop("optional"),
        "MLFLOW_TRACKING_URI: no ConfigMap untaxed-tracking",
    ),
    (lambda m: pod(m)["securityContext"].update(runAsUser=0), "may run as root"),
    (lambda m: pod(m)["securityContext"].pop("seccompProfile"), "no seccompProfile"),
    (lambda m: pod(m).update(hostNetwork=True), "hostNetwork is on"),
    (lambda m: pod(m).pop("automountServiceAccountToken"), "carries a token of the API server"),
    (lambda m: pod(m).update(serviceAccountName="default2"), "no ServiceAccount default2"),
    (lambda m: box(m)["securityContext"].update(privileged=True), "stage: is privileged"),
    (
        lambda m: box(m)["securityContext"].pop("allowPrivilegeEscalation"),
        "stage: may gain privileges",
    ),
    (
        lambda m: box(m)["securityContext"].update(readOnlyRootFilesystem=False),
        "stage: may write its root file system",
    ),
    (lambda m: box(m)["securityContext"].pop("capabilities"), "stage: keeps capabilities"),
    (
        lambda m: box(m)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        "stage: adds IPC_LOCK: not restricted",
    ),
    (lambda m: box(m).update(image="untaxed:latest"), "image 'untaxed:latest': wanted a tag"),
    (lambda m: box(m).update(image="reg:5000/untaxed"), "image 'reg:5000/untaxed': wanted a tag"),
    (lambda m: box(m).update(imagePullPolicy="always"), "imagePullPolicy=always"),
    (lambda m: env(m, "PET_NNODES").update(value="2"), "PET_NNODES=2 and completions=4"),
    (lambda m: spec(m).update(backoffLimit=3), "backoffLimit is not 0"),
    (lambda m: pod(m).update(subdomain="sft"), "subdomain sft: no Service of that name"),
    (
        lambda m: m["Service"]["spec"].update(selector={"a": "b"}),
        "selects {'a': 'b'}, not the pods",
    ),
    (lambda m: m["Service"]["spec"].pop("clusterIP"), "is not headless"),
    (
        lambda m: m["Service"]["spec"].pop("publishNotReadyAddresses"),
        "hides pods that are not ready",
    ),
    (lambda m: env(m, "PET_MASTER_PORT").update(value="29400"), "PET_MASTER_PORT=29400: Service"),
    (lambda m: env(m, "PET_MASTER_ADDR").update(value="sft-0.sft"), "PET_MASTER_ADDR=sft-0.sft"),
    (
        lambda m: pod(m).update(terminationGracePeriodSeconds=60),
        "terminationGracePeriodSeconds=60: wanted more than the 240 s",
    ),
]


@pytest.mark.parametrize(("plant", "said"), PLANTED, ids=[said for _, said in PLANTED])
def test_a_planted_mistake_is_found(sound: list[dict[str, Any]], plant: Plant, said: str) -> None:
    objects = copy.deepcopy(sound)
    made = {one["kind"]: one for one in objects}
    assert mistakes(objects) == []
    plant(made)
    found = mistakes(objects)
    assert any(said in line for line in found), found
    assert len(found) <= 6 and all(line.startswith("Job ") for line in found)


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("500m", 0.5), ("1Ki", 1024), ("1.5Gi", 1.5 * 2**30), (8, 8), ("1k", 1000)],
)
def test_quantities(text: object, number: float) -> None:
    assert amount(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "2 Gi", "GB", "-1", "1e3G", None])
def test_what_is_no_quantity(text: object) -> None:
    assert amount(text) is None
