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
