"""What each part of a recipe does: one job, changed in one place at a time, all of it measured alike.

UNTAXED_DATA=DATA python benchmarks/recipes.py --runs FOLDER [--json FILE] [--only NAME ...]

Every line is a job file that is written below FOLDER/recipes and run by ``untaxed run``: what is sealed
is not run again, so that a stopped benchmark goes on, and lines share what they have in common. JSON
and table hold the lines that are finished.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifact import open_artifact, write_atomic
from pipeline.graph import Workspace, plan_job
from pipeline.jobfile import apply_set, load_job
from pipeline.recipes import METRICS

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "untaxed-smollm2.yaml"
TRAINING = ("anchor", "pack", "sft")


@dataclass(frozen=True)
class Recipe:
    """``changes`` as of ``--set``; ``without``: sources that are left out; ``limits``: rows of a
    source."""

    name: str
    what: str
    changes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """The job file that runs it."""
        tree: dict[str, Any] = yaml.safe_load(JOB.read_text(encoding="utf-8"))
        sources = {source["name"]: source for source in tree["prep"]["sources"]}
        lost = {*self.without, *self.limits} - set(sources)
        if lost:
            raise SystemExit(f"{self.name}: {JOB.name} has no source {min(lost)}")
        for name, limit in self.limits.items():
            sources[name]["limit"] = limit
        kept = [source for name, source in sources.items() if name not in self.without]
        tree["prep"]["sources"] = kept
        for change in (f"name={self.name}", *self.changes):
            apply_set(tree, change)
        return tree

    def but(self, name: str, what: str, *changes: str, **more: Any) -> Recipe:
        """The same with more changed."""
        return replace(self, name=name, what=what, changes=(*self.changes, *changes), **more)

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed."""
        name = f"{self.name}-seed-{seed}"
        return self.but(name, "another seed", f"sft.seed={seed}", f"pack.seed={seed}")


ANCHORS = ("contrast-harmless", "borderline", "harmless", "ordinary", "arithmetic")
EARLY = "sft.lora.layers={from_fraction: 0.0, to_fraction: 0.3333}"
LATE = "sft.lora.layers={from_fraction: 0.6667, to_fraction: 1.0}"
BEST = Recipe("untaxed", "the job as it is")
ALL = BEST.but("unscaled", "the update as it was trained, without a choice", "choose=null")
FIRST = ALL.but(
    "no-sample",
    "unscaled; no harmful or ordinary rows of the sample, all of STAR-1",
    without=("harmful", "ordinary"),
    limits={"star1": 1000},
)
ONE = FIRST.but("rank-1", "no-sample, rank 1, so that alpha / rank is 16", "sft.lora.rank=1")
MORE = ALL.but("more-arithmetic", "unscaled, 300 of arithmetic", limits={"arithmetic": 300})
RECIPES = (
    BEST,
    BEST.seeded(1),
    BEST.seeded(2),
    ALL,
    FIRST,
    FIRST.seeded(1),
    FIRST.seeded(2),
    ONE,
    ONE.seeded(1),
    ONE.seeded(2),
    ONE.but(
        "rank-1-no-contrast",
        "no-sample, rank 1, no contrast rows",
        without=("harmful", "ordinary", "contrast-harmful", "contrast-harmless"),
    ),
    ALL.but("sample-rank-1", "unscaled, rank 1", "sft.lora.rank=1"),
    MORE,
    MORE.but("more-arithmetic-rank-1", "unscaled, 300 of arithmetic, rank 1", "sft.lora.rank=1"),
    FIRST.but("scaled-down", "no-sample; update times 0.75 at the merge", "merge.scale=0.75"),
    FIRST.but("scaled-up", "no-sample; update times 1.25 at the merge", "merge.scale=1.25"),
    ALL.but("late", "last third of the layers", LATE),
    ALL.but("early", "first third of the layers", EARLY),
    ALL.but("mlp", "gate, up and down", "sft.lora.targets=mlp"),
    ALL.but("rslora", "alpha / sqrt(rank)", "sft.lora.alpha_policy=rslora"),
    ALL.but("proportional", "alpha, whatever the rank", "sft.lora.alpha_policy=proportional"),
    ALL.but(
        "refusals-only",
        "no anchors",
        "anchor=null",
        "sft.anchors={objective: sft}",
        without=ANCHORS,
    ),
    ALL.but(
        "sft-anchors",
        "whole answers of up to 64 tokens, by cross-entropy",
        "sft.anchors={objective: sft}",
        "anchor.truncated=drop",
        "anchor.max_new_tokens=64",
    ),
    ALL.but("kl-half", "KL weight halved", "sft.anchors.weight=3"),
    ALL.but("kl-double", "KL weight doubled", "sft.anchors.weight=12"),
    ALL.but("half-mixed", "half of the anchors from Alpaca", limits={"harmless": 300}),
    ALL.but("no-borderline", "no borderline rows", without=("borderline",)),
    ALL.but(
        "primer",
        "a safety primer in place of refusals, and 64 tokens to answer in",
        "prep.refusal_response=null",
        "prep.safety_primer=Let me think.",
        'chat={think_open: "Is this safe? ", think_close: "\\n\\n"}',  # this model has no marks
        "eval.suites.0.max_new_tokens=64",
        "eval.suites.1.max_new_tokens=64",
    ),
    ALL.but("rewritten", "refusals worded by the base", "anchor.rewrite_refusals={}"),
)


def run(recipe: Recipe, runs: Path, nproc: int) -> dict[str, Any]:
    """All stages that are not sealed; what was measured. SystemExit where a stage fails."""
    job = runs / "recipes" / f"{recipe.name}.yaml"
    job.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(job, yaml.safe_dump(recipe.tree(), sort_keys=False))
    command = [sys.executable, "-m", "pipeline.cli", "run", "--runs", str(runs), "--job", str(job)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if subprocess.run([*command, "--nproc", str(nproc)], env=environment).returncode:
        raise SystemExit(f"{recipe.name}: failed; run the same command to go on")
    planned = plan_job(load_job(job), Workspace(runs.resolve()), adopt=False)
    report = json.loads((planned["eval"].folder / "report.json").read_text(encoding="utf-8"))
    seconds = {n: open_artifact(stage.folder).manifest.seconds for n, stage in planned.items()}
    return {
        "what": recipe.what,
        "base": {name: report["base"].get(name) for name in METRICS},
        "aligned": {name: report["aligned"].get(name) for name in METRICS},
        "passed": report["gate"]["passed"],
        "seconds": seconds,
        "processor": platform.processor() or platform.machine(),
        "processes": nproc,
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line a recipe, shares in percent with their intervals."""
    head = "| recipe | changed | StrongREJECT refused | XSTest-safe refused | GSM8K refused"
    lines = [head + " | loss on GSM8K | gate | training, s |", "|" + "---|" * 8]
    shares = ("harmful_refusal", "borderline_refusal", "benign_refusal")

    def line(name: str, what: str, row: Mapping[str, Any], gate: str, seconds: str) -> str:
        cells = [
            f"{m['value']:.0%} [{m['low']:.0%}, {m['high']:.0%}]" for m in map(row.get, shares)
        ]
        return "| " + " | ".join([name, what, *cells, row["loss"], gate, seconds]) + " |"

    for number, (name, one) in enumerate(found.items()):
        before = one["base"]["reasoning_nll"]["value"]
        if not number:
            base = one["base"] | {"loss": f"{before:.3f}"}
            lines.append(line("base", "", base, "", ""))
        change = one["aligned"]["reasoning_nll"]["value"] / before - 1
        trained = sum(one["seconds"].get(stage, 0.0) for stage in TRAINING)
        aligned = one["aligned"] | {"loss": f"{change:+.1%}"}
        gate = "passed" if one["passed"] else "not passed"
        lines.append(line(name, one["what"], aligned, gate, f"{trained:.0f}"))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=[r.name for r in RECIPES], metavar="NAME")
    parser.add_argument("--nproc", type=int, default=1, help="processes of the sft stage")
    options = parser.parse_args(argv)
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    for recipe in RECIPES:
        if options.only and recipe.name not in options.only:
            continue
        found[recipe.name] = run(recipe, options.runs, options.nproc)
        found = {r.name: found[r.name] for r in RECIPES if r.name in found}
        if options.json:
            write_atomic(options.json, json.dumps(found, indent=1) + "\n")
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
