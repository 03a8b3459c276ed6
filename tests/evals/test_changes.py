"""What the report makes of a change: its interval, what so many rows would show, and both p-values."""

from __future__ import annotations

from typing import Any

import pytest
from report_html import Page
from report_rows import everything

from pipeline.evals.changes import SAYS, certainty, changes
from pipeline.evals.report import render
from pipeline.evals.score import compare
from pipeline.recipes import METRICS

MINUS = "\u2212"


def pair(difference: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"n": 60, "difference": difference, "low": low, "high": high} | more


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (pair(0.3, 0.1, 0.5, detectable=0.2, p_adjusted=0.001), "clear"),
        (pair(-0.3, -0.5, -0.1, detectable=0.4, p_adjusted=0.001), "clear"),
        (pair(0.1, 0.01, 0.2, detectable=0.2, p_adjusted=0.2), "maybe"),
        (pair(0.25, -0.01, 0.5, detectable=0.2, p_adjusted=0.06), "maybe"),
        (pair(0.1, -0.05, 0.25, detectable=0.2, p_adjusted=0.4), "none"),
        (pair(0.0, -0.05, 0.05, detectable=0.1, p_adjusted=1.0), "none"),
        (pair(0.01, -0.01, 0.03), "maybe"),
        (pair(0.01, 0.005, 0.03), "clear"),
    ],
)
def test_noise_is_not_called_a_change(found: dict[str, Any], kind: str) -> None:
    assert certainty(found, 0.05) == kind


def test_each_change_has_its_interval_what_rows_would_show_and_both_p_values() -> None:
    report, responses, history = everything()
    page = Page(render(report, responses, history))
    found = compare(responses["base"], responses["aligned"], 0.95)
    for metric in METRICS:
        text = page.text_of("tr", "data-metric", metric)
        if metric == "reasoning_nll":
            assert f"{100 * found[metric]['relative']:.2f}%" in text and "bootstrap" in text
            continue
        ends = [f"{100 * found[metric][end]:+.1f}".removesuffix(".0") for end in ("low", "high")]
        assert " to ".join(ends).replace("-", MINUS) in text
        least = f"{100 * found[metric]['detectable']:.1f}".removesuffix(".0")
        assert f"60 rows show a change of {least} points or more four times in five" in text
        assert text.count("p = ") + text.count("p < ") == 2 and "over all 4 measures" in text
    shown = {row["metric"]: row["says"] for row in changes(report)}
    assert shown["harmful_refusal"] == SAYS["clear"]
    assert shown["benign_refusal"] == SAYS["none"] == "No change that so many rows could show."


def test_a_change_of_several_samples_is_counted_as_such() -> None:
    report, _, _ = everything()
    report["pairs"]["harmful_refusal"] |= {"samples": 4, "aligned_only": 41, "base_only": 2}
    (row,) = (r for r in changes(report) if r["metric"] == "harmful_refusal")
    assert row["paired"] == "more often on 41 of 60 rows, less often on 2"
    assert row["test"].startswith("sign flips p < 0.001")
