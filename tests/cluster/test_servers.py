"""Planted mistakes in servers beside a stage, and in what a job file asks of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from parts import ROOT

from pipeline.cluster.objects import Overlay, read_overlay, stage_objects
from pipeline.cluster.rules import mistakes
from pipeline.graph import STAGES
from pipeline.jobfile import parse_job

SERVED = ROOT / "jobs" / "r1-qwen-14b-served.yaml"
Parts = dict[str, Any]


@functools.cache
def read(overlay: str) -> Overlay:
    return read_overlay(ROOT / "k8s" / "overlays" / overlay)


def made(overlay: str, stage: str, **change: Any) -> list[dict[str, Any]]:
    """All objects of one stage, with sections of the job file changed."""
    tree = yaml.safe_load(SERVED.read_text(encoding="utf-8"))
    for section, values in change.items():
        tree[section] |= values
    text = yaml.safe_dump(tree)
    found = read(overlay)
    return [*found.standing, *stage_objects(found, parse_job(tree, "test"), text, stage)]


@pytest.fixture(scope="module")
def sound() -> list[dict[str, Any]]:
    return made("h100-vllm", "eval")


def parts(objects: list[dict[str, Any]]) -> Parts:
    (job,) = [one for one in objects if one["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    return {"pod": pod} | {c["name"]: c for c in (*pod["initContainers"], *pod["containers"])}


def without(container: dict[str, Any], name: str) -> None:
    container["env"] = [one for one in container["env"] if one["name"] != name]


def moved(p: Parts) -> None:
    p["pod"]["initContainers"].remove(p["serve-base"])
    p["pod"]["containers"].append(p["serve-base"])


def argument(container: dict[str, Any], old: str, new: str) -> None:
    container["args"][container["args"].index(old)] = new


GPU = {"nvidia.com/gpu": "1"}
PLANTED: list[tuple[Callable[[Parts], Any], str]] = [
    (lambda p: p["serve-base"].pop("restartPolicy"), "serve-base: is waited for to its end"),
    (moved, "serve-base: a server never ends, so the Job would not"),
    (lambda p: p["serve-base"].pop("startupProbe"), "serve-base: no startupProbe"),
    (
        lambda p: p["serve-base"].update(
            startupProbe={"httpGet": {"path": "/health", "port": 8000}}
        ),
        "serve-base: a probe of the kubelet does not reach 127.0.0.1",
    ),
    (
        lambda p: argument(p["serve-base"], "--host=127.0.0.1", "--host=0.0.0.0"),
        "serve-base: answers whoever reaches the pod",
    ),
    (
        lambda p: [r.pop("nvidia.com/gpu") for r in p["serve-base"]["resources"].values()],
        "serve-base: no limit of nvidia.com/gpu",
    ),
    (
        lambda p: [r.update(GPU) for r in p["stage"]["resources"].values()],
        "stage: asks for a GPU beside that of its server",
    ),
    (lambda p: without(p["serve-base"], "HF_HUB_OFFLINE"), "serve-base: HF_HUB_OFFLINE is not set"),
    (lambda p: without(p["serve-base"], "VLLM_NO_USAGE_STATS"), "VLLM_NO_USAGE_STATS is not set"),
    (lambda p: without(p["serve-base"], "DO_NOT_TRACK"), "serve-base: DO_NOT_TRACK is not set"),
    (
        lambda p: p["pod"]["initContainers"].append(p["pod"]["initContainers"].pop(0)),
        "serve-base: starts before models, which makes what it reads",
    ),
    (
        lambda p: argument(p["serve-aligned"], "--port=8001", "--port=8000"),
        "2 servers listen on port 8000",
    ),
    (
        lambda p: p["pod"]["initContainers"].remove(p["serve-aligned"]),
        "UNTAXED_ALIGNED_ENDPOINT=http://127.0.0.1:8001/v1: no server in the pod listens there",
    ),
    (
        lambda p: without(p["stage"], "UNTAXED_ALIGNED_ENDPOINT"),
        "UNTAXED_ENDPOINT: the job file asks for model aligned, the server has base",
    ),
    (
        lambda p: without(p["stage"], "UNTAXED_ENDPOINT"),
        "the job file asks a server for base, and UNTAXED_ENDPOINT is not set",
    ),
    (
        lambda p: argument(p["serve-base"], "--served-model-name=base", "--served-model-name=b"),
        "the job file asks for model base, the server has b",
    ),
    (
        lambda p: p["models"]["securityContext"].pop("capabilities"),
        "models: keeps capabilities",
    ),
    (
        lambda p: p["serve-base"].update(image="docker.io/vllm/vllm-openai:latest"),
        "serve-base: image 'docker.io/vllm/vllm-openai:latest': wanted a tag",
    ),
]


@pytest.mark.parametrize(("plant", "said"), PLANTED, ids=[said for _, said in PLANTED])
def test_a_planted_mistake_is_found(
    sound: list[dict[str, Any]], plant: Callable[[Parts], Any], said: str
) -> None:
    objects = copy.deepcopy(sound)
    assert mistakes(objects) == []
    plant(parts(objects))
    found = mistakes(objects)
    assert any(said in line for line in found), found
    assert len(found) <= 3


@pytest.mark.parametrize("stage", ["anchor", "baseline", "eval"])
def test_a_job_and_an_overlay_that_do_not_go_together(stage: str) -> None:
    (line, *_) = mistakes(made("h100", stage))
    assert "the job file asks a server for base, and UNTAXED_ENDPOINT is not set" in line
    section = "anchor" if stage == "anchor" else "eval"
    (line,) = mistakes(made("h100-vllm", stage, **{section: {"endpoint": None}}))
    assert f"has a server, and the job file gives {stage} no endpoint" in line
    assert mistakes(made("h100-vllm", stage)) == []


def test_a_judge_is_asked_at_the_same_address() -> None:
    judge = {"kind": "rubric", "endpoint": {"model": "judge"}}
    (line,) = mistakes(made("h100-vllm", "baseline", eval={"judges": [judge]}))
    assert "the job file asks for model judge, the server has base" in line


@pytest.mark.parametrize("stage", STAGES)
def test_servers_answer_to_the_stage_alone(stage: str) -> None:
    """Each model at an address of the pod's own, by the name that the job file asks for."""
    pod = read("h100-vllm").jobs[stage]["spec"]["template"]["spec"]
    names = {"anchor": ["base"], "baseline": ["base"], "eval": ["aligned", "base"]}.get(stage, [])
    models, *found = pod.get("initContainers") or [{}]
    assert [one["name"] for one in found] == [f"serve-{name}" for name in names]
    assert bool(models) == bool(names)
    values = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    addresses = {"base": "UNTAXED_ENDPOINT", "aligned": "UNTAXED_ALIGNED_ENDPOINT"}
    assert {addresses[name] for name in names} == set(addresses.values()) & set(values)
    for name, one in zip(names, found, strict=True):
        said = dict(word.removeprefix("--").split("=") for word in one["args"])
        assert one["command"] == ["vllm", "serve", f"/served/{name}"]
        assert f"/served/{name}" in models["args"][2].split()
        assert (said["served-model-name"], said["host"]) == (name, "127.0.0.1")
        port = said["port"]
        assert values[addresses[name]] == f"http://127.0.0.1:{port}/v1"
        assert f"http://127.0.0.1:{port}/health" in one["startupProbe"]["exec"]["command"][2]
        assert one["restartPolicy"] == "Always"
        own = {variable["name"]: variable["value"] for variable in one["env"]}
        places = [v for n, v in own.items() if n.endswith(("DIR", "HOME", "ROOT", "_BASE"))]
        assert len(places) == 10 and all(f"{place}/".startswith("/tmp/") for place in places)
        writable = {m["mountPath"] for m in one["volumeMounts"] if not m.get("readOnly")}
        assert writable == {"/tmp", "/dev/shm"}


def test_the_served_job_is_the_plain_one_with_endpoints() -> None:
    plain, served = (
        yaml.safe_load((ROOT / "jobs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("r1-qwen-14b", "r1-qwen-14b-served")
    )
    assert served.pop("name") != plain.pop("name")
    for section, endpoint in (
        ("anchor", {"model": "base"}),
        ("eval", {"base": "base", "aligned": "aligned"}),
    ):
        assert served[section].pop("endpoint") == endpoint
        assert served[section].pop("batch_rows") > plain[section].pop("batch_rows")
    assert served == plain
