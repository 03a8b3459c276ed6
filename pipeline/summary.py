"""The last page of a run: one report over its jobs, and a table to end with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import artifact as art
from pipeline.graph import Workspace, plan_job
from pipeline.recipes import METRICS, Job
from pipeline.tracking import store_uri


def write_summary(jobs: list[Job], workspace: Workspace, out: Path) -> dict[str, Any]:
    """Write report.json, report.html and plots/ under ``out``: the first job, compared with the others.
    All of them are finished."""
    from pipeline.evals.report import compare_reports

    reports, every = [], [plan_job(job, workspace, adopt=False) for job in jobs]
    for planned in every:
        report = json.loads((planned["eval"].folder / "report.json").read_text(encoding="utf-8"))
        report["seconds"] = {
            name: art.open_artifact(stage.folder).manifest.seconds
            for name, stage in planned.items()
        }
        reports.append(report)
    first = every[0]
    responses = {
        "base": _rows(first["baseline"].folder / "responses.jsonl"),
        "aligned": _rows(first["eval"].folder / "responses.jsonl"),
    }
    compare_reports(reports, responses, _rows(first["sft"].folder / "metrics.jsonl"), out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return dict(report)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def print_summary(
    report: dict[str, Any], workspace: Workspace, out: Path, console: Console
) -> None:
    """Metrics of base and aligned models, the gate, and where to look."""
    reports = [report, *report.get("compare", [])]
    table = Table(title="Untaxed", title_justify="left")
    table.add_column("95% interval", no_wrap=True)
    table.add_column("base")
    for one in reports:
        table.add_column(one["job"], overflow="fold")
    for metric in METRICS:
        cells = [_cell(metric, report["base"].get(metric))]
        cells += [_cell(metric, one["aligned"].get(metric)) for one in reports]
        table.add_row(metric.replace("_", " "), *cells)
    gates = ["passed" if one["gate"]["passed"] else "not passed" for one in reports]
    table.add_row("gate", "", *gates)
    console.print(table)
    for check in report["gate"]["checks"]:
        line = f"  {check['status']:>13}  {check['metric']}: {check['why']}"
        console.print(line, markup=False, soft_wrap=True)
    seconds = report["seconds"]
    spent = "  ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    text = f"seconds: {spent}; in all {sum(seconds.values()):.0f}"
    console.print(text, highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, markup=False)
    uri = shlex.quote(store_uri(workspace.runs))
    console.print(f"MLflow: mlflow ui --backend-store-uri {uri}", soft_wrap=True, markup=False)


def _cell(metric: str, value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    if metric == "reasoning_nll":
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['value']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"
