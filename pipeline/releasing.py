"""``untaxed promote``, ``rollback`` and ``lineage``: which version of a model is released, by what
right, and whence it comes. All of it is read from the model registry; nothing is kept here.

``released`` moves to a version whose gate passed. Another one is released only by ``--override --why``,
and the reason stays with the version. ``previous`` is what was released before.
"""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError, RecipeError

RELEASED, PREVIOUS, CANDIDATE = "released", "previous", "candidate"
GATE, OVERRIDE = "untaxed.gate", "untaxed.override"
PASSED, NOT_PASSED = "passed", "not passed"
MODEL = re.compile(r"(?P<name>[^@/]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class Releases:
    """The registry behind ``client``, an mlflow.MlflowClient."""

    client: Any

    def find(self, model: str, default: str = CANDIDATE) -> Any:
        """The version that ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION`` names."""
        said = MODEL.fullmatch(model)
        if said is None:
            raise RecipeError(f"{model}: wanted NAME, NAME@ALIAS or NAME/VERSION")
        name, number = said["name"], said["version"]
        alias = None if number else said["alias"] or default
        aliases = self._aliases(name)
        if alias is not None:
            if alias not in aliases:
                have = ", ".join(f"{one} ({at})" for one, at in sorted(aliases.items())) or "none"
                raise DataError(f"{name}: has no alias {alias}; it has {have}")
            number = aliases[alias]
        known = {str(v.version): v for v in self.client.search_model_versions(f"name = '{name}'")}
        if number not in known:
            raise DataError(f"{name}: has no version {number}; it has {', '.join(sorted(known))}")
        return known[number]

    def promote(self, model: str, why: str | None = None) -> str:
        """Release a version; what was released becomes ``previous``. Returns what was done.

        RecipeError without a passed gate, where ``why`` does not say why it is released all the same.
        """
        version = self.find(model)
        now = self._aliases(version.name).get(RELEASED)
        if now == str(version.version):
            return f"{version.name}/{version.version} is released already"
        self._allow(version, "promote", why)
        self.release(version)
        return f"{version.name}/{version.version} is released" + (f", after {now}" if now else "")

    def rollback(self, name: str, why: str | None = None) -> str:
        """Release again what was released before; what is taken back has no alias then."""
        version = self.find(f"{name}@{PREVIOUS}")
        self._allow(version, "rollback", why)
        taken = self._aliases(name).get(RELEASED)
        self.client.set_registered_model_alias(name, RELEASED, version.version)
        self.client.delete_registered_model_alias(name, PREVIOUS)
        back = f"; {name}/{taken} is taken back" if taken else ""
        return f"{name}/{version.version} is released{back}"

    def release(self, version: Any) -> None:
        """``released`` to this version. The old one is ``previous`` first: a kill between loses none."""
        now = self._aliases(version.name).get(RELEASED)
        if now not in (None, str(version.version)):
            self.client.set_registered_model_alias(version.name, PREVIOUS, now)
        self.client.set_registered_model_alias(version.name, RELEASED, version.version)

    def lineage(self, model: str) -> dict[str, Any]:
        """Whence a version comes: its weights, gate, and each stage with its rows, code and image."""
        version = self.find(model, RELEASED)
        if not version.run_id:
            raise DataError(f"{version.name}/{version.version}: was not registered by a run")
        merge = self.client.get_run(version.run_id)
        parent = merge.data.tags["mlflow.parentRunId"]
        wanted = f"tags.`mlflow.parentRunId` = '{parent}'"
        runs = self.client.search_runs([merge.info.experiment_id], wanted, max_results=100)
        return {
            "model": f"{version.name}/{version.version}",
            "aliases": sorted(
                alias
                for alias, at in self._aliases(version.name).items()
                if at == str(version.version)
            ),
            "source": version.source,
            "digest": version.tags.get("untaxed.digest"),
            "gate": version.tags.get(GATE, "not known"),
            "override": json.loads(version.tags.get(OVERRIDE, "null")),
            "job": self.client.get_run(parent).data.tags.get("untaxed.job"),
            "stages": [_stage(run) for run in sorted(runs, key=lambda r: r.info.start_time)],
        }

    def _aliases(self, name: str) -> dict[str, str]:
        try:
            found = self.client.get_registered_model(name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise DataError(f"{name}: no such model; merge registers untaxed-JOB") from error
        return {alias: str(version) for alias, version in found.aliases.items()}

    def _allow(self, version: Any, what: str, why: str | None) -> None:
        gate = version.tags.get(GATE)
        if gate == PASSED:
            return
        place = f"{version.name}/{version.version}"
        if why is None:
            raise RecipeError(
                f"{place}: its gate {'did not pass' if gate else 'was never asked'}; let untaxed run"
                f" evaluate it, or say {what} {place} --override --why REASON, which is recorded"
            )
        said = {"why": why, "by": _user(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.client.set_model_version_tag(
            version.name, version.version, OVERRIDE, json.dumps(said | {"what": what})
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in a container
        return "unknown"


def _stage(run: Any) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "stage": tags.get("untaxed.stage"),
        "key": tags.get("untaxed.key"),
        "digest": tags.get("untaxed.digest"),
        "status": run.info.status,
        "revision": tags.get("mlflow.source.git.commit"),
        "image": tags.get("untaxed.image"),
        "rows": [
            {"name": one.dataset.name, "digest": one.dataset.digest}
            | dict(json.loads(one.dataset.profile or "{}"))
            for one in run.inputs.dataset_inputs
        ],
    }


def told(lineage: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person."""
    aliases = f" ({', '.join(lineage['aliases'])})" if lineage["aliases"] else ""
    yield f"{lineage['model']}{aliases}  gate {lineage['gate']}"
    if lineage["override"]:
        by = lineage["override"]
        yield f"  released by override: {by['why']} ({by['by']}, {by['at']})"
    yield f"  weights {lineage['digest']}"
    yield f"  from    {lineage['source']}"
    for stage in lineage["stages"]:
        code = f"  code {stage['revision'][:12]}" if stage["revision"] else ""
        image = f"  image {stage['image']}" if stage["image"] else ""
        yield f"  {stage['stage']:<9}{stage['key']}  {str(stage['digest'])[:16]}{code}{image}"
        for row in stage["rows"]:
            where = f"  {row['source']}" if row.get("source") else ""
            pinned = f" @ {row['revision']}" if row.get("revision") else ""
            yield f"           {row['name']:<28}{row['digest'][:16]}{where}{pinned}"
