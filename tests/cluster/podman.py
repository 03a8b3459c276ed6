"""A kubelet for the cluster in miniature: each pod is one container of podman, as its spec says.

Claims are folders of the host. What a pod may ask for and is not here (more than one container, probes,
node selectors) is refused rather than left out, so that a test never passes for a spec that did not run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from cluster.minicluster import Manifest, MiniCluster, now

USER = 10001
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
VARIABLE = re.compile(r"\$\(([A-Z0-9_]+)\)")
LABEL = re.compile(r"metadata\.labels\['(.+)'\]")
KNOWN = {
    "containers", "volumes", "restartPolicy", "serviceAccountName", "automountServiceAccountToken",
    "enableServiceLinks", "securityContext", "hostname", "subdomain", "terminationGracePeriodSeconds",
}  # fmt: skip


os.environ["CONTAINERS_CONF"] = str(Path(__file__).with_name("containers.conf"))


def podman(*words: str, check: bool = True) -> str:
    """What ``podman WORDS`` prints. CalledProcessError, with what it says, for one that fails."""
    done = subprocess.run(["podman", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"podman {' '.join(words[:3])}: {done.stderr.strip()[-400:]}")
    return done.stdout


def missing() -> str:
    """Why pods cannot run here, or nothing. RuntimeError where they have to."""
    why = ""
    if shutil.which("podman") is None:
        why = "needs podman"
    elif subprocess.run(["podman", "image", "exists", "localhost/untaxed:cpu"]).returncode:
        why = "needs the image localhost/untaxed:cpu: make image"
    if why and os.environ.get("UNTAXED_NEEDS_CONTAINERS"):
        raise RuntimeError(f"UNTAXED_NEEDS_CONTAINERS is set: {why}")
    return why


class NotReady(Exception):
    """The container cannot be made; ``reason`` is the kubelet's word for it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Podman:
    """``folder`` holds claims (``claims/NAME``) and what pods need; ``name`` keeps clusters apart."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.cluster: MiniCluster | None = None
        self.waiting: dict[str, Manifest] = {}
        self.evicted: dict[str, Manifest] = {}
        self.ended: dict[str, Manifest] = {}
        self.logs: dict[str, str] = {}
        self.stopping: list[threading.Thread] = []
        podman("network", "create", name)

    def close(self) -> None:
        """No container and no network is left."""
        for thread in self.stopping:
            thread.join()
        label = f"label=untaxed-mini={self.name}"
        for one in podman("ps", "--all", "--quiet", "--filter", label).split():
            podman("rm", "--force", "--time", "0", one)
        podman("network", "rm", "--force", self.name)

    def claim(self, name: str) -> Path:
        """The folder of a claim, writable for the user of the image."""
        folder = self.folder / "claims" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, USER, USER)
        return folder

    def start(self, pod: Manifest) -> None:
        name = pod["metadata"]["name"]
        try:
            podman("run", "--detach", "--name", self._own(name), *self._words(pod))
        except NotReady as error:
            waiting = {"reason": error.reason, "message": str(error)}
            self.waiting[name] = {
                "phase": "Pending",
                "containerStatuses": [{"name": "stage", "state": {"waiting": waiting}}],
            }

    def look(self, pod: Manifest) -> Manifest:
        name = pod["metadata"]["name"]
        if name in self.waiting:
            return self.waiting[name]
        said = json.loads(podman("inspect", self._own(name)))[0]["State"]
        if said["Status"] not in ("exited", "stopped"):
            return {
                "phase": "Running",
                "containerStatuses": [{"name": "stage", "state": {"running": {}}}],
            }
        code = said["ExitCode"]
        words = self._last_words(name).read_text().strip() or self.log(pod)[-2048:]
        reason = "OOMKilled" if said["OOMKilled"] else "Completed" if code == 0 else "Error"
        end = {"exitCode": code, "reason": reason, "message": words, "finishedAt": now()}
        found = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "stage", "state": {"terminated": end}}],
        }
        return found | self.evicted.get(name, {})

    def stop(self, pod: Manifest) -> None:
        name = pod["metadata"]["name"]
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        words = ["stop", "--time", str(grace), self._own(name)]
        thread = threading.Thread(target=podman, args=words, kwargs={"check": False})
        thread.start()
        self.stopping.append(thread)

    def evict(self, pod: Manifest, grace: int) -> None:
        """As a node that is drained does: SIGTERM, and SIGKILL after ``grace`` seconds."""
        name = pod["metadata"]["name"]
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
        }
        self.evicted[name] = {"conditions": [condition | {"message": "Eviction API: evicting"}]}
        self.stop({**pod, "spec": {**pod["spec"], "terminationGracePeriodSeconds": grace}})

    def log(self, pod: Manifest) -> str:
        name = pod["metadata"]["name"]
        done = subprocess.run(
            ["podman", "logs", self._own(name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return "" if done.returncode else done.stdout

    def _own(self, pod: str) -> str:
        return f"{self.name}-{pod}"

    def _last_words(self, pod: str) -> Path:
        return self.folder / "pods" / pod / "termination-log"

    def _words(self, pod: Manifest) -> list[str]:
        spec, meta = pod["spec"], pod["metadata"]
        strange = {key for key in spec if key not in KNOWN}
        if strange or len(spec["containers"]) != 1:
            raise NotImplementedError(f"pod {meta['name']}: cannot run {sorted(strange)}")
        container = spec["containers"][0]
        image = f"localhost/{container['image']}"
        if subprocess.run(["podman", "image", "exists", image]).returncode:
            raise NotReady("ErrImageNeverPull", f"image {image} is not on the node")
        own = self.folder / "pods" / meta["name"]
        own.mkdir(parents=True)
        last = self._last_words(meta["name"])
        last.touch()
        os.chown(last, USER, USER)
        user, rights = spec["securityContext"], container["securityContext"]
        words = [
            f"--label=untaxed-mini={self.name}",
            f"--hostname={spec['hostname']}",
            f"--network={self.name}:alias={spec['hostname']}"
            + (f",alias={spec['hostname']}.{spec['subdomain']}" if "subdomain" in spec else ""),
            f"--user={user['runAsUser']}:{user['runAsGroup']}",
            f"--volume={last}:/dev/termination-log",
            f"--memory={size(container['resources']['limits']['memory'])}",
            f"--memory-swap={size(container['resources']['limits']['memory'])}",
        ]
        words += (
            ["--read-only", "--read-only-tmpfs=false"] if rights["readOnlyRootFilesystem"] else []
        )
        words += [] if rights["allowPrivilegeEscalation"] else ["--security-opt=no-new-privileges"]
        words += [f"--cap-drop={name}" for name in rights["capabilities"]["drop"]]
        volumes = {one["name"]: one for one in spec["volumes"]}
        for mount in container["volumeMounts"]:
            words += self._mount(volumes[mount["name"]], mount, own)
        environment = self._environment(container, pod)
        words += [f"--env={name}={value}" for name, value in environment.items()]
        command = [
            VARIABLE.sub(lambda found: environment.get(found[1], found[0]), word)
            for word in container["args"]
        ]
        return [*words, image, *command]

    def _mount(self, volume: Manifest, mount: Manifest, own: Path) -> list[str]:
        options = "ro" if mount.get("readOnly") else "rw"
        if "persistentVolumeClaim" in volume:
            name = volume["persistentVolumeClaim"]["claimName"]
            self._object("PersistentVolumeClaim", name)
            return [f"--volume={self.claim(name)}:{mount['mountPath']}:{options}"]
        if "configMap" in volume:
            folder = own / volume["name"]
            folder.mkdir()
            for file, text in self._object("ConfigMap", volume["configMap"]["name"])[
                "data"
            ].items():
                (folder / file).write_text(text)
            return [f"--volume={folder}:{mount['mountPath']}:ro"]
        empty = volume["emptyDir"]
        limit = size(empty["sizeLimit"])
        return [f"--tmpfs={mount['mountPath']}:rw,exec,nosuid,mode=1777,size={limit}"]

    def _object(self, kind: str, name: str) -> Manifest:
        assert self.cluster is not None
        found = self.cluster.objects.get((kind, name))
        if found is None:
            raise NotReady("CreateContainerConfigError", f'{kind.lower()} "{name}" not found')
        return found

    def _environment(self, container: Manifest, pod: Manifest) -> dict[str, str]:
        found = {}
        if (index := pod["metadata"]["annotations"].get(INDEX)) is not None:
            found["JOB_COMPLETION_INDEX"] = index
        for variable in container.get("env", ()):
            value = self._value(variable, pod)
            if value is not None:
                found[variable["name"]] = value
        return found

    def _value(self, variable: Manifest, pod: Manifest) -> str | None:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            label = LABEL.fullmatch(source["fieldRef"]["fieldPath"])
            return str(pod["metadata"]["labels"][label[1]] if label else pod["metadata"]["name"])
        kind = "ConfigMap" if "configMapKeyRef" in source else "Secret"
        wanted = source["configMapKeyRef" if kind == "ConfigMap" else "secretKeyRef"]
        try:
            return str(self._object(kind, wanted["name"])["data"][wanted["key"]])
        except (NotReady, KeyError):
            if wanted.get("optional"):
                return None
            raise


INDEX = "batch.kubernetes.io/job-completion-index"


def size(text: str) -> int:
    """Bytes of a quantity of memory."""
    return int(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else int(text)


def wait_for(found: Any, seconds: float, what: str) -> Any:
    """What ``found()`` gives, once it is anything. AssertionError after so long."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, f"not seen in {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return value
