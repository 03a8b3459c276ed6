"""Intervals and tests against scipy."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from pipeline.evals import stats
from pipeline.evals.stats import ratio_interval, share_interval, sign_flip, wilson


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
def test_sign_flip_equals_the_exact_binomial_test(b: int, c: int) -> None:
    """One draw a row: McNemar's exact test, which is a binomial one of the discordant rows."""
    want = reference.binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    changes = [-1] * b + [0] * 5 + [1] * c
    assert sign_flip(changes) == pytest.approx(want, rel=1e-9)
    assert sign_flip([-change for change in changes]) == sign_flip(changes)


def test_sign_flip_equals_scipys_permutation_test() -> None:
    """Several draws a row: all 2**n ways to flip signs, counted by scipy."""
    rng = np.random.default_rng(4)
    for draws in (2, 5):
        for _ in range(4):
            changes = rng.integers(-draws, draws + 1, size=10) + rng.integers(0, 2, size=10)
            want = reference.permutation_test(
                (changes.astype(float), np.zeros(10)),
                lambda a, b, axis: (a - b).sum(axis=axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=np.inf,
            ).pvalue
            assert sign_flip(changes.tolist()) == pytest.approx(want, abs=1e-12)


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


def pairs(only_first: int, only_second: int, n: int) -> list[int]:
    """The changes of n rows, of which so many changed either way."""
    return [-1] * only_first + [1] * only_second + [0] * (n - only_first - only_second)


def draws_of(n: int, samples: int, mean: float, alike: float, seed: int) -> np.ndarray:
    """Shares of ``n`` rows with chances of their own around ``mean`` (beta; ``alike``: how much of the
    variance of a draw is between rows), over 2000 evaluations."""
    rng = np.random.default_rng(seed)
    weight = 1 / alike - 1
    chances = rng.beta(mean * weight, (1 - mean) * weight, size=(2000, n))
    return rng.binomial(samples, chances) / samples


@pytest.mark.parametrize(
    ("n", "samples", "mean", "alike"),
    [
        (60, 8, 0.3, 0.2),
        (60, 8, 0.3, 0.9),
        (200, 4, 0.9, 0.5),
        (100, 8, 0.97, 0.3),
        (313, 2, 0.1, 0.6),
    ],
)
def test_the_share_interval_covers_what_it_says(
    n: int, samples: int, mean: float, alike: float
) -> None:
    """Also where draws of a row are much alike, so that taking them for rows would claim too much."""
    shares = draws_of(n, samples, mean, alike, seed=5)
    intervals = [share_interval(row, samples, 0.95) for row in shares.tolist()]
    inside = np.mean([low <= mean <= high for low, high in intervals])
    assert 0.925 <= inside <= 0.995
    if alike >= 0.5:
        naive = [wilson(round(row.sum() * samples), n * samples, 0.95) for row in shares]
        assert np.mean([low <= mean <= high for low, high in naive]) < 0.925


def test_the_share_interval_of_one_draw_is_wilsons() -> None:
    for successes, n in ((0, 7), (7, 7), (3, 50), (1, 2)):
        shares = [1.0] * successes + [0.0] * (n - successes)
        want = wilson(successes, n, 0.95)
        assert share_interval(shares, 1, 0.95) == pytest.approx(want, abs=1e-12)
        assert share_interval(shares, 8, 0.95) == pytest.approx(want, abs=1e-12)
    assert share_interval([], 4, 0.95) == (0.0, 1.0)
    assert share_interval([0.25] * 40, 4, 0.95) == wilson(40, 160, 0.95)  # rows that are all alike


def test_the_paired_interval_of_shares_covers_what_it_says() -> None:
    """The same rows drawn again: differences of shares, and their mean is zero."""
    for n, samples, mean, alike in ((50, 4, 0.3, 0.5), (100, 8, 0.05, 0.5), (100, 8, 0.9, 0.9)):
        rng = np.random.default_rng(6)
        weight = 1 / alike - 1
        chances = rng.beta(mean * weight, (1 - mean) * weight, size=(2000, n))
        one, two = (rng.binomial(samples, chances) / samples for _ in range(2))
        inside = 0
        for row in (two - one).tolist():
            _, low, high = stats.paired_interval(row, 0.95)
            inside += low <= 0 <= high
        assert inside / 2000 >= 0.93, (n, samples)


def test_the_paired_interval_covers_what_it_says() -> None:
    """Simulated pairs of proportions, few and many rows: the truth is inside nearly as often as stated."""
    rng = np.random.default_rng(0)
    for n, first, second in ((30, 0.05, 0.15), (100, 0.02, 0.10), (300, 0.2, 0.2), (50, 0.0, 0.02)):
        draws = rng.multinomial(n, [first, second, 1 - first - second], size=4000)
        inside = 0
        for only_first, only_second, _ in draws.tolist():
            _, low, high = stats.paired_interval(pairs(only_first, only_second, n), 0.95)
            inside += low <= second - first <= high
        assert inside / len(draws) >= 0.93, (n, first, second)


def test_the_paired_interval_by_hand() -> None:
    value, low, high = stats.paired_interval(pairs(3, 9, 50), 0.95)
    centre, spread = 6 / 52, math.sqrt((14 / 52 - (6 / 52) ** 2) / 52)
    assert value == 6 / 50
    assert low == pytest.approx(centre - 1.959964 * spread, abs=1e-6)
    assert high == pytest.approx(centre + 1.959964 * spread, abs=1e-6)
    for wrong in ([], [0.5, 1.5]):
        with pytest.raises(ValueError, match=f"of {len(wrong)} rows; wanted some"):
            stats.paired_interval(wrong, 0.95)


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
        counts = [(a, b) for a, b, _ in draws.tolist()]
        p = {pair: sign_flip(pairs(*pair, n)) for pair in set(counts)}
        found = sum(p[pair] < 0.05 for pair in counts)
        # the exact test is a little less powerful than the normal one that the formula describes
        assert 0.70 < found / len(draws) < 0.86, (n, share)
    few = stats.detectable_difference(2, 60, 0.95)
    assert 0.10 < few < 0.16
    assert stats.detectable_difference(0, 3, 0.95) == 1
