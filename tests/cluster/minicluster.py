"""A cluster in miniature for tests: an API server that speaks batch/v1 and core/v1 strictly, a Job
controller, and a kubelet that the test brings. Real HTTP, so that real clients talk to it.

It knows what a launcher needs and no more: create, get, list, delete and logs; Indexed Jobs,
podFailurePolicy by exit code and by DisruptionTarget, backoffLimit; 404, 409 and 422.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlparse

import kubernetes_validate
import yaml

Manifest = dict[str, Any]
VERSION = "1.37"
PLURALS = {
    "namespaces": "Namespace",
    "serviceaccounts": "ServiceAccount",
    "configmaps": "ConfigMap",
    "secrets": "Secret",
    "services": "Service",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "networkpolicies": "NetworkPolicy",
    "deployments": "Deployment",
    "statefulsets": "StatefulSet",
    "events": "Event",
    "pods": "Pod",
    "jobs": "Job",
    "jobsets": "JobSet",
    "workloads": "Workload",
}
PATH = re.compile(
    r"/(?:api/v1|apis/[-a-z.0-9]+/v1(?:alpha2|beta1)?)(?:/namespaces/(?P<space>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
JOB_NAME = "batch.kubernetes.io/job-name"


class Kubelet(Protocol):
    """Runs pods. ``look`` returns the pod's status as it is now; ``stop`` asks it to end."""

    def start(self, pod: Manifest) -> None: ...
    def look(self, pod: Manifest) -> Manifest: ...
    def stop(self, pod: Manifest) -> None: ...
    def log(self, pod: Manifest) -> str: ...


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


@functools.cache
def validate(text: str) -> None:
    """Against the strict schema, which takes a part of a second to read."""
    kubernetes_validate.validate(json.loads(text), VERSION, strict=True)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def status(phase: str, code: int | None = None, **terminated: Any) -> Manifest:
    """The status of a pod of one container."""
    if code is None:
        state: Manifest = {"running": {}} if phase == "Running" else {}
    else:
        reason = "Completed" if code == 0 else "Error"
        state = {
            "terminated": {"exitCode": code, "reason": reason, "finishedAt": now()} | terminated
        }
    return {"phase": phase, "containerStatuses": [{"name": "stage", "state": state}]}


@dataclass
class MiniCluster:
    """Objects by (kind, name), and what was asked."""

    kubelet: Kubelet
    objects: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    away: threading.Event = field(default_factory=threading.Event)
    trouble: Callable[[str, str], None] = lambda method, target: (
        None
    )  # raises Refused or ConnectionError
    spaces: bool = False  # a namespace has to be made before what is in it
    lock: threading.RLock = field(default_factory=threading.RLock)

    def every(self, kind: str) -> list[Manifest]:
        with self.lock:
            return [copy.deepcopy(one) for (k, _), one in self.objects.items() if k == kind]

    def answer(self, method: str, target: str, body: Manifest | None) -> tuple[int, Any]:
        """(HTTP status, answer): JSON, or text for a log."""
        url = urlparse(target)
        found = PATH.fullmatch(url.path)
        if found is None or found["plural"] not in PLURALS:
            raise Refused(404, "NotFound", f"the server could not find {url.path}")
        kind, name = PLURALS[found["plural"]], found["name"]
        with self.lock:
            if method == "POST":
                if (
                    self.spaces
                    and found["space"]
                    and ("Namespace", found["space"]) not in self.objects
                ):
                    raise Refused(404, "NotFound", f'namespaces "{found["space"]}" not found')
                return 201, self.create(kind, body or {})
            if method == "GET" and name is None:
                return 200, self.list(kind, parse_qs(url.query))
            one = self.objects.get((kind, name or ""))
            if one is None:
                raise Refused(404, "NotFound", f'{found["plural"]} "{name}" not found')
            if method == "GET" and found["log"]:
                lines = self.kubelet.log(one).splitlines()
                tail = int(parse_qs(url.query).get("tailLines", ["1000000"])[0])
                return 200, "".join(line + "\n" for line in lines[-tail:])
            if method == "GET":
                return 200, one
            if method == "DELETE":
                self.delete(kind, name or "")
                return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        raise Refused(405, "MethodNotAllowed", f"{method} is not allowed")

    def create(self, kind: str, body: Manifest) -> Manifest:
        name = body.get("metadata", {}).get("name", "")
        if (kind, name) in self.objects:
            raise Refused(409, "AlreadyExists", f'{kind.lower()}s "{name}" already exists')
        try:
            if body.get("kind") != kind:
                raise ValueError(f"is a {body.get('kind')}")
            if kind != "JobSet":  # of the cluster's own kinds only there are schemas
                validate(json.dumps(body, sort_keys=True))
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise Refused(422, "Invalid", f'{kind} "{name}" is invalid: {said}') from error
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if kind == "Job":
            made.setdefault("status", {})
        self.objects[kind, name] = made
        return made

    def list(self, kind: str, query: dict[str, list[str]]) -> Manifest:
        wanted = [
            word.split("=") for word in query.get("labelSelector", [""])[0].split(",") if word
        ]
        items = [
            one
            for (k, _), one in self.objects.items()
            if k == kind
            and all(one["metadata"].get("labels", {}).get(label) == v for label, v in wanted)
        ]
        return {"kind": f"{kind}List", "apiVersion": "v1", "metadata": {}, "items": items}

    def delete(self, kind: str, name: str) -> None:
        del self.objects[kind, name]
        if kind == "Job":
            for pod in self.list("Pod", {"labelSelector": [f"{JOB_NAME}={name}"]})["items"]:
                self.kubelet.stop(pod)
                del self.objects["Pod", pod["metadata"]["name"]]

    def event(self, name: str, reason: str, message: str) -> None:
        """Something that happened to an object of this name."""
        with self.lock:
            self.objects["Event", f"{name}.{len(self.objects)}"] = {
                "kind": "Event",
                "apiVersion": "v1",
                "metadata": {"name": f"{name}.{len(self.objects)}", "namespace": "untaxed"},
                "involvedObject": {"name": name},
                "reason": reason,
                "message": message,
                "lastTimestamp": now(),
            }

    def control(self) -> None:
        """One round of the Job controller."""
        with self.lock:
            for job in [one for (kind, _), one in self.objects.items() if kind == "Job"]:
                self._control(job)

    def _control(self, job: Manifest) -> None:
        spec, name = job["spec"], job["metadata"]["name"]
        if spec.get("suspend") or job["status"].get("conditions"):
            return
        pods = self.list("Pod", {"labelSelector": [f"{JOB_NAME}={name}"]})["items"]
        for pod in pods:
            if pod["status"]["phase"] in ("Pending", "Running"):
                pod["status"] = self.kubelet.look(pod)
        verdict = self._verdict(spec, pods)
        if verdict is not None:
            kind, reason, message = verdict
            job["status"]["conditions"] = [
                {"type": kind, "status": "True", "reason": reason, "message": message}
            ]
            for pod in pods:
                if pod["status"]["phase"] in ("Pending", "Running"):
                    self.kubelet.stop(pod)
            return
        for index in range(spec.get("completions", 1)):
            own = [p for p in pods if p["metadata"]["annotations"][COMPLETION_INDEX] == str(index)]
            if all(p["status"]["phase"] == "Failed" for p in own):
                self._start(job, index, len(own))

    def _verdict(self, spec: Manifest, pods: list[Manifest]) -> tuple[str, str, str] | None:
        counted = 0
        for pod in pods:
            if pod["status"]["phase"] != "Failed":
                continue
            action, code = self._action(spec, pod)
            if action == "FailJob":
                message = f"Container stage failed with exit code {code}"
                return "Failed", "PodFailurePolicy", message
            counted += action == "Count"
        if counted > spec.get("backoffLimit", 6):
            return "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        done = {
            pod["metadata"]["annotations"][COMPLETION_INDEX]
            for pod in pods
            if pod["status"]["phase"] == "Succeeded"
        }
        if len(done) == spec.get("completions", 1):
            return "Complete", "CompletionsReached", "Reached expected number of succeeded pods"
        return None

    def _action(self, spec: Manifest, pod: Manifest) -> tuple[str, int | None]:
        ends = [c["state"].get("terminated") for c in pod["status"].get("containerStatuses", ())]
        code = next((end["exitCode"] for end in ends if end and end["exitCode"]), None)
        conditions = [(c["type"], c["status"]) for c in pod["status"].get("conditions", ())]
        for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                return rule["action"], code
            for wanted in rule.get("onPodConditions", ()):
                if (wanted["type"], wanted["status"]) in conditions:
                    return rule["action"], code
        return "Count", code

    def _start(self, job: Manifest, index: int, again: int) -> None:
        name, template = job["metadata"]["name"], job["spec"]["template"]
        pod_name = f"{name}-{index}-{again:05d}"
        pod = {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {
                "name": pod_name,
                "namespace": job["metadata"]["namespace"],
                "labels": {**template["metadata"]["labels"], JOB_NAME: name}
                | {COMPLETION_INDEX: str(index)},
                "annotations": {COMPLETION_INDEX: str(index)},
                "uid": str(uuid.uuid4()),
            },
            "spec": copy.deepcopy(template["spec"]) | {"hostname": f"{name}-{index}"},
            "status": {"phase": "Pending"},
        }
        self.objects["Pod", pod_name] = pod
        self.kubelet.start(pod)


@contextlib.contextmanager
def running(
    cluster: MiniCluster, folder: Path, pause: float = 0.02, port: int = 0
) -> Iterator[Path]:
    """The cluster behind a socket (``port``, or any); yields its kubeconfig."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply()

        do_POST = do_DELETE = do_GET

        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            cluster.asked.append((self.command, self.path))
            try:
                if cluster.away.is_set():
                    raise Refused(503, "ServiceUnavailable", "apiserver is shutting down")
                cluster.trouble(self.command, self.path)
                code, said = cluster.answer(self.command, self.path, body)
            except ConnectionError:  # no answer at all
                self.close_connection = True
                return
            except Refused as error:
                code = error.code
                said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
                said |= {"reason": error.reason, "message": str(error)}
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    stopping = threading.Event()

    def control() -> None:
        while not stopping.wait(pause):
            cluster.control()

    work = (lambda: server.serve_forever(0.01), control)
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    config = folder / "kubeconfig"
    place = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "mini",
        "clusters": [{"name": "mini", "cluster": place}],
        "users": [{"name": "mini", "user": {}}],
        "contexts": [{"name": "mini", "context": {"cluster": "mini", "user": "mini"}}],
    }
    config.write_text(yaml.safe_dump(tree))
    try:
        yield config
    finally:
        stopping.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
