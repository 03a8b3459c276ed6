"""Intervals and paired tests for what the evaluation reports. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); (0, 1) when ``n`` is 0.

    ValueError when ``successes`` is not within 0..n or ``confidence`` not within (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def ratio_interval(
    sums: Sequence[float], counts: Sequence[int], confidence: float, seed: int = 0
) -> tuple[float, float, float]:
    """sum(sums) / sum(counts) and its percentile bootstrap interval over rows, seeded.

    For nats per token: ``sums`` are nats and ``counts`` tokens of each row. ValueError when empty.
    """
    if not sums or len(sums) != len(counts):
        raise ValueError(f"{len(sums)} sums and {len(counts)} counts; wanted as many, at least one")
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(top), size=(RESAMPLES, len(top)))
    ratios = top[rows].sum(axis=1) / bottom[rows].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(top.sum() / bottom.sum()), float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value of paired outcomes, from the two discordant counts.

    Under no change, discordant pairs fall either way with probability 1/2; 1.0 when there is none.
    """
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


def paired_interval(
    only_first: int, only_second: int, n: int, confidence: float
) -> tuple[float, float, float]:
    """Difference of two paired proportions (second minus first) and its interval.

    The adjusted Wald interval of Bonett and Price (2012), which holds its coverage down to few
    discordant rows: one row is added to each discordant count. The difference itself is not adjusted.
    ValueError when the counts do not fit ``n``.
    """
    if n <= 0 or min(only_first, only_second) < 0 or only_first + only_second > n:
        raise ValueError(f"{only_first} and {only_second} discordant rows of {n}")
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    centre = second - first
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * math.sqrt((first + second - centre * centre) / (n + 2))
    return (only_second - only_first) / n, max(-1.0, centre - half), min(1.0, centre + half)


def relative_change(
    before: Sequence[float], after: Sequence[float], confidence: float, seed: int = 0
) -> tuple[float, float, float]:
    """sum(after) / sum(before) - 1 over the same rows, and its paired bootstrap interval.

    ValueError when empty or of different lengths; ZeroDivisionError when ``before`` sums to zero.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} rows; wanted as many, at least one")
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.sum() == 0:
        raise ZeroDivisionError("a change relative to zero")
    rows = np.random.default_rng(seed).integers(0, len(first), size=(RESAMPLES, len(first)))
    changes = second[rows].sum(axis=1) / first[rows].sum(axis=1) - 1
    tail = (1 - confidence) / 2
    low, high = np.quantile(changes, [tail, 1 - tail])
    return float(second.sum() / first.sum() - 1), float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the given order: each is to be held against the
    level at which *any* false finding among them all shall be rare."""
    adjusted, most = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = most
    return adjusted


def detectable_difference(discordant: int, n: int, confidence: float, power: float = 0.8) -> float:
    """The least difference of two paired proportions that ``n`` rows would show with ``power``.

    Connor (1987) for McNemar's test, solved for the difference, at the share of discordant rows seen
    here (one pair added, so that none seen is not taken for none there), or the difference itself
    where that is more. At most 1.
    """
    if n <= 0 or not 0 <= discordant <= n:
        raise ValueError(f"{discordant} discordant rows of {n}")
    share = (discordant + 2) / (n + 2)
    z, z_power = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(power)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        apart = max(share, middle)
        needed = z * math.sqrt(apart) + z_power * math.sqrt(max(0.0, apart - middle * middle))
        low, high = (middle, high) if middle * math.sqrt(n) < needed else (low, middle)
    return high
