"""What stands beside the Jobs and is there already: used as it is, or refused where that would matter."""

from __future__ import annotations

from typing import Any

import pytest
from cluster.launched import STAGES, Start, stages_started, untaxed
from cluster.minicluster import Refused

pytest_plugins = ("cluster.launched",)


def planted(start: Start, kind: str, name: str, **changes: Any) -> Any:
    """A cluster where a launch has been, with one object changed after it."""
    cluster = start()
    assert untaxed("launch") == 0
    spec = cluster.objects[kind, name]["spec"]
    for key, value in changes.items():
        spec[key] = value
    for job in cluster.every("Job"):
        cluster.delete("Job", job["metadata"]["name"])
    cluster.kubelet.started.clear()  # type: ignore[attr-defined]
    return cluster


@pytest.mark.parametrize(
    ("kind", "name", "changes", "words"),
    [
        ("NetworkPolicy", "default-deny", {"egress": [{}]}, "it has other rules"),
        ("NetworkPolicy", "default-deny", {"policyTypes": ["Ingress"]}, "it has other rules"),
        ("NetworkPolicy", "allow-dns", {"egress": [{"ports": [{"port": 53}]}]}, "other rules"),
        (
            "PersistentVolumeClaim",
            "untaxed-runs",
            {"accessModes": ["ReadOnlyMany"]},
            "it is ReadOnlyMany and the overlay wants ReadWriteOnce",
        ),
    ],
)
def test_what_opens_the_network_or_cannot_be_mounted_is_refused(
    start: Start,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    cluster = planted(start, kind, name, **changes)
    assert untaxed("launch") == 78
    said = capsys.readouterr().err
    assert f"{kind} {name}: is there, and " in said and words in said
    assert stages_started(cluster) == []


def test_what_the_cluster_has_filled_in_is_no_difference(start: Start) -> None:
    cluster = planted(start, "PersistentVolumeClaim", "untaxed-runs", volumeName="pv-1")
    policy = cluster.objects["NetworkPolicy", "allow-dns"]["spec"]
    policy["ingress"] = []
    assert untaxed("launch") == 0
    assert stages_started(cluster) == STAGES


def test_what_may_not_be_read_is_told(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = planted(start, "NetworkPolicy", "default-deny")
    capsys.readouterr()

    def trouble(method: str, target: str) -> None:
        if method == "GET" and "networkpolicies/" in target:
            raise Refused(403, "Forbidden", "networkpolicies is forbidden")

    cluster.trouble = trouble
    assert untaxed("launch") == 0
    assert "NetworkPolicy default-deny: is there and cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["conflict", "page"])
def test_what_passes_is_asked_again(start: Start, answer: str) -> None:
    """A quota that counts two at once (409, and nothing is there), or a page of a proxy in between."""
    cluster, left = start(), [2]
    answered = cluster.answer

    def passing(method: str, target: str, body: Any) -> tuple[int, Any]:
        if method == "POST" and target.endswith("/configmaps") and left[0]:
            left[0] -= 1
            if answer == "page":
                return 200, "<html>login</html>"
            raise Refused(409, "Conflict", "Operation cannot be fulfilled on resourcequotas")
        return answered(method, target, body)

    cluster.answer = passing  # type: ignore[method-assign]
    assert untaxed("launch") == 0
    assert left == [0] and len(cluster.every("ConfigMap")) >= 1
    assert stages_started(cluster) == STAGES
