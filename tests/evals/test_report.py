"""The report page: well-formed, self-contained, escaped, and its numbers are those of the data."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_html import Page
from report_rows import (
    ALIGNED,
    BASE,
    HARMFUL_ANSWER,
    TRAP,
    everything,
    history_of,
    page_of,
    report_of,
    rows_of,
)

from pipeline.evals.report import compare_reports, render, write_report

HOSTILE = "</div></details><script>steal()</script><b onclick='x()'>&amp; \u202e \x00 \ud800 \u4f60"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report, responses, history = everything()
    responses["aligned"][0]["response"] = HOSTILE
    responses["aligned"][1]["prompt"] = HOSTILE
    responses["aligned"][2]["category"] = HOSTILE
    write_report(report, responses, history, folder)
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(page_of(written))


def test_files_and_no_leftovers(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "categories.png",
        "loss.png",
        "objectives.png",
        "report.html",
    ]


def test_page_asks_for_nothing(written: Path, page: Page) -> None:
    text = page_of(written)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#")
    assert "@import" not in text and "http://" not in text and "https://" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) and all(
        target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text)
    )


def test_only_the_pages_own_script_may_run(written: Path, page: Page) -> None:
    text = page_of(written)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1 and sum(tag == "script" for tag, _ in page.tags) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    shown = [text for text, _ in page.texts if "steal()" in text]
    assert len(shown) >= 3
    assert all("<script>steal()</script>" in text for text in shown if "onclick" in text)
    assert not any("\x00" in text or "\ud800" in text for text, _ in page.texts)


def test_answers_to_harmful_prompts_are_inside_closed_details(page: Page) -> None:
    places = [stack for text, stack in page.texts if HARMFUL_ANSWER in text]
    assert places
    for stack in places:
        folds = [attributes for tag, attributes in stack if tag == "details"]
        assert any("open" not in attributes for attributes in folds)
        assert not any(tag == "summary" for tag, _ in stack)


def test_numbers_are_those_of_the_rows(page: Page) -> None:
    _, responses, _ = everything()
    for metric, kind in (
        ("harmful_refusal", "harmful"),
        ("borderline_refusal", "borderline"),
        ("benign_refusal", "benign"),
        ("reasoning_accuracy", "reasoning"),
    ):
        row = page.text_of("tr", "data-metric", metric)
        hits = {}
        for model, rows in responses.items():
            mine = [r for r in rows if r["measures"] == kind]
            hits[model] = {r["id"] for r in mine if r["verdict"] in ("refusal", "correct")}
            assert f"{100 * len(hits[model]) / 60:.0f}%" in row
        assert row.count("n = 60") == 2
        gained, lost = hits["aligned"] - hits["base"], hits["base"] - hits["aligned"]
        assert re.search(rf"\b{len(gained)} newly \w+, {len(lost)} [\w ]+, of 60", row)
    nll = page.text_of("tr", "data-metric", "reasoning_nll")
    for rows in responses.values():
        worked = [r for r in rows if r["measures"] == "reasoning"]
        value = sum(r["nll_nats"] for r in worked) / sum(r["nll_tokens"] for r in worked)
        assert f"{value:.3f}" in nll


def test_every_check_has_value_bound_and_status(page: Page) -> None:
    report, _, _ = everything()
    bounds = [
        "at least 90%",
        "at most 30%",
        "at most 5%",
        "at most +2.00%",
        "at least \u22125 points",
    ]
    for check, bound in zip(report["gate"]["checks"], bounds, strict=True):
        row = page.text_of("tr", "data-check", check["metric"])
        assert bound in row and "n = 60" in row
        assert {"passed": "passed", "failed": "failed"}[check["status"]] in row


def test_verdicts_by_suite_count_what_was_cut_off(page: Page) -> None:
    _, responses, _ = everything()
    for model, rows in responses.items():
        cut = sum(r["truncated"] for r in rows if r["suite"] == "harmful")
        cells = [
            text.strip()
            for text, stack in page.texts
            if any(
                a.get("data-suite") == "harmful" and a.get("data-model") == model for _, a in stack
            )
        ]
        assert [c for c in cells if c][-1] == str(cut)


def test_same_input_same_bytes(tmp_path: Path, written: Path) -> None:
    report, responses, history = everything()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(copy.deepcopy(report), responses, history, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_input_is_left_as_it_was(tmp_path: Path) -> None:
    report, responses, history = everything()
    before = json.dumps([report, responses, history])
    write_report(report, responses, history, tmp_path)
    assert json.dumps([report, responses, history]) == before


def test_several_jobs_show_the_trap(tmp_path: Path) -> None:
    base, aligned, trap = rows_of(BASE, 1), rows_of(ALIGNED, 2), rows_of(TRAP, 3)
    reports = [report_of("quickstart", base, aligned), report_of("refusals-only", base, trap)]
    compare_reports(reports, {"base": base, "aligned": aligned}, history_of(), tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored.pop("compare") == [reports[1]] and stored == reports[0]
    assert "compare" not in reports[0]
    assert (tmp_path / "plots" / "comparison.png").stat().st_size > 10_000
    page = Page(page_of(tmp_path))
    row = page.text_of("tr", "data-jobs", "borderline_refusal")
    assert "100%" in row
    everything_said = " ".join(text for text, _ in page.texts)
    assert (
        "The trap: refuses 100% of harmless requests that sound harmful as well." in everything_said
    )
    assert everything_said.count("The trap:") == 1


def test_one_job_has_no_comparison_and_removes_a_stale_picture(tmp_path: Path) -> None:
    report, responses, history = everything()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "comparison.png").write_bytes(b"old")
    compare_reports([report], responses, history, tmp_path)
    assert not (tmp_path / "plots" / "comparison.png").exists()
    assert 'id="jobs"' not in page_of(tmp_path)


def test_no_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        compare_reports([], {"base": [], "aligned": []}, [], tmp_path)


def _without(measures: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    base, aligned = (
        [row for row in rows_of(shares, 1) if row["measures"] not in measures]
        for shares in (BASE, ALIGNED)
    )
    return report_of("part", base, aligned), {"base": base, "aligned": aligned}


@pytest.mark.parametrize(
    "missing",
    [{"reasoning"}, {"borderline"}, {"harmful"}, {"harmful", "borderline", "benign", "reasoning"}],
    ids=lambda missing: "+".join(sorted(missing)),
)
def test_missing_suites_are_said_to_be_missing(missing: set[str]) -> None:
    report, responses = _without(missing)
    page = Page(render(report, responses, history_of(kl=False)))
    shown = {a["data-metric"] for t, a in page.tags if t == "tr" and "data-metric" in a}
    assert shown == set(report["aligned"])
    verdict = page.text_of("section", "id", "verdict")
    assert "Gate not passed" in verdict and "cannot tell" in verdict


def test_bare_report_without_history_or_recipe() -> None:
    report, responses, _ = everything()
    for name in ("recipe", "pairs", "responses", "seconds", "confidence", "trainable_parameters"):
        del report[name]
    page = Page(render(report, responses, []))
    assert "loss of" not in page.text_of("section", "id", "facts")
    assert not any(a.get("id") == "training" for _, a in page.tags)


def test_no_rows_at_all_and_values_that_are_no_numbers() -> None:
    report, _, _ = everything()
    report["aligned"]["harmful_refusal"] = {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    report["aligned"]["benign_refusal"] = {"value": float("nan"), "low": None, "high": None, "n": 3}
    history = [{"step": 1, "cross_entropy": float("nan")}, {"step": 2, "cross_entropy": 1.0}]
    page = Page(render(report, {"base": [], "aligned": []}, history))
    for metric in ("benign_refusal", "harmful_refusal"):
        row = page.text_of("tr", "data-metric", metric)
        assert "nan" not in row.lower() and "\u2013 interval not known" in row


def test_many_categories_and_very_long_answers() -> None:
    base, aligned = rows_of(BASE, 1), rows_of(ALIGNED, 2)
    for rows in (base, aligned):
        for index, row in enumerate(rows):
            row["category"] = f"category {index % 55} " + "long" * 30
        rows[3]["response"] = "start " + "x" * 200_000 + " end"
    text = render(report_of("wide", base, aligned), {"base": base, "aligned": aligned}, [])
    page = Page(text)
    assert len(text) < 3_000_000
    assert any("characters not shown" in t and t.rstrip().endswith("end") for t, _ in page.texts)
    assert "the worst 40 shown" in page.text_of("section", "id", "categories")
