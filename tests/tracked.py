"""Parts of the tracking tests: a job of small sealed stages, and what a real MLflow holds of it.

A plugin of fixtures without asserts (PYTEST_DONT_REWRITE).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from parts import ROOT

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.graph import Workspace, plan_job
from pipeline.jobfile import parse_job
from pipeline.recipes import Job
from pipeline.tracking import Tracker, store_uri

GATE = {"gate_passed": True, "aligned_harmful_refusal": 0.97}
FILES = {
    "prep": {"sheet.json": "{}", "sheet.md": "# Data sheet", "train.jsonl": "x" * 99},
    "pack": {"trained.txt": ">>>I cannot.<<<", "tokens.safetensors": "x"},
    "merge": {"README.md": "# A merged model", "certificate.json": "{}"},
    "eval": {"report.json": "{}", "report.html": "<p>", "scores.json": "{}", "plots/a.png": "x"},
}
STEPS = [(step, {"step": step, "loss": 2.0 / step, "lr": 0.1}) for step in range(1, 601)]


class Play:
    """A job whose stages are sealed with small content, and tracked as the stage shell does."""

    def __init__(self, runs: Path, base: Path, name: str = "tiny", **changes: Any) -> None:
        tree = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8"))
        tree |= {"name": name, "base": {"source": str(base)}} | changes
        self.job: Job = parse_job(tree, "test")
        self.runs = runs
        self.planned = plan_job(self.job, Workspace(runs), adopt=True)
        self.base = base

    def tracker(self) -> Tracker:
        return Tracker(self.job, self.runs)

    def start(self, name: str) -> None:
        self.tracker().start(self.planned[name])

    def seal(self, name: str, mark: str = "", **facts: Any) -> Artifact:
        planned = self.planned[name]
        staging = art.stage_folder(planned.folder)
        for file, text in FILES.get(name, {}).items():
            (staging / file).parent.mkdir(exist_ok=True)
            (staging / file).write_text(text + mark, encoding="utf-8")
        if name == "merge":
            for path in self.base.iterdir():
                shutil.copyfile(path, staging / path.name)
        if name == "sft":
            lines = "".join(json.dumps(record) + "\n" for _, record in STEPS)
            (staging / "metrics.jsonl").write_text(lines, encoding="utf-8")
        return art.seal(
            staging,
            planned.folder,
            stage=name,
            stage_version=planned.version,
            key=planned.key,
            recipe=planned.recipe.model_dump(mode="json"),
            inputs={k: v.digest for k, v in planned.open_inputs().items()},
            facts={"rows": 7, "engine": "single", "kinds": {"refusal": 3}} | facts,
            seconds=1.5,
        )

    def finish(self, name: str, mark: str = "", **facts: Any) -> Artifact:
        artifact = self.seal(name, mark, **facts)
        self.tracker().finish(self.planned[name], artifact, STEPS if name == "sft" else [])
        return artifact

    def through(self, *names: str, **facts: Any) -> None:
        for name in names:
            self.start(name)
            self.finish(name, **(facts if name == "eval" else {}))

    def waiting(self) -> list[Path]:
        return sorted((self.runs / ".mlflow-spool").glob("*.json"))


@pytest.fixture(scope="session")
def adopted(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A runs folder that has adopted base and data, to be copied."""
    runs = tmp_path_factory.mktemp("adopted") / "runs"
    Play(runs, base_folder)
    return runs


STATED = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_REGISTRY_URI")


@pytest.fixture()
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store lies among the artifacts, whatever the environment says."""
    for name in STATED:
        monkeypatch.delenv(name, raising=False)


def make_runs(runs: Path, adopted: Path, empty_database: Path) -> None:
    shutil.copytree(adopted, runs)
    shutil.copyfile(empty_database, runs / "mlflow.db")


@pytest.fixture()
def play(
    tmp_path: Path, adopted: Path, empty_database: Path, base_folder: Path, own_store: None
) -> Callable[..., Play]:
    runs = tmp_path / "runs"
    make_runs(runs, adopted, empty_database)
    return lambda name="tiny", **changes: Play(runs, base_folder, name, **changes)


class Records:
    """What the store holds, read with MLflow's own client."""

    def __init__(self, runs: Path) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=store_uri(runs))

    def all_runs(self) -> list[Any]:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "untaxed")
        found = self.client.get_experiment_by_name(name)
        return list(self.client.search_runs([found.experiment_id], max_results=1000))

    def parents(self) -> list[Any]:
        return [run for run in self.all_runs() if "mlflow.parentRunId" not in run.data.tags]

    def parent(self) -> Any:
        (run,) = self.parents()
        return run

    def stage(self, name: str) -> Any:
        (run,) = [r for r in self.all_runs() if r.data.tags.get("untaxed.stage") == name]
        return run

    def files(self, name: str) -> set[str]:
        found, open_folders = set(), [""]
        while open_folders:
            for entry in self.client.list_artifacts(
                self.stage(name).info.run_id, open_folders.pop()
            ):
                open_folders += [entry.path] if entry.is_dir else []
                found |= set() if entry.is_dir else {entry.path}
        return found

    def versions(self, job: str = "tiny") -> list[Any]:
        found = self.client.search_model_versions(f"name = 'untaxed-{job}'")
        return sorted(found, key=lambda version: int(version.version))

    def aliases(self, job: str = "tiny") -> dict[str, str]:
        aliases = self.client.get_registered_model(f"untaxed-{job}").aliases
        return {name: str(version) for name, version in aliases.items()}

    def runs(self) -> list[Any]:
        """Of each run all that a repeated event could double or change, but the time of its end."""
        found = [
            (
                run.info.run_name,
                run.info.status,
                run.data.tags,
                run.data.params,
                {
                    name: [(m.step, m.value) for m in self.history(run, name)]
                    for name in run.data.metrics
                },
                sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            )
            for run in self.all_runs()
        ]
        return sorted(found, key=lambda run: run[0])

    def picture(self) -> Any:
        """The runs, and what the registry holds."""
        versions = [(v.version, v.source, v.tags) for v in self.versions()]
        return self.runs(), versions, self.aliases()

    def without_ids(self, told: Any) -> str:
        """In one text, without the names that a store gives itself."""
        text = json.dumps(told, indent=1, sort_keys=True)
        return re.sub(r"\b(m-)?[0-9a-f]{32}\b", "ID", text)

    def history(self, run: Any, name: str) -> list[Any]:
        return list(self.client.get_metric_history(run.info.run_id, name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
