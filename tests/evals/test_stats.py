"""Intervals and tests against scipy."""

import numpy as np
import pytest
from scipy import stats as reference

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
