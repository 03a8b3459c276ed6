"""What the schemas of Kubernetes do not say of Jobs, and an API server refuses, or worse, takes.

Each rule yields one line for each mistake: what, where, got, wanted. ``untaxed launch`` asks them
before it makes anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from pipeline.cluster.network import code_is_alone
from pipeline.cluster.servers import models_served, servers_beside

Manifest = dict[str, Any]
Objects = Sequence[Manifest]
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?")
UNITS: dict[str | None, Decimal] = {
    None: Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** n for n, unit in enumerate("kMGTP", 1)},
    **{f"{unit}i": Decimal(1024) ** n for n, unit in enumerate("KMGTP", 1)},
}
FIELDS = re.compile(
    r"metadata\.(name|namespace|uid|labels\['[^']+'\]|annotations\['[^']+'\])"
    r"|spec\.(nodeName|serviceAccountName)|status\.(hostIPs?|podIPs?)"
)
ENUMS = {
    "completionMode": {"Indexed", "NonIndexed"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
}
ACTIONS = {"FailJob", "FailIndex", "Ignore", "Count"}
COUNTS = ("activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit", "completions")
PULLS = {"Always", "IfNotPresent", "Never", None}
SOURCES = {"configMap", "secret", "persistentVolumeClaim", "emptyDir", "projected", "downwardAPI"}
SOURCES |= {"ephemeral", "csi"}
INDEX_CHARACTERS = 5  # "-1023" behind the name of a Job in the names of its pods


def mistakes(objects: Objects) -> list[str]:
    """All that is wrong with the Jobs among ``objects``, and with what they need of the others."""
    found = []
    for one in objects:
        if one["kind"] != "Job":
            continue
        where = f"Job {one['metadata'].get('name')}"
        for rule in RULES:
            found += [f"{where}: {line}" for line in rule(one, objects)]
    return found


def amount(text: object) -> Decimal | None:
    """A quantity as a number; None for what is none."""
    said = QUANTITY.fullmatch(str(text))
    return Decimal(said[1]) * UNITS[said[2]] if said else None


def _pod(job: Manifest) -> Manifest:
    spec: Manifest = job["spec"]["template"]["spec"]
    return spec


def _containers(job: Manifest) -> Iterator[Manifest]:
    yield from _pod(job).get("initContainers") or ()
    yield from _pod(job).get("containers") or ()


def _names(objects: Objects, kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in objects if one["kind"] == kind}


def _name(job: Manifest, objects: Objects) -> Iterator[str]:
    name = str(job["metadata"].get("name"))
    if not LABEL.fullmatch(name):
        yield f"name {name!r}: wanted small letters, digits and '-', at most 63"
    elif len(name) + INDEX_CHARACTERS > 63:
        yield f"name of {len(name)} characters: wanted at most {63 - INDEX_CHARACTERS}, an index follows"
    if not job["metadata"].get("namespace"):
        yield "no namespace"


def _numbers(job: Manifest, objects: Objects) -> Iterator[str]:
    spec = job["spec"]
    for name in COUNTS:
        least = 0 if name in ("backoffLimit", "ttlSecondsAfterFinished") else 1
        if name in spec and spec[name] < least:
            yield f"{name}={spec[name]}: wanted at least {least}"
    for name, allowed in ENUMS.items():
        if name in spec and spec[name] not in allowed:
            yield f"{name}={spec[name]}: wanted one of {', '.join(sorted(allowed))}"
    if "activeDeadlineSeconds" not in spec:
        yield "no activeDeadlineSeconds: a Job that hangs would hold its nodes for ever"
    if spec.get("completionMode") == "Indexed":
        if "completions" not in spec:
            yield "completionMode Indexed without completions"
        elif spec.get("parallelism", 1) != spec["completions"]:
            yield (
                f"parallelism={spec.get('parallelism', 1)} and completions={spec['completions']}:"
                " ranks wait for one another, so all pods have to run at once"
            )


def _failures(job: Manifest, objects: Objects) -> Iterator[str]:
    spec, pod = job["spec"], _pod(job)
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield f"restartPolicy={pod.get('restartPolicy')}: a Job takes Never or OnFailure"
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy wants restartPolicy Never"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "podFailurePolicy wants podReplacementPolicy Failed: two pods would share a place"
    names = {container["name"] for container in _containers(job)}
    for number, rule in enumerate(policy.get("rules") or (), start=1):
        at = f"podFailurePolicy rule {number}"
        if rule.get("action") not in ACTIONS:
            yield f"{at}: action={rule.get('action')}: wanted one of {', '.join(sorted(ACTIONS))}"
        if rule.get("action") == "FailIndex" and "backoffLimitPerIndex" not in spec:
            yield f"{at}: FailIndex wants backoffLimitPerIndex"
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield f"{at}: wanted one of onExitCodes and onPodConditions"
        codes = rule.get("onExitCodes") or {}
        if codes and codes.get("operator") not in ("In", "NotIn"):
            yield f"{at}: operator={codes.get('operator')}: wanted In or NotIn"
        values = codes.get("values") or []
        if codes and (not values or len(set(values)) != len(values)):
            yield f"{at}: values={values}: wanted some, each once"
        if codes.get("operator") == "In" and 0 in values:
            yield f"{at}: 0 is a success and cannot be In"
        if codes.get("containerName") not in (None, *names):
            yield f"{at}: no container {codes['containerName']}"
        for condition in rule.get("onPodConditions") or ():
            if condition.get("status") not in ("True", "False", "Unknown"):
                yield f"{at}: status={condition.get('status')!r}: wanted 'True', as a text"


def _volumes(job: Manifest, objects: Objects) -> Iterator[str]:
    volumes = _pod(job).get("volumes") or []
    for name, count in Counter(volume["name"] for volume in volumes).items():
        if count > 1:
            yield f"volume {name}: is there {count} times"
    for volume in volumes:
        kinds = set(volume) - {"name"}
        if len(kinds) != 1 or not kinds <= SOURCES:
            yield f"volume {volume['name']}: {', '.join(sorted(kinds)) or 'no source'}"
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if claim and claim not in _names(objects, "PersistentVolumeClaim"):
            yield f"volume {volume['name']}: no PersistentVolumeClaim {claim}"
        carried = volume.get("configMap") or {}
        missing = carried.get("name") not in {None, *_names(objects, "ConfigMap")}
        if missing and not carried.get("optional"):
            yield f"volume {volume['name']}: no ConfigMap {carried['name']}"
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        if size is not None and amount(size) is None:
            yield f"volume {volume['name']}: sizeLimit={size}: wanted a quantity"
    known = {volume["name"] for volume in volumes}
    for container in _containers(job):
        mounts = container.get("volumeMounts") or []
        for path, count in Counter(mount["mountPath"] for mount in mounts).items():
            if count > 1:
                yield f"{container['name']}: mounts {count} volumes at {path}"
            if not path.startswith("/"):
                yield f"{container['name']}: mountPath {path}: wanted an absolute path"
        for mount in mounts:
            if mount["name"] not in known:
                yield f"{container['name']}: mounts {mount['name']}, which is no volume"


def _shared_memory(job: Manifest, objects: Objects) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in _pod(job).get("volumes") or ()}
    for container in _containers(job):
        for mount in container.get("volumeMounts") or ():
            if mount["mountPath"] != "/dev/shm" or mount["name"] not in volumes:
                continue
            source = volumes[mount["name"]].get("emptyDir") or {}
            if source.get("medium") != "Memory":
                yield "/dev/shm is not in memory: wanted emptyDir with medium Memory"
            limit = amount((container.get("resources") or {}).get("limits", {}).get("memory"))
            size = amount(source.get("sizeLimit"))
            if size is None:
                yield "/dev/shm has no sizeLimit: it may take all memory of the node"
            elif limit is not None and size >= limit:
                yield f"/dev/shm of {source['sizeLimit']} takes all memory of {container['name']}"


def _resources(job: Manifest, objects: Objects) -> Iterator[str]:
    for container in _containers(job):
        stated = container.get("resources") or {}
        asked, limits = stated.get("requests") or {}, stated.get("limits") or {}
        for kind, of in (("requests", asked), ("limits", limits)):
            for name, text in of.items():
                if amount(text) is None:
                    yield f"{container['name']}: {kind}.{name}={text}: wanted a quantity"
        for name in ("cpu", "memory"):
            if name not in limits:
                yield f"{container['name']}: no limit of {name}"
        for name in asked.keys() & limits.keys():
            one, most = amount(asked[name]), amount(limits[name])
            if one is not None and most is not None and one > most:
                yield f"{container['name']}: asks {asked[name]} of {name}, and may have {limits[name]}"
        for name in {*asked, *limits}:
            extended = "/" in name
            if extended and asked.get(name, limits.get(name)) != limits.get(name):
                yield f"{container['name']}: {name}: requests and limits have to be equal"
            whole = amount(limits.get(name, 0))
            if extended and whole is not None and whole != int(whole):
                yield f"{container['name']}: {name}={limits[name]}: wanted a whole number"


def _environment(job: Manifest, objects: Objects) -> Iterator[str]:
    for container in _containers(job):
        variables = container.get("env") or []
        for name, count in Counter(variable["name"] for variable in variables).items():
            if count > 1:
                yield f"{container['name']}: {name} is set {count} times"
        for variable in variables:
            at = f"{container['name']}: {variable['name']}"
            source = variable.get("valueFrom") or {}
            if bool(source) and "value" in variable:
                yield f"{at}: has a value and valueFrom"
            path = (source.get("fieldRef") or {}).get("fieldPath")
            if path is not None and not FIELDS.fullmatch(path):
                yield f"{at}: fieldPath {path} is none that a pod can read"
            key = source.get("configMapKeyRef") or {}
            there = key.get("name") in {None, *_names(objects, "ConfigMap")}
            if not there and not key.get("optional"):
                yield f"{at}: no ConfigMap {key['name']}"


def _security(job: Manifest, objects: Objects) -> Iterator[str]:
    """Pod Security "restricted", which a namespace may or may not enforce."""
    pod = _pod(job)
    own = pod.get("securityContext") or {}
    if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
        yield "may run as root: wanted securityContext.runAsNonRoot true and another user than 0"
    if (own.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "no seccompProfile: wanted RuntimeDefault"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is on"
    if pod.get("automountServiceAccountToken") is not False:
        yield "carries a token of the API server: wanted automountServiceAccountToken false"
    account = pod.get("serviceAccountName")
    if account and account not in _names(objects, "ServiceAccount"):
        yield f"no ServiceAccount {account}"
    for container in _containers(job):
        said = container.get("securityContext") or {}
        if said.get("privileged"):
            yield f"{container['name']}: is privileged"
        if said.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: may gain privileges"
        if said.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']}: may write its root file system"
        capabilities = said.get("capabilities") or {}
        if capabilities.get("drop") != ["ALL"]:
            yield f"{container['name']}: keeps capabilities: wanted drop [ALL]"
        if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
            yield f"{container['name']}: adds {', '.join(capabilities['add'])}: not restricted"


def _images(job: Manifest, objects: Objects) -> Iterator[str]:
    for container in _containers(job):
        image = container.get("image") or ""
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{container['name']}: image {image!r}: wanted a tag or a digest that stays"
        if container.get("imagePullPolicy") not in PULLS:
            yield f"{container['name']}: imagePullPolicy={container['imagePullPolicy']}"


def _training(job: Manifest, objects: Objects) -> Iterator[str]:
    """Of a Job whose pods find one another: names, addresses, counts and times agree."""
    pod, name = _pod(job), job["metadata"].get("name")
    values = {
        variable["name"]: variable.get("value")
        for container in _containers(job)
        for variable in container.get("env") or ()
    }
    if "PET_NNODES" not in values:
        return
    nodes = job["spec"].get("completions", 1)
    if values["PET_NNODES"] != str(nodes):
        yield f"PET_NNODES={values['PET_NNODES']} and completions={nodes}: wanted the same"
    if nodes > 1 and job["spec"].get("backoffLimit") != 0:
        yield "backoffLimit is not 0: a pod that is replaced alone meets peers that wait"
    domain = pod.get("subdomain")
    own = [one for one in objects if one["kind"] == "Service" and one["metadata"]["name"] == domain]
    if not own:
        yield f"subdomain {domain}: no Service of that name"
    for service in own:
        spec = service["spec"]
        if spec.get("selector") != {"batch.kubernetes.io/job-name": name}:
            yield f"Service {domain}: selects {spec.get('selector')}, not the pods of this Job"
        if spec.get("clusterIP") != "None":
            yield f"Service {domain}: is not headless: wanted clusterIP None"
        if spec.get("publishNotReadyAddresses") is not True:
            yield f"Service {domain}: hides pods that are not ready, and rank 0 is met before it is"
        ports = {str(port["port"]) for port in spec.get("ports") or ()}
        if values.get("PET_MASTER_PORT") not in ports:
            yield f"PET_MASTER_PORT={values.get('PET_MASTER_PORT')}: Service {domain} has {sorted(ports)}"
    if values.get("PET_MASTER_ADDR") != f"{name}-0.{domain}":
        yield f"PET_MASTER_ADDR={values.get('PET_MASTER_ADDR')}: wanted {name}-0.{domain}"
    grace = pod.get("terminationGracePeriodSeconds", 30)
    shutdown = float(values.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30)
    if shutdown >= grace:
        yield f"terminationGracePeriodSeconds={grace}: wanted more than the {shutdown:g} s of its ranks"


Rule = Callable[[Manifest, Objects], Iterator[str]]
RULES: tuple[Rule, ...] = (
    _name,
    _numbers,
    _failures,
    _volumes,
    _shared_memory,
    _resources,
    _environment,
    _security,
    _images,
    _training,
    servers_beside,
    models_served,
    code_is_alone,
)
