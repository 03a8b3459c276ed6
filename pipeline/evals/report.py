"""report.html: what the evaluation found, for the person who decides on a release.

One file without network, fonts or scripts from elsewhere; everything that a model or a data set
wrote is escaped, and a content policy in the page forbids any script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.artifact import write_atomic
from pipeline.evals import (
    datasheet,
    exchanges,
    findings,
    measuring,
    pareto,
    pictures,
    plots,
    policy,
    wording,
)
from pipeline.evals.changes import DEFAULT_CONFIDENCE, changes
from pipeline.evals.pictures import Report, Rows
from pipeline.evals.score import REFUSED, UNANSWERED

TEMPLATES = Path(__file__).resolve().parent


def write_report(report: Report, responses: Mapping[str, Rows], history: Rows, out: Path) -> None:
    """Write report.html, objectives.png, loss.png and categories.png under ``out``.

    ``responses`` holds the response rows of ``base`` and ``aligned``, ``history`` the rows of
    metrics.jsonl. A picture without data is not written.
    """
    _write(report, responses, history, out / "report.html", out)


def compare_reports(
    reports: Sequence[Report], responses: Mapping[str, Rows], history: Rows, out: Path
) -> None:
    """Write report.json (the first report, the others under ``compare``), report.html and plots/.

    ``responses`` and ``history`` are those of the first report. ValueError without reports.
    """
    if not reports:
        raise ValueError("no report to compare; wanted at least one")
    first = {**reports[0], "compare": list(reports[1:])}
    _write(first, responses, history, out / "report.html", out / "plots")
    write_atomic(out / "report.json", json.dumps(first, indent=1, allow_nan=False) + "\n")


def _write(
    report: Report, responses: Mapping[str, Rows], history: Rows, page: Path, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reports = [report, *report.get("compare", [])]
    level = wording.percent(report.get("confidence", DEFAULT_CONFIDENCE), 1000)
    models = pictures.refusal_panels(reports) if len(reports) > 1 else []
    marks = f"Hollow: base. Filled: aligned. Lines: {level} intervals."
    files: dict[str, tuple[Sequence[plots.Drawable], int, str]] = {
        "objectives.png": (
            list(pictures.objective_panels(report).values()),
            2,
            f"{marks} Shaded: what the gate allows. Cross: failed. Diamond: cannot tell.",
        ),
        "loss.png": (pictures.curves(history), 2, ""),
        "categories.png": (
            [pictures.drawn(panel) for panel in _categories(report, responses).values()],
            2,
            f"{marks} In brackets: rows.",
        ),
        "comparison.png": (
            models,
            2 if len(models) == 4 else 3,
            f"Share of requests refused, with {level} intervals. Dashed: the bound of the gate.",
        ),
    }
    for name, (panels, columns, note) in files.items():
        if panels:
            figure = plots.draw(panels, columns=columns, note=note)
            _write_bytes(folder / name, plots.to_png(figure))
        else:
            (folder / name).unlink(missing_ok=True)
    write_atomic(page, render(report, responses, history))


def render(report: Report, responses: Mapping[str, Rows], history: Rows) -> str:
    """The page as text; ``report`` may hold others under ``compare``."""
    reports = [report, *report.get("compare", [])]
    environment = _environment()
    script = environment.get_template("report_script.html.jinja").render().strip()
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    answered = exchanges.exchanges(responses["base"], responses["aligned"])
    counts = findings.verdict_counts(report)
    categories = _categories(report, responses)
    return environment.get_template("report.html.jinja").render(
        **_chosen(report),
        **_measured(report, responses),
        data=datasheet.told(report["data"]) if report.get("data") else None,
        disagreements=measuring.disagreements(report, answered),
        report=report,
        reports=reports,
        confidence=wording.percent(report.get("confidence", DEFAULT_CONFIDENCE), 1000),
        headline=findings.headline(report),
        consequence=findings.consequence(report),
        close_calls=[findings.close_call(check) for check in report["gate"]["checks"]],
        check_intervals=[findings.interval_text(c) for c in report["gate"]["checks"]],
        changes=changes(report),
        objective_pictures={
            metric: _svg(panel, pictures.described(metric, report))
            for metric, panel in pictures.objective_panels(report).items()
        },
        models=findings.side_by_side(reports),
        unequal=findings.unequal(reports),
        refusal_pictures=[(p.title, _svg(p, _said(p))) for p in pictures.refusal_panels(reports)],
        curves=[(curve, _svg(curve, _told(curve))) for curve in pictures.curves(history)],
        categories=categories,
        category_pictures={
            name: _svg(
                pictures.drawn(panel),
                f"{panel.title}, by category; the table below holds the numbers",
            )
            for name, panel in categories.items()
        },
        examples=exchanges.examples(answered),
        exchanges=[one for one in answered if one.sample == 0],
        counts=counts,
        verdict_names=findings.verdict_names(counts),
        script=Markup(script),
        script_digest=digest,
    )


def _chosen(report: Report) -> dict[str, Any]:
    """The choice among trained points, where the job had one."""
    choice = report.get("choice")
    if not choice:
        return {"choice": None}
    figure = pareto.draw_choice(choice, narrow=True)
    picture = plots.to_svg(figure, policy.described(choice), "choice")
    return {"choice": policy.told(choice), "choice_picture": Markup(picture)}


def _measured(report: Report, responses: Mapping[str, Rows]) -> dict[str, Any]:
    """Who answered, how it was read, and what it took."""
    return {
        "samples": int(report.get("samples") or 1),
        "errors": measuring.errors(report),
        "answered_by": measuring.answered_by(report),
        "drawn": measuring.drawn(report),
        "programs": measuring.programs(responses),
        "unreadable": measuring.unreadable(responses),
        "twins": measuring.twin_lines(report),
        "judges": measuring.judges(report),
        "tokens": measuring.tokens(report),
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clean": wording.clean,
        "percent": wording.percent,
        "duration": wording.duration,
        "pretty": lambda value: wording.clean(json.dumps(value, indent=2, ensure_ascii=False)),
        "estimate": lambda measured, metric: wording.measured_value(metric, measured),
        "interval": lambda measured, metric: wording.interval(metric, measured),
        "points": lambda value: wording.change("harmful_refusal", value),
    }
    environment.globals |= {
        "wording": wording.WORDING,
        "measures": wording.MEASURES,
        "verdicts": wording.VERDICTS,
        "status": wording.STATUS,
        "stages": wording.STAGES,
        "compared": wording.compared,
        "wanted": wording.wanted,
        "because": findings.because,
        "span": wording.span,
        "tone": tone,
        "most_categories": pictures.MOST_CATEGORIES,
        "most_points": plots.MOST_POINTS,
    }
    return environment


def tone(measures: str, verdict: str) -> str:
    """Whether ``verdict`` is ``good`` or ``bad`` on rows that measure ``measures``, or neither."""
    if verdict in UNANSWERED:
        return "bad" if measures in ("borderline", "benign") else "neither"
    if measures == "reasoning":
        return "good" if verdict == "correct" else "bad"
    return "good" if (verdict in REFUSED) == (measures == "harmful") else "bad"


def _categories(report: Report, responses: Mapping[str, Rows]) -> dict[str, plots.Categories]:
    confidence = float(report.get("confidence", DEFAULT_CONFIDENCE))
    return pictures.categories(responses["base"], responses["aligned"], confidence)


def _svg(panel: plots.Drawable, description: str) -> Markup:
    salt = hashlib.sha256(f"{panel.title} {description}".encode("utf-8", "replace")).hexdigest()
    figure = plots.draw([panel], titles=False)
    return Markup(plots.to_svg(figure, description, salt[:12]))


def _said(panel: plots.Refusals) -> str:
    shares = ", ".join(f"{e.label} {e.text}" for e in panel.estimates)
    return f"Refused by {panel.title}: {shares}"


def _told(curve: plots.Curve) -> str:
    parts = [
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for name, points in (("training batches", curve.train), ("development rows", curve.dev))
        if points
    ]
    return f"{curve.title}: " + "; ".join(parts)


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


__all__ = ["compare_reports", "render", "write_report"]
