"""Which stage needs what: the graph of a job, its keys and folders. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, UntaxedError
from pipeline.recipes import (
    AnchorRecipe,
    Batch,
    ChatRecipe,
    EvalRecipe,
    Frozen,
    Job,
    PackRecipe,
    SourceRecipe,
    Suite,
)

UNKNOWN = "not adopted yet"


class AnchorStep(Frozen):
    """What the anchor stage is asked."""

    anchor: AnchorRecipe
    chat: ChatRecipe


class PackStep(Frozen):
    """What the pack stage is asked: it also fixes the rows of every step, so it knows the batch."""

    pack: PackRecipe
    chat: ChatRecipe
    batch: Batch
    epochs: int


class BaselineStep(Frozen):
    """What the baseline stage is asked; free of the gate, so that jobs share it."""

    suites: tuple[Suite, ...]
    chat: ChatRecipe
    batch_rows: int
    temperature: float
    seed: int


class EvalStep(Frozen):
    """What the eval stage is asked."""

    job: str
    eval: EvalRecipe
    chat: ChatRecipe


@dataclass(frozen=True)
class Stage:
    """One stage: its version (raise it when its output changes), recipe and upstream stages."""

    name: str
    version: int
    recipe: Callable[[Job], Frozen]
    needs: Callable[[Job], tuple[str, ...]]
    sources: Callable[[Job], tuple[SourceRecipe, ...]] = lambda job: ()


def _baseline(job: Job) -> BaselineStep:
    e = job.eval
    return BaselineStep(
        suites=e.suites,
        chat=job.chat,
        batch_rows=e.batch_rows,
        temperature=e.temperature,
        seed=e.seed,
    )


def _conversations(job: Job) -> str:
    return "anchor" if job.anchor else "prep"


def _anchor(job: Job) -> AnchorStep:
    return AnchorStep(anchor=job.anchor or AnchorRecipe(), chat=job.chat)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prep", 1, lambda j: j.prep, lambda j: (), lambda j: j.prep.sources + j.prep.exclude),
        Stage("anchor", 2, _anchor, lambda j: ("base", "prep")),
        Stage(
            "pack",
            2,
            lambda j: PackStep(pack=j.pack, chat=j.chat, batch=j.sft.batch, epochs=j.sft.epochs),
            lambda j: ("base", _conversations(j)),
        ),
        Stage("sft", 6, lambda j: j.sft, lambda j: ("base", "pack")),
        Stage("merge", 3, lambda j: j.merge, lambda j: ("base", "sft")),
        Stage("baseline", 3, _baseline, lambda j: ("base",), lambda j: j.eval.suites),
        Stage(
            "eval",
            3,
            lambda j: EvalStep(job=j.name, eval=j.eval, chat=j.chat),
            lambda j: ("base", "baseline", "sft", "merge"),
            lambda j: j.eval.suites,
        ),
    )
}


def stages_of(job: Job) -> list[str]:
    """Names of the stages that ``job`` runs, in order."""
    return [name for name in STAGES if name != "anchor" or job.anchor is not None]


@dataclass(frozen=True)
class Workspace:
    """Where artifacts live and where relative data paths start. Knows no experiment."""

    runs: Path

    @property
    def data_root(self) -> Path:
        return Path(os.environ.get("UNTAXED_DATA", ".")).resolve()


@dataclass(frozen=True)
class Planned:
    """One stage of one job: its key (empty while an input is not adopted), folder and inputs."""

    job: Job
    name: str
    version: int
    key: str
    folder: Path
    recipe: Frozen
    upstream: Mapping[str, Path]

    def open_inputs(self) -> dict[str, Artifact]:
        """Open all upstream artifacts; DataError says which stage to run first."""
        opened = {}
        for name, folder in self.upstream.items():
            if not folder.exists():
                raise DataError(
                    f"needs {name} ({folder.name}), which is not there; run {name} first"
                )
            opened[name] = art.open_artifact(folder)
        return opened

    def sealed_from(self, inputs: Mapping[str, Artifact]) -> bool:
        """True if a sealed artifact with this key was made from exactly these input digests."""
        if not (self.folder / art.MANIFEST).exists():
            return False
        manifest = art.open_artifact(self.folder).manifest
        return manifest.key == self.key and manifest.inputs == {
            name: artifact.digest for name, artifact in inputs.items()
        }

    def state(self) -> str:
        """``sealed``, ``stale`` or ``to run``, and for the last why."""
        if not self.key:
            return f"to run: base or data {UNKNOWN}"
        if not self.folder.exists():
            return "to run: no artifact with this key"
        missing = [name for name, folder in self.upstream.items() if not folder.exists()]
        if missing:
            return f"to run: {missing[0]} is missing"
        try:
            sealed = self.sealed_from(self.open_inputs())
        except UntaxedError as error:
            return f"to run: {error}"
        return "sealed" if sealed else "to run: an input changed since it was sealed"


def plan_job(job: Job, workspace: Workspace, *, adopt: bool) -> dict[str, Planned]:
    """Keys and folders of all stages of ``job``, in order.

    With ``adopt``, base and data that are not adopted yet are adopted now; without it nothing is
    written and stages that depend on them have an empty key.
    """
    from pipeline.data.raw import adopt_source, find_source
    from pipeline.model.base import adopt_base, find_base

    runs = workspace.runs
    base = (adopt_base if adopt else find_base)(job.base, workspace)
    keys: dict[str, str] = {"base": base.manifest.key if base else ""}
    folders: dict[str, Path] = {"base": base.folder if base else runs / f"base-{UNKNOWN}"}
    planned: dict[str, Planned] = {}
    for name in stages_of(job):
        stage = STAGES[name]
        upstream = {need: folders[need] for need in stage.needs(job)}
        upstream_keys = {need: keys[need] for need in upstream}
        for source in stage.sources(job):
            data = (adopt_source if adopt else find_source)(source, workspace)
            label = f"data.{source.name}" if isinstance(source, Suite) else f"rows.{source.name}"
            upstream[label] = data.folder if data else runs / f"data-{UNKNOWN}"
            upstream_keys[label] = data.manifest.key if data else ""
        recipe = stage.recipe(job)
        key = ""
        if all(upstream_keys.values()):
            key = art.recipe_key(name, stage.version, recipe.model_dump(mode="json"), upstream_keys)
        keys[name] = key
        folders[name] = runs / f"{name}-{key or UNKNOWN}"
        planned[name] = Planned(job, name, stage.version, key, folders[name], recipe, upstream)
    return planned
