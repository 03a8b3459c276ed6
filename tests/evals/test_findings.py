"""What the report concludes from its numbers, against independent reckoning."""

from __future__ import annotations

import copy

import pytest
from report_rows import BASE, JOB, TRAP, everything, report_of, rows_of

from pipeline.evals import findings, pictures
from pipeline.evals.exchanges import examples, exchanges
from pipeline.evals.gate import evaluate
from pipeline.evals.score import measure
from pipeline.evals.wording import clean, duration, number, percent, shortened


def test_jobs_that_cannot_simply_be_compared_are_named() -> None:
    first, _, _ = everything()
    other = copy.deepcopy(first)
    assert findings.unequal([first, other]) == []
    other["recipe"]["base_digest"] = "00"
    other["recipe"]["eval"]["suites"] = []
    assert len(findings.unequal([first, other])) == 2


def test_examples_put_what_the_base_did_better_first() -> None:
    base, aligned = rows_of(BASE, 1), rows_of(TRAP | {"harmful": 0.3}, 2)
    found = examples(exchanges(base, aligned))
    complied = [r for r in aligned if r["measures"] == "harmful" and r["verdict"] == "compliance"]
    refused_before = {r["id"] for r in base if r["verdict"] == "refusal"}
    lost = [one for one in complied if one["id"] in refused_before]
    assert found["complied"].total == len(complied) > len(found["complied"].shown)
    assert [one.id for one in found["complied"].shown[: len(lost)]] == [r["id"] for r in lost]
    solved = {r["id"] for r in base if r["verdict"] == "correct"}
    wrong = {r["id"] for r in aligned if r["verdict"] == "wrong"}
    assert found["lost"].total == len(solved & wrong)


def test_close_calls_are_those_whose_interval_holds_the_bound() -> None:
    report, _, _ = everything()
    report["aligned"]["harmful_refusal"] = {"value": 0.92, "low": 0.85, "high": 0.97, "n": 60}
    report["aligned"]["borderline_refusal"] = {"value": 0.1, "low": 0.05, "high": 0.2, "n": 60}
    report["pairs"]["reasoning_nll"] |= {"relative_low": -0.1, "relative_high": 0.1}
    report["pairs"]["reasoning_accuracy"] |= {"low": -0.04, "high": 0.1}
    checks = evaluate(JOB.eval.gate, report["base"], report["aligned"], report["pairs"])["checks"]
    close = {c["metric"]: findings.close_call(c) for c in checks}
    assert close["harmful_refusal"] and not close["borderline_refusal"]
    assert close["reasoning_nll"] and not close["reasoning_accuracy"]
    check = JOB.eval.gate[0].model_copy(update={"evidence": "interval"})
    (open_,) = evaluate([check], report["base"], report["aligned"], report["pairs"])["checks"]
    assert open_["status"] == "uninformative" and not findings.close_call(
        open_
    )  # it says so itself


def test_allowed_ranges_turn_changes_into_values() -> None:
    report, _, _ = everything()
    nll = report["base"]["reasoning_nll"]["value"]
    assert pictures.allowed(report, "reasoning_nll") == (float("-inf"), pytest.approx(nll * 1.02))
    low, high = pictures.allowed(report, "harmful_refusal") or (0, 0)
    assert (low, high) == (0.9, float("inf"))
    report["gate"]["checks"] = []
    assert pictures.allowed(report, "harmful_refusal") is None


def test_apart_is_newcombes_interval() -> None:
    # Newcombe 1998, table II, case (a): 56/70 against 48/80, method 10
    rows = [
        {"measures": "harmful", "verdict": "refusal" if i < 56 else "compliance", "id": i}
        for i in range(70)
    ]
    rows += [
        {"measures": "benign", "verdict": "refusal" if i < 48 else "compliance", "id": i}
        for i in range(80)
    ]
    found = findings.apart(measure(rows, 0.95), "benign_refusal")
    assert found is not None
    assert found["value"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == (
        pytest.approx(0.0524, abs=1e-4),
        pytest.approx(0.3339, abs=1e-4),
    )


def test_curves_leave_out_steps_without_rows_of_a_kind() -> None:
    history = [
        {"step": 0, "cross_entropy": 2.0, "kl": 0.0},
        {"step": 1, "cross_entropy": 0.0, "kl": 0.0},
        {"step": 2, "cross_entropy": float("inf"), "kl": 0.0},
        {"step": 3, "dev_loss": 1.5},
    ]
    (curve,) = pictures.curves(history)
    assert curve.train == ((0.0, 2.0),) and curve.dev == ((3.0, 1.5),)
    assert pictures.curves([]) == []


def test_a_model_is_read_by_what_it_refuses() -> None:
    base, trap = rows_of(BASE, 1), rows_of(TRAP, 3)
    report = report_of("refusals-only", base, trap)
    assert findings.reading(report["base"], None) == "Answers most harmful requests."
    assert findings.reading(report["aligned"], report).startswith("The trap: refuses 100% of")
    passed = {"gate": {"passed": True, "checks": []}}
    good = {"harmful_refusal": {"value": 0.9, "n": 60}, "benign_refusal": {"value": 0.0, "n": 60}}
    assert "every check passed" in findings.reading(good, passed)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (percent(0.95, 100), "95%"),
        (percent(0.9467, 450), "94.7%"),
        (percent(1.0, 450), "100%"),
        (number("reasoning_nll", 1.42549, 60), "1.425"),
        (number("harmful_refusal", None, 60), "\u2013"),
        (duration(3.25), "3.2 s"),
        (duration(60), "1 min 0 s"),
        (duration(7384), "2 h 3 min"),
        (clean("a\x00b\ud800c\n\u4f60\U0001f600"), "a\ufffdb\ufffdc\n\u4f60\U0001f600"),
        (shortened("word " * 100, 20), "word word word word\u2026"),
    ],
)
def test_numbers_and_text_as_shown(text: str, shown: str) -> None:
    assert text == shown
