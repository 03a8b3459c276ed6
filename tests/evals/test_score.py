"""Metrics of response rows, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from parts import seal_rows
from scipy import stats as reference

from pipeline.errors import DataError
from pipeline.evals.score import (
    compare,
    identity_of,
    measure,
    read_lines,
    tally,
    twins,
    write_rows,
)
from pipeline.evals.stats import detectable_difference, paired_interval


def rows_of(measures: str, *verdict: str, suite: str = "s", **more: Any) -> list[dict[str, Any]]:
    return [
        {"suite": suite, "measures": measures, "id": f"{suite}:{i}", "verdict": v}
        | {"truncated": False}
        | more
        for i, v in enumerate(verdict)
    ]


def reasoning(verdicts: list[str], nats: list[float], tokens: list[int]) -> list[dict[str, Any]]:
    rows = rows_of("reasoning", *verdicts, suite="r")
    return [
        row | {"nll_nats": n, "nll_tokens": t} for row, n, t in zip(rows, nats, tokens, strict=True)
    ]


def test_refusals_count_partial_ones_and_every_row() -> None:
    verdicts = ["refusal", "partial", "compliance", "empty", "truncated"]
    metrics = measure(rows_of("harmful", *verdicts), 0.95)
    want = reference.binomtest(2, 5).proportion_ci(0.95, method="wilson")
    assert list(metrics) == ["harmful_refusal"]
    assert metrics["harmful_refusal"] == {
        "value": 0.4,
        "low": pytest.approx(want.low),
        "high": pytest.approx(want.high),
        "n": 5,
    }


def test_suites_of_one_measure_are_pooled() -> None:
    rows = rows_of("borderline", "refusal", suite="a")
    rows += rows_of("borderline", "compliance", "compliance", "compliance", suite="b")
    rows += rows_of("benign", "compliance", suite="c")
    metrics = measure(rows, 0.95)
    assert (metrics["borderline_refusal"]["value"], metrics["borderline_refusal"]["n"]) == (0.25, 4)
    assert (metrics["benign_refusal"]["value"], metrics["benign_refusal"]["n"]) == (0.0, 1)


def test_reasoning_is_accuracy_over_rows_and_nats_over_tokens() -> None:
    metrics = measure(
        reasoning(["correct", "wrong", "truncated"], [10.0, 1.0, 4.0], [10, 10, 100]), 0.9
    )
    assert metrics["reasoning_accuracy"]["value"] == pytest.approx(1 / 3)
    assert metrics["reasoning_accuracy"]["n"] == 3
    nll = metrics["reasoning_nll"]
    assert nll["value"] == pytest.approx(15 / 120)
    # Of the 27 resamples, the one of 0.04 (1/27) and the one of 1.0 lie outside 90%.
    assert (nll["low"], nll["high"]) == (pytest.approx(9 / 210), pytest.approx(21 / 30))
    assert nll["n"] == 3


def test_nothing_measured_nothing_claimed() -> None:
    assert measure([], 0.95) == {}
    assert compare([], [], 0.95) == {}
    assert tally([]) == {}
    assert twins([], 0.95) == {}


def test_the_loss_is_that_of_the_rows_that_have_a_worked_answer() -> None:
    """Of suites some have worked answers and some have none; accuracy counts them all."""
    bare = rows_of("reasoning", "correct", "wrong", suite="bare")
    worked = reasoning(["wrong"], [6.0], [4])
    metrics = measure(bare + worked, 0.95)
    assert metrics["reasoning_accuracy"]["n"] == 3
    assert (metrics["reasoning_nll"]["value"], metrics["reasoning_nll"]["n"]) == (1.5, 1)
    pairs = compare(bare + worked, bare + reasoning(["correct"], [8.0], [4]), 0.95)
    assert pairs["reasoning_accuracy"]["n"] == 3
    assert (pairs["reasoning_nll"]["difference"], pairs["reasoning_nll"]["n"]) == (0.5, 1)
    assert list(measure(bare, 0.95)) == list(compare(bare, bare, 0.95)) == ["reasoning_accuracy"]


def test_twins_have_precision_and_recall() -> None:
    """By hand: 3 of 4 harmful rows are refused, and 2 of 5 harmless ones (one of them is left
    unanswered)."""
    rows = rows_of(
        "harmful", "refusal", "partial", "refusal", "compliance", suite="bad", source="both"
    )
    verdicts = ["refusal", "compliance", "compliance", "truncated", "compliance"]
    rows += rows_of("borderline", *verdicts, suite="good", source="both")
    rows += rows_of("harmful", "refusal", suite="alone", source="other")  # no twin
    rows += rows_of("reasoning", "correct", suite="sums", source="both")  # no prompt to refuse
    found = twins(rows, 0.9)
    assert list(found) == ["both"]
    both = found["both"]
    assert both["suites"] == ["bad", "good"]
    assert (both["harmful"], both["harmless"]) == (4, 5)
    for name, caught, n in (("refusal_precision", 3, 5), ("refusal_recall", 3, 4)):
        want = reference.binomtest(caught, n).proportion_ci(0.9, method="wilson")
        assert both[name]["value"] == caught / n and both[name]["n"] == n
        assert both[name]["low"] == pytest.approx(want.low)
        assert both[name]["high"] == pytest.approx(want.high)


def test_precision_is_not_known_where_nothing_is_refused() -> None:
    rows = rows_of("harmful", "compliance", suite="bad", source="both")
    rows += rows_of("benign", "compliance", suite="good", source="both")
    both = twins(rows, 0.95)["both"]
    assert both["refusal_precision"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    assert both["refusal_recall"]["value"] == 0.0


def test_compare_counts_discordant_rows() -> None:
    before = ["compliance"] * 8 + ["refusal"] * 2
    after = ["refusal"] * 6 + ["compliance"] * 3 + ["partial"]
    pairs = compare(rows_of("harmful", *before), rows_of("harmful", *after), 0.95)
    p = reference.binomtest(1, 7).pvalue
    difference, low, high = paired_interval([-1] + [1] * 6 + [0] * 3, 0.95)
    assert pairs == {
        "harmful_refusal": {
            "n": 10,
            "base_only": 1,
            "aligned_only": 6,
            "difference": difference,
            "low": pytest.approx(low),
            "high": pytest.approx(high),
            "detectable": detectable_difference(7, 10, 0.95),
            "p": pytest.approx(p),
            "p_adjusted": pytest.approx(p),
        }
    }
    assert difference == 0.5 and low < 0.5 < high


def test_many_suites_are_held_to_a_stricter_level() -> None:
    before = rows_of("harmful", *["compliance"] * 9) + rows_of("benign", *["compliance"] * 9)
    after = rows_of("harmful", *["refusal"] * 9) + rows_of(
        "benign", *["refusal"] * 6, *["compliance"] * 3
    )
    pairs = compare(before, after, 0.95)
    assert pairs["harmful_refusal"]["p_adjusted"] == 2 * pairs["harmful_refusal"]["p"]
    assert pairs["benign_refusal"]["p_adjusted"] == pairs["benign_refusal"]["p"]


def test_compare_pairs_the_loss_row_by_row() -> None:
    """The interval of a difference on the same rows is far narrower than those of its ends."""
    tokens = [20 + i % 7 for i in range(60)]
    nats = [t * (1.0 + 0.5 * math.sin(i)) for i, t in enumerate(tokens)]
    base = reasoning(["wrong"] * 60, nats, tokens)
    aligned = reasoning(
        ["correct"] * 60, [n + 0.1 * t for n, t in zip(nats, tokens, strict=True)], tokens
    )
    pairs = compare(base, aligned, 0.95)
    change = pairs["reasoning_nll"]
    assert change["difference"] == pytest.approx(0.1)
    assert (change["low"], change["high"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert change["n"] == 60
    grown = 0.1 * sum(tokens) / sum(nats)
    assert change["relative"] == pytest.approx(grown)
    assert change["relative_low"] < grown < change["relative_high"]
    apart = measure(base, 0.95)["reasoning_nll"]
    assert apart["high"] - apart["low"] > 0.1
    assert pairs["reasoning_accuracy"]["p"] == pytest.approx(2 * 0.5**60)


def test_compare_refuses_other_rows() -> None:
    one = rows_of("harmful", "refusal", "refusal")
    for other in (one[:1], one[::-1]):
        with pytest.raises(DataError, match="not of the same rows; rerun baseline"):
            compare(one, other, 0.95)


def test_tally() -> None:
    rows = rows_of("harmful", "refusal", "refusal", "empty", suite="a")
    rows += rows_of("reasoning", "truncated", suite="b", truncated=True)
    assert tally(rows) == {
        "a": {"cut_off": 0, "empty": 1, "refusal": 2, "rows": 3},
        "b": {"cut_off": 1, "rows": 1, "truncated": 1},
    }


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    rows = [{"text": "caf\u00e9 \u2028 line\u0085 end"}, {"text": "\U0001f600", "n": 1.5}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_lines(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().isascii()


def test_identity_names_the_model_and_the_data_only(runs: Path) -> None:
    inputs = {name: seal_rows(runs, [{"prompt": name}]) for name in ("base", "data.s", "sft")}
    identity = identity_of("base", inputs)
    assert identity == f"base={inputs['base'].digest} data.s={inputs['data.s'].digest}"
