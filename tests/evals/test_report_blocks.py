"""What the report says beside its metrics: choice, data, twins, programs, judges, who answered, at what
cost."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from report_blocks import (
    GUARD,
    HARMFUL_ROW,
    RUBRIC,
    choice_of,
    full,
    served,
    sheet_of,
)
from report_html import Page
from report_rows import BASE, everything, rows_of

from pipeline.data.sheet import STEPS
from pipeline.evals import datasheet, measuring, policy
from pipeline.evals.report import render
from pipeline.evals.score import twins

MINUS = "\u2212"


@pytest.fixture(scope="module")
def parts() -> Any:
    return full()


@pytest.fixture(scope="module")
def page(parts: Any) -> Page:
    return Page(render(*parts))


def said(page: Page) -> str:
    return " ".join(" ".join(text.split()) for text, _ in page.texts if text.strip())


def alerts(page: Page) -> str:
    return " ".join(t for t, stack in page.texts if any(a.get("role") == "alert" for _, a in stack))


def rows_with(page: Page, name: str) -> list[str]:
    """The values of attribute ``name`` of table rows, in order."""
    return [str(a[name]) for tag, a in page.tags if tag == "tr" and name in a]


def test_the_choice_says_what_was_wanted_and_what_was_taken(page: Page, parts: Any) -> None:
    choice = parts[0]["choice"]
    chosen = choice["chosen"]
    text = page.text_of("section", "id", "choice")
    assert f"Chosen: epoch {chosen['epoch']}, \u00d7{chosen['scale']:g}." in text
    assert "the one that refuses the most harmful requests" in text
    assert "at most +10 points against the base" in text and "at most +3.00%" in text
    assert "4 more were left out" in text
    assert "bounds" not in alerts(page)
    points = rows_with(page, "data-point")
    assert len(points) == len(choice["points"]) == 16 and points[0] == "the base"
    for point, name in zip(choice["points"], points, strict=True):
        row = page.text_of("tr", "data-point", name)
        value = f"{100 * point['metrics']['over_refusal']['value']:.1f}".removesuffix(".0")
        assert f"{value}%" in row
        assert f"{point['metrics']['reasoning_nll']['value']:.3f}" in row
        if point["epoch"]:
            assert ("holds all bounds" in row) == point["meets"]
        assert ("none beats it" in row) == point["on_front"]
    labels = [str(a.get("aria-label")) for tag, a in page.tags if tag == "svg"]
    assert sum("Points tried" in label for label in labels) == 1


def test_a_choice_that_held_no_bound_is_loud() -> None:
    report, responses, history = full(meets=False)
    page = Page(render(report, responses, history))
    told = alerts(page)
    assert "No point met the bounds." in told and "No trained point met the bounds" in told
    assert "No trained point met" in page.text_of("section", "id", "verdict")
    missed = page.text_of("tr", "data-bound", "harmful_refusal")
    assert "failed" in missed and "base " in missed, "a change is not told in an interval's words"
    assert not re.search(r"\d%? to \d", missed)


def test_bounds_are_held_or_missed_as_the_choice_says() -> None:
    for meets in (True, False):
        choice = choice_of(meets=meets)
        told = policy.told(choice)
        assert told["meets"] is meets is all(b["status"] == "passed" for b in told["bounds"])


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ("harmful_refusal", "refuses the most harmful requests"),
        ("over_refusal", "refuses the fewest harmless requests"),
        ("reasoning_accuracy", "solves the most reasoning problems"),
        ("anchor_nll", "has the lowest loss on the base's own answers"),
    ],
)
def test_the_policy_in_words(best: str, words: str) -> None:
    choice = choice_of()
    choice["policy"] |= {"best": best, "otherwise": "refuse"}
    assert policy.policy(choice) == (
        f"Of the points that hold all bounds, the one that {words}; where none does, none is merged."
    )


def test_the_waterfall_is_that_of_the_sheet(page: Page) -> None:
    sheet = sheet_of()
    assert set(datasheet.STEP_WORDS) == set(STEPS)
    for name, source in sheet["sources"].items():
        text = page.text_of("figure", "data-source", name)
        assert f"read {source['read']}" in text and "licence: Apache-2.0" in text
        for step in source["steps"]:
            less = step["before"] - step["after"]
            words = f"{MINUS}{less} {step['after']} left"
            assert (words in text) == bool(less)
        assert f"trained on {source['kept'] - source['dev']} \u00d7 2" in text
        assert f"held back {source['dev']}" in text
    whole = page.text_of("section", "id", "data")
    dropped = Counter(entry["why"] for entry in sheet["dropped"])
    for step, n in dropped.items():
        assert f"{n} {datasheet.STEP_WORDS[step]}" in whole
    assert "shares with edge:2 of edge the words \u201cone two\u201d" in whole
    assert "asks nearly the same as harm:9 of harm: 91% of their words" in whole


def test_what_was_checked_against_which_suite(page: Page) -> None:
    against = sheet_of()["checks"]["contamination"]["suites"]
    for name, suite in against.items():
        row = page.text_of("tr", "data-checked", name)
        assert f"{suite['rows']} {suite['contaminated']} Apache-2.0" in row
    report, responses, history = everything()
    report["data"] = datasheet.cut(sheet_of(checked=False))
    text = Page(render(report, responses, history)).text_of("section", "id", "data")
    assert "Not checked." in text and "may be of rows that were trained on" in text


def test_harmful_rows_of_the_data_are_folded(page: Page) -> None:
    places = [stack for text, stack in page.texts if HARMFUL_ROW in text]
    assert places
    for stack in places:
        folds = [a for tag, a in stack if tag == "details"]
        assert len(folds) == 2 and not any("open" in a for a in folds)


def test_the_sheet_is_cut_without_losing_a_count() -> None:
    sheet = sheet_of()
    many = {f"category {i:03}": 100 - i for i in range(50)}
    sheet["sources"]["harmful"]["categories"] = dict(sorted(many.items(), reverse=True))
    block = datasheet.cut(sheet)
    assert sum(block["dropped"].values()) == len(sheet["dropped"]) == 19
    source = block["sources"]["harmful"]
    assert list(source["categories"].items()) == list(many.items())[:30]
    assert source["more_categories"] == 20
    assert all(step["before"] > step["after"] for step in source["steps"])


def test_twins_have_precision_and_recall(page: Page, parts: Any) -> None:
    report, responses, _ = parts
    lines = {line["name"]: line for line in measuring.twin_lines(report)}
    assert len(lines) == 2
    for model in ("base", "aligned"):
        rows = [r for r in responses[model] if r["source"] == "set:xstest"]
        refused = [r for r in rows if r["verdict"] == "refusal"]
        caught = [r for r in refused if r["measures"] == "harmful"]
        harmful = [r for r in rows if r["measures"] == "harmful"]
        for name, of in (("refusal_recall", harmful), ("refusal_precision", refused)):
            value, more = lines[name][model]
            assert value == f"{100 * len(caught) / len(of):.0f}%"
            assert f"of {len(of)} " in more
            assert f"{value} {more}" in page.text_of("tr", "data-twins", name)
    assert "40 harmful, 50 harmless" in page.text_of("tr", "data-twins", "refusal_recall")


def test_twins_of_which_nothing_is_refused_have_no_precision() -> None:
    report, responses, _ = full()
    rows = [r | {"verdict": "compliance"} for r in responses["base"]]
    report["twins"]["base"] = twins(rows, 0.95)
    precision = next(x for x in measuring.twin_lines(report) if x["name"] == "refusal_precision")
    assert precision["base"] == ("\u2013", "no refused requests")


def test_programs_and_answers_that_could_not_be_read_are_counted(page: Page, parts: Any) -> None:
    _, responses, _ = parts
    lines = measuring.programs(responses)["lines"]
    for model in ("base", "aligned"):
        ended = Counter(r["program"] for r in responses[model] if "program" in r)
        (line,) = (x for x in lines if x["model"] == model)
        assert line["ended"] == ended and line["rows"] == 30 and line["suite"] == "programs"
        row = " ".join(
            t.strip()
            for t, stack in page.texts
            if t.strip()
            and any(a.get("data-programs") and a.get("data-model") == model for _, a in stack)
        )
        assert row.split()[3] == str(ended["passed"])
        blank = sum("extracted" in r and r["extracted"] is None for r in responses[model])
        assert measuring.unreadable(responses)[("arithmetic", model)] == blank
    assert measuring.unreadable(responses)[("arithmetic", "base")] > 0


def test_judges_and_how_far_they_agree(page: Page, parts: Any) -> None:
    block = parts[0]["judges"]
    harmful = [p for p in block["agreement"] if p["suite_measures"] == "harmful"]
    assert len(harmful) == 3
    for found in harmful:
        row = page.text_of("tr", "data-judges", f"{found['one']} {found['other']}")
        assert f"{100 * found['share']:.0f}%" in row and f"{found['kappa']:.2f}" in row
    for name in (GUARD.title, RUBRIC.title):
        row = page.text_of("tr", "data-judge", measuring.judge_title(name))
        assert all(str(n) in row.split() for n in block["verdicts"][name].values())
        assert row.endswith(str(block["invalid"][name]))
        for model in ("base", "aligned"):
            ((metric, rate),) = block["rates"][model][name].items()
            shown = f"{100 * rate['value']:.0f}%" if metric == "harmful_unsafe" else ""
            assert (shown or f"{rate['value']:.2f}") in page.text_of("tr", "data-rates", name)
    listed = [t for t, stack in page.texts if "answers that they disagree on" in t]
    assert [int(text.split()[0]) for text in listed] == [len(apart(parts))]


def apart(parts: Any) -> set[str]:
    """The listed answers on which judges that ask alike disagree."""
    report, responses, _ = parts
    found = set()
    for row in responses["aligned"]:
        if row["id"] in report["judges"]["disagreements"]:
            sides = {
                row["verdict"] == "refusal",
                row["judges"][RUBRIC.title]["verdict"] == "refusal",
            }
            if row["measures"] == "harmful" or len(sides) == 2:
                found.add(row["id"])
    return found


def test_a_guard_is_held_against_others_on_harmful_requests_alone(page: Page, parts: Any) -> None:
    shown = measuring.judges(parts[0])
    assert shown is not None and shown["unlike"]
    for line in shown["pairs"]:
        if GUARD.title in (line["one"], line["other"]):
            assert line["of"] == "harmful requests"
    others = [x for x in shown["pairs"] if GUARD.title not in (x["one"], x["other"])]
    assert len(others) == 3


def test_without_judges_the_page_speaks_of_none(parts: Any) -> None:
    report, responses, history = everything()
    text = said(Page(render(report, responses, history)))
    assert "Do the judges agree?" not in text and "disagree" not in text
    named = {**parts[0]["judges"], "names": ["<b>odd</b>"], "verdicts": {"<b>odd</b>": {"\x00": 1}}}
    named |= {"invalid": {}, "agreement": [], "rates": {}, "disagreements": []}
    Page(render(report | {"judges": named}, responses, history))


def test_who_answered(page: Page) -> None:
    aligned = page.text_of("tr", "data-answered", "aligned")
    assert "under the name aligned-7b" in aligned and "at most 8,192 tokens" in aligned
    report, _, _ = everything()
    assert [who for who, _ in measuring.answered_by(report)] == ["base and aligned"]
    report["generation"] = {"base": {"engine": "embedded"}, "aligned": served("x")}
    assert [who for who, _ in measuring.answered_by(report)] == ["base", "aligned"]
    assert measuring.answered_by({}) == []


def test_answers_that_could_not_be_had_are_counted_where_one_looks_first(page: Page) -> None:
    for section in ("verdict", "measured"):
        text = page.text_of("section", "id", section)
        assert "1 of 360 answers of the aligned model could not be had" in text
    report, _, _ = everything()
    assert measuring.errors(report) == {}


@pytest.mark.parametrize(
    ("samples", "settings", "words"),
    [
        (1, {"temperature": 0.0}, "always the likeliest next word"),
        (1, {"temperature": 0.6}, "one answer to each request, drawn at temperature 0.6"),
        (8, {"temperature": 0.6, "top_p": 0.95}, "8 answers to each request"),
        (1, {}, "one answer to each request"),
    ],
)
def test_how_answers_were_drawn(samples: int, settings: dict[str, Any], words: str) -> None:
    assert words in measuring.drawn({"samples": samples, "recipe": {"eval": settings}})


def test_of_several_samples_the_first_is_listed() -> None:
    rows = rows_of(BASE, 1, limit=5)
    twice = [row | {"sample": sample} for row in rows for sample in (0, 1)]
    report, _, _ = everything()
    report["samples"] = 2
    page = Page(render(report, {"base": twice, "aligned": twice}, []))
    text = page.text_of("section", "id", "all")
    assert "The first of 2 answers to each" in text
    assert f"Show all {len(rows)} prompts" in text and "sample 2" not in text


def test_tokens_and_time(page: Page, parts: Any) -> None:
    _, responses, _ = parts
    text = page.text_of("section", "id", "facts")
    for rows in responses.values():
        assert f"{sum(row['tokens'] for row in rows):,}" in text
    assert "98,304, of which 24,576 (25%) were learned from" in text
    assert "choose measuring what was trained, to choose 1 min 36 s" in text
    report, _, _ = everything()
    report["tokens"]["trained"] = None
    assert [what for what, _ in measuring.tokens(report)] == [
        "written by the base model",
        "written by the aligned model",
    ]
