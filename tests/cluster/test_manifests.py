"""The Kubernetes objects: rendered by kustomize, validated strictly, and held to their own rules.

No API server is needed. What only a cluster can show is listed in docs/cluster.md.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.launched import OVERLAYS

from pipeline.errors import DataError, RecipeError, Stopped
from pipeline.graph import STAGES, stages_of
from pipeline.jobfile import parse_job
from pipeline.stage import arguments

ROOT = Path(__file__).resolve().parents[2]
# of JobSets there is no schema here: tests/cluster/test_jobset.py validates each Job of one
NO_OBJECTS = {"kustomization.yaml", "jobset.yaml"}
FILES = sorted(path for path in (ROOT / "k8s").rglob("*.yaml") if path.name not in NO_OBJECTS)
GPU = {name for name in OVERLAYS if name != "local"}
NODES = {"h100-multinode": 4}
SERVED = {"anchor": ["base"], "baseline": ["base"], "eval": ["aligned", "base"]}
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
QUANTITY = re.compile(r"[1-9]\d*(m|Ki|Mi|Gi|Ti)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
FIELD_PATHS = {"metadata.labels['batch.kubernetes.io/job-completion-index']"}
VOLUME_KINDS = {"configMap", "persistentVolumeClaim", "emptyDir"}  # of those that restricted allows


@functools.cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    """All objects of an overlay, as ``kubectl apply`` would get them."""
    made = subprocess.run(
        [
            "kubectl",
            "kustomize",
            "--load-restrictor",
            "LoadRestrictionsNone",
            f"k8s/overlays/{overlay}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def of_kind(overlay: str, kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in rendered(overlay) if o["kind"] == kind}


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def container(job: dict[str, Any]) -> dict[str, Any]:
    """The one container of a stage."""
    (only,) = pod(job)["containers"]
    assert only["name"] == "stage"
    return dict(only)


def before(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What starts before the stage in its pod."""
    return list(pod(job).get("initContainers", []))


def servers(overlay: str, stage: str) -> list[str]:
    """Which models the pod of a stage has on servers of its own."""
    return SERVED.get(stage, []) if overlay == "h100-vllm" else []


def environment(job: dict[str, Any]) -> dict[str, str | None]:
    pairs = [(e["name"], e.get("value")) for e in container(job)["env"]]
    assert len(dict(pairs)) == len(pairs), "a variable is stated twice"
    return dict(pairs)


def every_job() -> list[Any]:
    return [pytest.param(o, s, id=f"{o}-{s}") for o in OVERLAYS for s in STAGES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "k8s")))
@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_is_strictly_valid(path: Path, version: str) -> None:
    """Patches too: they state part of an object, and nothing that it does not have."""
    import kubernetes_validate

    documents = list(yaml.safe_load_all(path.read_text(encoding="ascii")))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)  # raises for what is not


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_rendered_object_is_strictly_valid(overlay: str, version: str) -> None:
    import kubernetes_validate

    objects = rendered(overlay)
    assert len(objects) > len(STAGES)
    for document in objects:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_are_strict() -> None:
    import kubernetes_validate

    broken = {"apiVersion": "batch/v1", "kind": "Job", "spec": {"bakoffLimit": 1, "template": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_every_file_is_used() -> None:
    components = [f"components/{path.name}" for path in (ROOT / "k8s/components").iterdir()]
    for folder in ("base", *components, *(f"overlays/{name}" for name in OVERLAYS)):
        here = ROOT / "k8s" / folder
        kustomization = yaml.safe_load((here / "kustomization.yaml").read_text(encoding="ascii"))
        named = {n for n in kustomization.get("resources", []) if n.endswith(".yaml")}
        patches = kustomization.get("patches", [])
        named |= {patch["path"] for patch in patches if "path" in patch}
        assert len(named) == len(list(here.glob("*.yaml"))) - 1
        assert named | {"kustomization.yaml"} == {path.name for path in here.glob("*.yaml")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_suspended_job_for_each_stage(overlay: str) -> None:
    jobs = of_kind(overlay, "Job")
    assert set(jobs) == set(STAGES)
    for name, job in jobs.items():
        spec, labels = job["spec"], job["metadata"]["labels"]
        assert spec["suspend"] is True
        assert labels == spec["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == name
        assert spec.get("completionMode", "NonIndexed") in ("NonIndexed", "Indexed")
        assert spec["podReplacementPolicy"] == "Failed"
        assert pod(job)["restartPolicy"] == "Never", "podFailurePolicy wants it"
        assert spec["activeDeadlineSeconds"] > 0 and spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize(("overlay", "stage"), every_job())
def test_exit_codes_decide_the_retry(overlay: str, stage: str) -> None:
    spec = of_kind(overlay, "Job")[stage]["spec"]
    decided: dict[str, set[int]] = {}
    rules = list(spec["podFailurePolicy"]["rules"])
    if servers(overlay, stage):
        last = rules.pop()
        assert (last["action"], last["onExitCodes"]["containerName"]) == ("FailJob", "models")
        assert last["onExitCodes"]["values"] == rules[0]["onExitCodes"]["values"]
    for rule in rules:
        assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
        codes = rule.get("onExitCodes")
        if codes is None:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            assert rule["action"] == "Ignore"
            continue
        assert (codes["operator"], codes["containerName"]) == ("In", "stage")
        decided.setdefault(rule["action"], set()).update(codes["values"])
    assert decided == {
        "FailJob": {RecipeError.exit_code, DataError.exit_code},
        "Ignore": {Stopped.exit_code},
    }
    alone = not (stage == "sft" and overlay in NODES)
    assert bool(spec["backoffLimit"]) == alone, (
        "code 1 is tried again, but no pod without its peers"
    )


@pytest.mark.parametrize(("overlay", "stage"), every_job())
def test_arguments_are_the_frozen_command_line(overlay: str, stage: str) -> None:
    spec = container(of_kind(overlay, "Job")[stage])
    assert "command" not in spec, "the image's entry point is kept: it hears SIGTERM"
    launcher, script, *rest = spec["args"]
    assert launcher == ("torchrun" if stage == "sft" else "python")
    assert script == f"pipeline/{stage}.py" and (ROOT / script).is_file()
    options = arguments(stage).parse_args(rest)  # exits on what it does not know
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["volumeMounts"]}
    assert str(options.job) == "/job/job.yaml" and "/job" in mounts
    assert str(options.runs) == "/runs" and "/runs" in mounts
    assert not options.set and not options.rebuild
    if stage == "sft":
        assert (ROOT / options.ds).is_file()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_satisfy_the_restricted_standard(overlay: str) -> None:
    workloads = [*of_kind(overlay, "Job").values(), *of_kind(overlay, "Deployment").values()]
    assert len(workloads) == len(STAGES) + 1
    for workload in workloads:
        spec = pod(workload)
        for one in (*spec["containers"], *before(workload)):
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == image_uid()
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] in of_kind(overlay, "ServiceAccount")
    levels = of_kind(overlay, "Namespace")["untaxed"]["metadata"]["labels"]
    assert levels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_door_to_the_volumes_is_shut_and_opens_on_both(overlay: str) -> None:
    (door,) = of_kind(overlay, "Deployment").values()
    assert door["spec"]["replicas"] == 0
    labels = door["spec"]["template"]["metadata"]["labels"]
    assert door["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (only,) = pod(door)["containers"]
    assert only["image"] == container(of_kind(overlay, "Job")["prep"])["image"]
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod(door)["volumes"]}
    writable = {m["mountPath"]: not m.get("readOnly") for m in only["volumeMounts"]}
    assert writable == {"/runs": False, "/data": True}
    assert {claims[m["name"]] for m in only["volumeMounts"]} == set(
        of_kind(overlay, "PersistentVolumeClaim")
    )


def image_uid() -> int:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="ascii")
    found = re.search(r"^USER (\d+):(\d+)$", text, flags=re.MULTILINE)
    assert found
    return int(found.group(1))


@pytest.mark.parametrize(("overlay", "stage"), every_job())
def test_mounts_have_volumes_and_volumes_their_source(overlay: str, stage: str) -> None:
    job = of_kind(overlay, "Job")[stage]
    volumes = {volume["name"]: volume for volume in pod(job)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(job)["volumeMounts"]}
    others = {m["name"] for one in before(job) for m in one["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} | others == set(volumes)
    for volume in volumes.values():
        (kind,) = set(volume) - {"name"}
        assert kind in VOLUME_KINDS
        if kind == "configMap":
            assert volume[kind]["name"] in of_kind(overlay, "ConfigMap")
        elif kind == "persistentVolumeClaim":
            assert volume[kind]["claimName"] in of_kind(overlay, "PersistentVolumeClaim")
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {"/runs", "/tmp", "/dev/shm"}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize(("overlay", "stage"), every_job())
def test_resources_are_stated_and_guaranteed(overlay: str, stage: str) -> None:
    job = of_kind(overlay, "Job")[stage]
    resources = container(job)["resources"]
    assert resources["requests"] == resources["limits"], "GPUs must be equal; all else should"
    assert set(resources["limits"]) >= {"cpu", "memory", "ephemeral-storage"}
    for quantity in resources["limits"].values():
        assert QUANTITY.fullmatch(quantity)
    for one in before(job):
        assert one["resources"]["requests"] == one["resources"]["limits"]
    gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
    beside = [one["resources"]["limits"].get("nvidia.com/gpu") for one in before(job)]
    assert beside == ([None, *("1" for _ in servers(overlay, stage))] if beside else [])
    on_gpu = overlay in GPU and stage not in ("prep", "pack")
    assert bool(gpus) == (on_gpu and not beside)
    assert on_gpu == ("tolerations" in pod(job)) == ("nodeSelector" in pod(job))
    if stage == "sft":
        ranks = int(environment(job)["PET_NPROC_PER_NODE"] or 0)
        cores = ranks * int(environment(job)["OMP_NUM_THREADS"] or 0)
        assert ranks == (gpus or 2) and cores == int(resources["limits"]["cpu"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_and_namespaces(overlay: str) -> None:
    seen = set()
    for document in rendered(overlay):
        name, kind = document["metadata"]["name"], document["kind"]
        assert NAME.fullmatch(name)
        assert (kind, name) not in seen
        seen.add((kind, name))
        if kind != "Namespace":
            assert document["metadata"]["namespace"] == "untaxed"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_image_and_no_pull_of_what_is_loaded(overlay: str) -> None:
    tag = "gpu" if overlay in GPU else "cpu"
    for job in of_kind(overlay, "Job").values():
        assert container(job)["image"] == f"untaxed:{tag}", "as docker/build.sh names it"
        assert container(job)["imagePullPolicy"] == "IfNotPresent"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_training_pods_find_one_another(overlay: str) -> None:
    """Service, subdomain, job name, rendezvous address and port must agree letter by letter."""
    job = of_kind(overlay, "Job")["sft"]
    (service,) = of_kind(overlay, "Service").values()
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True, "rank 0 is met before it is ready"
    assert pod(job)["subdomain"] == service["metadata"]["name"]
    env = environment(job)
    assert env["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    (port,), (exposed,) = service["spec"]["ports"], container(job)["ports"]
    assert env["PET_MASTER_PORT"] == str(port["port"]) == str(exposed["containerPort"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(env["PET_NNODES"] or 0)
    assert job["spec"]["completions"] == NODES.get(overlay, 1)
    grace = pod(job)["terminationGracePeriodSeconds"]
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) < grace


@pytest.mark.parametrize(("overlay", "stage"), every_job())
def test_variables_come_from_what_exists(overlay: str, stage: str) -> None:
    """Field paths are known; config maps and secrets are made here, or may be absent."""
    job = of_kind(overlay, "Job")[stage]
    for variable in container(job)["env"]:
        for kind, reference in variable.get("valueFrom", {}).items():
            if kind == "fieldRef":
                assert reference["fieldPath"] in FIELD_PATHS
                assert job["spec"]["completionMode"] == "Indexed"
            else:
                assert kind in ("configMapKeyRef", "secretKeyRef") and reference["optional"] is True
        assert bool(variable.get("valueFrom")) != bool(variable.get("value"))
    offline = environment(job).get("HF_HUB_OFFLINE")
    assert offline == (None if stage == "prep" else "1")


@pytest.mark.parametrize(("overlay", "name"), OVERLAYS.items())
def test_the_job_file_travels_unchanged(overlay: str, name: str) -> None:
    (config,) = of_kind(overlay, "ConfigMap").values()
    assert config["immutable"] is True
    text = (ROOT / "jobs" / f"{name}.yaml").read_text(encoding="utf-8")
    assert config["data"] == {"job.yaml": text}
    stages = stages_of(parse_job(yaml.safe_load(text), name))
    assert stages == [stage for stage in STAGES if stage in stages]
    assert set(STAGES) - set(stages) <= {"choose"}, "a Job for each, started where the job names it"
