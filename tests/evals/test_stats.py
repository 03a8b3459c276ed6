"""Intervals and tests against scipy."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from pipeline.evals import stats
from pipeline.evals.stats import mcnemar, ratio_interval, wilson


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (0, 100), (3, 100), (50, 100), (99, 100), (7, 7), (600, 1319)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, n: int, confidence: float) -> None:
    want = reference.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((want.low, want.high), abs=1e-12)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0, 0.95) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4, 0.95)


@pytest.mark.parametrize(
    ("b", "c"), [(0, 0), (1, 0), (0, 9), (4, 4), (3, 14), (40, 70), (700, 800)]
)
def test_mcnemar_equals_the_exact_binomial_test(b: int, c: int) -> None:
    want = reference.binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(want, rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_ratio_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(5, 60, size=100)
    sums = counts * rng.normal(1.4, 0.3, size=100)
    value, low, high = ratio_interval(sums.tolist(), counts.tolist(), 0.95)
    want = reference.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert value == pytest.approx(sums.sum() / counts.sum())
    width = want.high - want.low
    assert low == pytest.approx(want.low, abs=0.1 * width)
    assert high == pytest.approx(want.high, abs=0.1 * width)


def test_ratio_interval_weighs_by_tokens_and_is_seeded() -> None:
    value, low, high = ratio_interval([10.0, 1.0], [10, 100], 0.95, seed=1)
    assert value == pytest.approx(0.1)
    assert (low, high) == ratio_interval([10.0, 1.0], [10, 100], 0.95, seed=1)[1:]
    with pytest.raises(ValueError, match="at least one"):
        ratio_interval([], [], 0.95)


def test_the_paired_interval_covers_what_it_says() -> None:
    """Simulated pairs of proportions, few and many rows: the truth is inside nearly as often as stated."""
    rng = np.random.default_rng(0)
    for n, first, second in ((30, 0.05, 0.15), (100, 0.02, 0.10), (300, 0.2, 0.2), (50, 0.0, 0.02)):
        draws = rng.multinomial(n, [first, second, 1 - first - second], size=4000)
        inside = 0
        for only_first, only_second, _ in draws.tolist():
            _, low, high = stats.paired_interval(only_first, only_second, n, 0.95)
            inside += low <= second - first <= high
        assert inside / len(draws) >= 0.93, (n, first, second)


def test_the_paired_interval_by_hand() -> None:
    value, low, high = stats.paired_interval(3, 9, 50, 0.95)
    centre, spread = 6 / 52, math.sqrt((14 / 52 - (6 / 52) ** 2) / 52)
    assert value == 6 / 50
    assert low == pytest.approx(centre - 1.959964 * spread, abs=1e-6)
    assert high == pytest.approx(centre + 1.959964 * spread, abs=1e-6)
    with pytest.raises(ValueError, match="of 5"):
        stats.paired_interval(3, 4, 5, 0.95)


def test_relative_change_of_paired_sums() -> None:
    """Against scipy's paired bootstrap of the same statistic."""
    rng = np.random.default_rng(1)
    before = rng.gamma(4, 25, size=200)
    after = before * rng.normal(1.02, 0.05, size=200)
    value, low, high = stats.relative_change(before.tolist(), after.tolist(), 0.95)
    assert value == pytest.approx(after.sum() / before.sum() - 1)
    theirs = reference.bootstrap(
        (before, after),
        lambda a, b, axis: b.sum(axis=axis) / a.sum(axis=axis) - 1,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=5000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-3)
    with pytest.raises(ZeroDivisionError):
        stats.relative_change([0.0], [1.0], 0.95)


def test_holm_is_stepwise_and_never_below_an_earlier_one() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_the_detectable_difference_is_detected_as_often_as_stated() -> None:
    rng = np.random.default_rng(3)
    for n, share in ((200, 0.2), (500, 0.1)):
        difference = stats.detectable_difference(round(share * n), n, 0.95, power=0.8)
        second = (share + difference) / 2
        draws = rng.multinomial(n, [share - second, second, 1 - share], size=1500)
        found = sum(stats.mcnemar(a, b) < 0.05 for a, b, _ in draws.tolist())
        # the exact test is a little less powerful than the normal one that the formula describes
        assert 0.70 < found / len(draws) < 0.86, (n, share)
    few = stats.detectable_difference(2, 60, 0.95)
    assert 0.10 < few < 0.16
    assert stats.detectable_difference(0, 3, 0.95) == 1
