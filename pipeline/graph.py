"""Which stage needs what: the graph of a job, its keys and folders. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError, UntaxedError
from pipeline.recipes import (
    DEV_TOKENS,
    AnchorRecipe,
    BaseRecipe,
    Batch,
    ChatRecipe,
    ChooseRecipe,
    EvalRecipe,
    EvalSource,
    Frozen,
    Job,
    JudgeRecipe,
    PackRecipe,
    PrepRecipe,
    ServedModel,
    SourceRecipe,
    Suite,
)

UNKNOWN = "not adopted yet"


class PrepStep(Frozen):
    """What the prep stage is asked. ``suites``: rows that must not be trained on, none where that is
    switched off; free of how, and of how many of them, are measured."""

    prep: PrepRecipe
    suites: tuple[EvalSource, ...]


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


class ChooseStep(Frozen):
    """What the choose stage is asked: beside its own recipe, what it may not look at (``reported``), and
    what merge would refuse (``survival_floor``)."""

    choose: ChooseRecipe
    reported: tuple[EvalSource, ...]
    chat: ChatRecipe
    batch_rows: int
    temperature: float
    top_p: float
    seed: int
    confidence: float
    near_duplicate_threshold: float
    survival_floor: float


class BaselineStep(Frozen):
    """What the baseline stage is asked; free of the gate, so that jobs share it."""

    suites: tuple[Suite, ...]
    chat: ChatRecipe
    batch_rows: int
    temperature: float
    top_p: float = 1.0
    samples: int = 1
    seed: int
    endpoint: ServedModel | None = None
    judges: tuple[JudgeRecipe, ...] = ()


class EvalStep(Frozen):
    """What the eval stage is asked."""

    job: str
    eval: EvalRecipe
    chat: ChatRecipe


@dataclass(frozen=True)
class Stage:
    """One stage: its version (raise it when its output changes), recipe and upstream stages; and the
    models besides the base that it loads, by the names of its inputs."""

    name: str
    version: int
    recipe: Callable[[Job], Frozen]
    needs: Callable[[Job], tuple[str, ...]]
    sources: Callable[[Job], tuple[SourceRecipe, ...]] = lambda job: ()
    models: Callable[[Job], Mapping[str, BaseRecipe]] = lambda job: {}


def _prep(job: Job) -> PrepStep:
    suites = sorted((s.whole for s in job.eval.suites), key=lambda suite: suite.name)
    return PrepStep(prep=job.prep, suites=tuple(suites) if job.prep.decontaminate else ())


def _baseline(job: Job) -> BaselineStep:
    e = job.eval
    return BaselineStep(
        suites=e.suites,
        chat=job.chat,
        batch_rows=e.batch_rows,
        temperature=e.temperature,
        top_p=e.top_p,
        samples=e.samples,
        seed=e.seed,
        endpoint=e.endpoint.served("base") if e.endpoint else None,
        judges=e.judges,
    )


def _choose(job: Job) -> ChooseStep:
    assert job.choose is not None
    choose, dev = job.choose, job.choose.dev
    if dev is not None and dev.max_new_tokens is None:
        tokens = [s.max_new_tokens for s in job.eval.suites if s.measures != "reasoning"]
        dev = dev.model_copy(update={"max_new_tokens": max(tokens, default=DEV_TOKENS)})
        choose = choose.model_copy(update={"dev": dev})
    names = EvalSource.model_fields
    reported = [{name: getattr(suite, name) for name in names} for suite in job.eval.suites]
    return ChooseStep(
        choose=choose,
        reported=tuple(EvalSource(**said) for said in reported),
        chat=job.chat,
        batch_rows=job.eval.batch_rows,
        temperature=job.eval.temperature,
        top_p=job.eval.top_p,
        seed=job.eval.seed,
        confidence=job.eval.confidence,
        near_duplicate_threshold=job.prep.near_duplicate_threshold,
        survival_floor=job.merge.survival_floor,
    )


def _chosen(job: Job) -> tuple[str, ...]:
    return ("choose",) if job.choose else ()


def _judges(job: Job) -> dict[str, BaseRecipe]:
    return {f"judge.{judge.title}": judge.model for judge in job.eval.judges if judge.model}


def _conversations(job: Job) -> str:
    return "anchor" if job.anchor else "prep"


def _anchor(job: Job) -> AnchorStep:
    return AnchorStep(anchor=job.anchor or AnchorRecipe(), chat=job.chat)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prep",
            2,
            _prep,
            lambda j: (),
            lambda j: (*j.prep.sources, *j.prep.exclude, *_prep(j).suites),
        ),
        Stage("anchor", 2, _anchor, lambda j: ("base", "prep")),
        Stage(
            "pack",
            2,
            lambda j: PackStep(pack=j.pack, chat=j.chat, batch=j.sft.batch, epochs=j.sft.epochs),
            lambda j: ("base", _conversations(j)),
        ),
        Stage("sft", 6, lambda j: j.sft, lambda j: ("base", "pack")),
        Stage(
            "choose",
            1,
            _choose,
            lambda j: ("base", _conversations(j), "sft"),
            lambda j: (*(j.choose.suites if j.choose else ()), *j.eval.suites),
        ),
        Stage("merge", 3, lambda j: j.merge, lambda j: ("base", "sft", *_chosen(j))),
        Stage("baseline", 4, _baseline, lambda j: ("base",), lambda j: j.eval.suites, _judges),
        Stage(
            "eval",
            4,
            lambda j: EvalStep(job=j.name, eval=j.eval, chat=j.chat),
            lambda j: ("base", "prep", "baseline", "sft", *_chosen(j), "merge"),
            lambda j: j.eval.suites,
            _judges,
        ),
    )
}


def stages_of(job: Job) -> list[str]:
    """Names of the stages that ``job`` runs, in order: some are there where the job names them."""
    optional = {"anchor": job.anchor, "choose": job.choose}
    return [name for name in STAGES if optional.get(name, job) is not None]


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


def _adopted(model: BaseRecipe, label: str, workspace: Workspace, adopt: bool) -> Artifact | None:
    """A model besides the base, adopted as one; what is wrong with it is said of ``label``."""
    from pipeline.model.base import adopt_base, find_base

    try:
        return (adopt_base if adopt else find_base)(model, workspace)
    except (DataError, RecipeError) as error:
        raise type(error)(str(error).replace("base.source=", f"{label}: model.source=")) from error


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
            kind = "data" if isinstance(source, EvalSource) else "rows"
            label = f"{kind}.{source.name}"
            upstream[label] = data.folder if data else runs / f"data-{UNKNOWN}"
            upstream_keys[label] = data.manifest.key if data else ""
        for label, model in stage.models(job).items():
            found = _adopted(model, label, workspace, adopt)
            upstream[label] = found.folder if found else runs / f"base-{UNKNOWN}"
            upstream_keys[label] = found.manifest.key if found else ""
        recipe = stage.recipe(job)
        key = ""
        if all(upstream_keys.values()):
            key = art.recipe_key(name, stage.version, recipe.model_dump(mode="json"), upstream_keys)
        keys[name] = key
        folders[name] = runs / f"{name}-{key or UNKNOWN}"
        planned[name] = Planned(job, name, stage.version, key, folders[name], recipe, upstream)
    return planned
