"""The prep stage on files of a test: what it is asked, and what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import prep
from pipeline.data.raw import adopt_source
from pipeline.graph import PrepStep, Workspace
from pipeline.recipes import EvalSource, PrepRecipe
from pipeline.stage import Context


def source(name: str, kind: str = "refusal", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "source": f"{name}.jsonl"} | more


def sample(name: str, split: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": f"sample:{name}", "where": {"split": split}} | more


class Prep:
    """Runs the stage on files in a folder; holds what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text)

    def run(
        self, *sources: dict[str, Any], suites: Sequence[dict[str, Any]] = (), **recipe: Any
    ) -> dict[str, Any]:
        step = PrepStep(
            prep=PrepRecipe.model_validate({"sources": sources} | recipe),
            suites=tuple(EvalSource(**{"measures": "harmful"} | suite) for suite in suites),
        )
        workspace = Workspace(self.folder / "runs")
        inputs = {
            f"rows.{s.name}": adopt_source(s, workspace)
            for s in (*step.prep.sources, *step.prep.exclude)
        }
        inputs |= {f"data.{s.name}": adopt_source(s, workspace) for s in step.suites}
        self.count += 1
        self.out = self.folder / f"out-{self.count}"
        self.out.mkdir()
        context = Context(scratch=self.folder, console=Console(quiet=True))
        return prep.run(step, inputs, self.out, context)

    def read(self, split: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / f"{split}.jsonl").read_text().splitlines()]

    @property
    def both(self) -> list[dict[str, Any]]:
        return self.read("train") + self.read("dev")

    @property
    def sheet(self) -> dict[str, Any]:
        sheet: dict[str, Any] = json.loads((self.out / "sheet.json").read_text())
        return sheet

    @property
    def dropped(self) -> dict[str, str]:
        return {entry["id"]: entry["why"] for entry in self.sheet["dropped"]}


def unlike(count: int, seed: int = 0) -> list[str]:
    """Prompts without a word in common."""
    return [f"a{seed}x{i} b{seed}x{i} c{seed}x{i}" for i in range(count)]
