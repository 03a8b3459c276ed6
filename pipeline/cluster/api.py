"""The cluster as a launcher needs it: make, list and delete objects, and read logs.

Nothing is cached and nothing is remembered: whoever asks again learns what is there. A cluster that
does not answer is asked again for a while, since what runs there goes on without a launcher.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError
from yaml import YAMLError

from pipeline.cluster.objects import Manifest
from pipeline.errors import RecipeError, UntaxedError

PATIENCE_SECONDS = 600.0
POLL_SECONDS = 5.0
REQUEST_SECONDS = (10, 60)
T = TypeVar("T")
# kind -> (API, the end of its methods' names, model)
KINDS = {
    "Namespace": ("CoreV1Api", "namespace"),
    "ServiceAccount": ("CoreV1Api", "namespaced_service_account"),
    "ConfigMap": ("CoreV1Api", "namespaced_config_map"),
    "Secret": ("CoreV1Api", "namespaced_secret"),
    "Service": ("CoreV1Api", "namespaced_service"),
    "PersistentVolumeClaim": ("CoreV1Api", "namespaced_persistent_volume_claim"),
    "NetworkPolicy": ("NetworkingV1Api", "namespaced_network_policy"),
    "Deployment": ("AppsV1Api", "namespaced_deployment"),
    "StatefulSet": ("AppsV1Api", "namespaced_stateful_set"),
    "Job": ("BatchV1Api", "namespaced_job"),
    "JobSet": ("CustomObjectsApi", "namespaced_custom_object"),
}
KUEUE, KUEUE_VERSIONS = "kueue.x-k8s.io", ("v1beta2", "v1beta1")
JOBSET = ("jobset.x-k8s.io", "v1alpha2")


class Cluster:
    """One namespace of the cluster that kubeconfig (or the pod this runs in) names."""

    def __init__(
        self,
        namespace: str,
        context: str | None = None,
        say: Callable[[str], None] = print,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.namespace, self.say, self.patience = namespace, say, patience
        self.context = context
        logging.getLogger("urllib3").setLevel(
            logging.ERROR
        )  # what it tries again is said once, by us
        self.apis = self._apis()

    def _apis(self) -> dict[str, Any]:
        """As kubeconfig says now; RecipeError where it names no cluster."""
        said = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        there = any(Path(path).is_file() for path in said.split(os.pathsep) if path)
        inside = "KUBERNETES_SERVICE_HOST" in os.environ and not there
        if not inside and not there:
            raise RecipeError(
                f"no kubeconfig: {said} is not there; name one in KUBECONFIG, or get one from who"
                " runs the cluster"
            )
        try:
            if inside:
                config.load_incluster_config()  # type: ignore[no-untyped-call]
            else:
                config.load_kube_config(said, self.context)  # type: ignore[no-untyped-call]
        except (config.ConfigException, YAMLError, OSError, TypeError, AttributeError) as error:
            where = f"context {self.context}" if self.context else "its current context"
            raise RecipeError(
                f"kubeconfig {said}: {where} names no cluster: {_told(error)}; see kubectl config"
                " get-contexts"
            ) from error
        return {api: getattr(client, api)() for api, _ in KINDS.values()}

    def create(self, manifest: Manifest) -> bool:
        """Make it; False where one of that name is there already. RecipeError for what the cluster
        refuses."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        api, words = KINDS.get(kind, (None, None))
        if api is None:
            raise RecipeError(f"{kind} {name}: launch knows {', '.join(KINDS)}; kubectl apply it")
        space = [self.namespace] if words.startswith("namespaced") else []  # type: ignore[union-attr]
        place = [*JOBSET, *space, "jobsets"] if kind == "JobSet" else space
        try:
            self._ask(api, f"create_{words}", *place, manifest)
        except ApiException as error:
            if error.status == 409:
                return False  # AlreadyExists: a conflict of another kind is asked again
            if error.status == 403 and kind == "Namespace":
                return False  # who may not make one may still use it, where it is there
            if error.status == 404 and kind == "JobSet":
                raise RecipeError(
                    f"JobSet {name}: the cluster has no JobSet controller; install it, or launch"
                    " without --jobset"
                ) from error
            raise self._refusal(f"{kind} {name}", error) from error
        return True

    def read(self, manifest: Manifest) -> Manifest | None:
        """What is there of its kind and name; None where it may not be read, or is gone."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        api, words = KINDS[kind]
        try:
            found: Manifest = self._ask(api, f"read_{words}", name, self.namespace)
        except ApiException as error:
            if error.status in (403, 404):
                return None
            raise self._refusal(f"{kind} {name}", error) from error
        return found

    def has_config_map(self, name: str) -> bool:
        try:
            self._ask("CoreV1Api", "read_namespaced_config_map", name, self.namespace)
        except ApiException as error:
            if error.status == 404:
                return False
            raise self._refusal(f"ConfigMap {name}", error) from error
        return True

    def jobs(self, labels: dict[str, str]) -> list[Manifest]:
        return self._list("BatchV1Api", "list_namespaced_job", labels)

    def workloads(self, job: Manifest) -> list[Manifest] | None:
        """What Kueue has made of a Job; None where the cluster has no Kueue."""
        ask = "CustomObjectsApi", "list_namespaced_custom_object"
        wanted = f"kueue.x-k8s.io/job-uid={job['metadata'].get('uid')}"
        for version in KUEUE_VERSIONS:
            place = (KUEUE, version, self.namespace, "workloads")
            try:
                return list(self._ask(*ask, *place, label_selector=wanted)["items"])
            except ApiException as error:
                if error.status != 404:
                    raise self._refusal("workloads of Kueue", error) from error
        return None

    def pods(self, job: str) -> list[Manifest]:
        labels = {"batch.kubernetes.io/job-name": job}
        return self._list("CoreV1Api", "list_namespaced_pod", labels)

    def events(self, names: set[str]) -> list[Manifest]:
        """Of the objects of these names, the latest last."""
        every = self._list("CoreV1Api", "list_namespaced_event", {})
        own = [event for event in every if event["involvedObject"].get("name") in names]
        return sorted(own, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def delete_job(self, name: str) -> None:
        """The Job and its pods, which get SIGTERM; nothing where it is gone."""
        ask = "BatchV1Api", "delete_namespaced_job"
        try:
            self._ask(*ask, name, self.namespace, propagation_policy="Foreground")
        except ApiException as error:
            if error.status != 404:
                raise self._refusal(f"Job {name}", error) from error

    def log(self, pod: str, lines: int) -> list[str]:
        """The last lines that a pod printed; none while it has printed nothing or is gone."""
        ask = "CoreV1Api", "read_namespaced_pod_log"
        try:
            text = self._ask(*ask, pod, self.namespace, tail_lines=lines, raw=True)
        except ApiException:
            return []
        return str(text).splitlines()[-lines:]

    def _list(self, api: str, method: str, labels: dict[str, str]) -> list[Manifest]:
        wanted = ",".join(f"{name}={value}" for name, value in labels.items())
        try:
            found = self._ask(api, method, self.namespace, label_selector=wanted)
        except ApiException as error:
            raise self._refusal(f"namespace {self.namespace}", error) from error
        return list(found["items"])

    def _ask(self, api: str, method: str, *arguments: Any, raw: bool = False, **more: Any) -> Any:
        """The answer as the cluster gives it; ApiException for a refusal, UntaxedError for a cluster
        that has not answered for so long."""
        began, told, renewed = time.monotonic(), False, False
        while True:
            try:
                response = getattr(self.apis[api], method)(
                    *arguments, _preload_content=False, _request_timeout=REQUEST_SECONDS, **more
                )
                text = response.data.decode("utf-8", errors="replace")
                if response.status >= 300:
                    raise ApiException(status=response.status, reason=response.reason, body=text)
                return text if raw else json.loads(text)
            except (HTTPError, OSError, ApiException, json.JSONDecodeError) as error:
                if getattr(error, "status", None) == 401 and not renewed:
                    self.apis, renewed = self._apis(), True  # a token may have been replaced there
                    continue
                passes = not isinstance(error, ApiException) or _passes(error)
                if not passes:
                    raise
                if time.monotonic() - began > self.patience:
                    raise UntaxedError(
                        f"the cluster has not answered for {self.patience:.0f} s ({_told(error)});"
                        " what runs there goes on: launch again to follow it"
                    ) from error
                if not told:
                    self.say(f"the cluster does not answer ({_told(error)}); asking again")
                told = True
                time.sleep(min(POLL_SECONDS, self.patience / 10))

    def _refusal(self, what: str, error: ApiException) -> UntaxedError:
        """In plain words, with the way out."""
        said = _told(error)
        if error.status == 401:
            return UntaxedError(
                f"{what}: the cluster does not know you (401: {said}): your credentials have expired or"
                " are of another cluster; log in again and launch again, what runs there goes on"
            )
        if error.status == 403 and "exceeded quota" in said:
            return UntaxedError(
                f"{what}: the quota of namespace {self.namespace} is used up: {said}; raise it, or free"
                " some, and launch again"
            )
        if error.status == 403:
            return RecipeError(
                f"{what}: you may not do this: {said}; ask for a role in namespace {self.namespace}"
                " that may"
            )
        if error.status == 404 and f'namespaces "{self.namespace}"' in said:
            return RecipeError(
                f"{what}: there is no namespace {self.namespace}; kubectl create namespace"
                f" {self.namespace}, or keep it among the overlay's resources"
            )
        return RecipeError(f"{what}: {said}")


def _passes(error: ApiException) -> bool:
    """A list that is too old (410) is asked for anew, from its beginning, and so is what met another
    change (a quota's count, 409)."""
    if error.status == 409:
        return '"reason":"AlreadyExists"' not in str(error.body or "").replace(" ", "")
    return error.status in (None, 0, 410, 429) or error.status >= 500


def _told(error: Exception) -> str:
    """What the API server says, in one line."""
    body = getattr(error, "body", None)
    try:
        said = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        said = ""
    return " ".join(str(said or getattr(error, "reason", "") or error).split())[:400]
