"""Generated code runs without network: planted openings are found, and the record of the stage is sent."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from cluster.launched import OVERLAYS
from parts import ROOT

from pipeline.cluster.network import CODE_SETS, code_suites, selects
from pipeline.cluster.objects import CLOSED, Overlay, read_overlay, stage_objects, tracking_objects
from pipeline.cluster.rules import mistakes
from pipeline.data.public_evaluation import EVALUATION
from pipeline.graph import STAGES
from pipeline.jobfile import parse_job

JOB = ROOT / "jobs" / "quickstart.yaml"
CODE = {"name": "code", "measures": "reasoning", "source": "he.jsonl", "format": "humaneval"}
DEV = {"name": "dev", "measures": "reasoning", "source": "set:mbpp"}
CHOOSE = {"suites": [DEV], "wanted": [{"metric": "reasoning_accuracy", "at_least": 0.1}]}
Policies = dict[str, dict[str, Any]]
Plant = Callable[[dict[str, Any], Policies], Any]


@functools.cache
def read(overlay: str) -> Overlay:
    return read_overlay(ROOT / "k8s" / "overlays" / overlay)


def policies_of(overlay: str) -> Policies:
    standing = read(overlay).standing
    return {one["metadata"]["name"]: one for one in standing if one["kind"] == "NetworkPolicy"}


def made(stage: str, overlay: str = "local") -> list[dict[str, Any]]:
    """All objects of one stage of a job that has code run."""
    tree = yaml.safe_load(JOB.read_text(encoding="utf-8")) | {"choose": CHOOSE}
    tree["eval"]["suites"].append(CODE)
    found = read(overlay)
    job, text = parse_job(tree, "test"), yaml.safe_dump(tree)
    return copy.deepcopy([*found.standing, *stage_objects(found, job, text, stage)])


@pytest.fixture(scope="module")
def sound() -> list[dict[str, Any]]:
    return made("eval")


def pod_labels(job: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = job["spec"]["template"]["metadata"]["labels"]
    return labels


def opening(name: str, **spec: Any) -> Plant:
    return lambda job, policies: policies[name]["spec"].update(spec)


def unset(job: dict[str, Any], policies: Policies) -> None:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["env"] = [one for one in container["env"] if one["name"] != "UNTAXED_NO_NETWORK"]


PLANTED: list[tuple[Plant, str]] = [
    (opening("allow-dns", podSelector={}), "NetworkPolicy allow-dns opens egress to it"),
    (
        opening("allow-mlflow", podSelector={"matchLabels": {"app.kubernetes.io/name": "untaxed"}}),
        "NetworkPolicy allow-mlflow opens egress to it: wanted none; leave eval out",
    ),
    (
        opening(
            "allow-training-peers",
            podSelector={
                "matchExpressions": [{"key": "untaxed-key", "operator": "Exists"}],
            },
        ),
        "NetworkPolicy allow-training-peers opens ingress to it",
    ),
    (
        opening("default-deny", podSelector={"matchLabels": {"a": "b"}}),
        "no NetworkPolicy denies egress: wanted default-deny",
    ),
    (opening("default-deny", policyTypes=["Ingress"]), "no NetworkPolicy denies egress"),
    (opening("default-deny", policyTypes=["Egress"]), "no NetworkPolicy denies ingress"),
    (
        lambda job, policies: pod_labels(job).update({"app.kubernetes.io/component": "other"}),
        "NetworkPolicy allow-dns opens egress to it",
    ),
    (unset, "UNTAXED_NO_NETWORK is not set"),
]


@pytest.mark.parametrize(("plant", "said"), PLANTED, ids=[said for _, said in PLANTED])
def test_a_planted_opening_is_found(sound: list[dict[str, Any]], plant: Plant, said: str) -> None:
    objects = copy.deepcopy(sound)
    assert mistakes(objects) == []
    (job,) = [one for one in objects if one["kind"] == "Job"]
    policies = {o["metadata"]["name"]: o for o in objects if o["kind"] == "NetworkPolicy"}
    plant(job, policies)
    found = mistakes(objects)
    assert any(
        said in line and "runs code that a model wrote (suite code)" in line for line in found
    )
    assert len(found) <= 2


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_runs_code_is_closed(stage: str) -> None:
    objects = made(stage)
    assert mistakes(objects) == []
    (policy,) = [o for o in objects if o["metadata"]["name"] == "allow-dns"]
    policy["spec"]["podSelector"] = {}
    assert bool(mistakes(objects)) == (stage in CLOSED)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_is_closed_but_for_what_is_named(overlay: str) -> None:
    policies = policies_of(overlay)
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["default-deny"]["spec"] == closed
    outward = {
        name
        for name, policy in policies.items()
        for rule in policy["spec"].get("egress", [])
        if any("ipBlock" in peer for peer in rule["to"])
    }
    assert outward == (set() if overlay == "local" else {"allow-hub"})
    labels = [{"app.kubernetes.io/component": stage} for stage in STAGES]
    labels.append({"app.kubernetes.io/name": "untaxed"})
    for policy in policies.values():
        chosen = policy["spec"]["podSelector"].get("matchLabels")
        assert chosen is None or chosen in labels


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_no_policy_opens_a_closed_stage(overlay: str, stage: str) -> None:
    """Whatever the job: no name and no tracking server where code may run."""
    job = read(overlay).jobs[stage]
    opened = [
        name
        for name, policy in policies_of(overlay).items()
        if selects(policy["spec"]["podSelector"], pod_labels(job))
        and (policy["spec"].get("egress") or policy["spec"].get("ingress"))
    ]
    assert (opened == []) == (stage in CLOSED)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    names = {variable["name"] for variable in container["env"]}
    assert ("UNTAXED_NO_NETWORK" in names) == (stage in CLOSED)


def test_what_runs_no_code_may_have_a_network() -> None:
    """Such as an evaluation that asks a server elsewhere."""
    job = parse_job(yaml.safe_load(JOB.read_text(encoding="utf-8")), "test")
    assert [code_suites(job, stage) for stage in STAGES] == [[] for _ in STAGES]
    found = read("local")
    objects = [*found.standing, *stage_objects(found, job, JOB.read_text(), "eval")]
    objects = copy.deepcopy(objects)
    (policy,) = [o for o in objects if o["metadata"]["name"] == "allow-dns"]
    policy["spec"]["podSelector"] = {}
    assert mistakes(objects) == []


def test_the_sets_that_run_code_are_those_whose_rows_have_tests() -> None:
    told = {name for name, one in EVALUATION.items() if "Task(" in inspect.getsource(one.read)}
    assert told == CODE_SETS


@pytest.mark.parametrize("overlay", ["local", "h100"])
@pytest.mark.parametrize("version", ["1.33", "1.34", "1.35", "1.36", "1.37"])
def test_the_job_that_tells_the_server_has_a_network(overlay: str, version: str) -> None:
    import kubernetes_validate

    job = parse_job(yaml.safe_load(JOB.read_text(encoding="utf-8")), "test")
    found = read(overlay)
    objects = tracking_objects(found, job, JOB.read_text(), "0123abcd", 2)
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
    assert mistakes([*found.standing, *objects]) == []
    assert objects[-1]["metadata"]["name"] == "quickstart-track-0123abcd-2"
    labels = pod_labels(objects[-1])
    chosen = {
        n for n, o in policies_of(overlay).items() if selects(o["spec"]["podSelector"], labels)
    }
    assert chosen == {"default-deny", "allow-dns", "allow-mlflow"}
    (container,) = objects[-1]["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
