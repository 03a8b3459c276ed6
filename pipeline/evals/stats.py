"""Intervals and paired tests for what the evaluation reports. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


def wilson(successes: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); (0, 1) when ``n`` is 0. Neither need be
    whole, see ``share_interval``.

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


def share_interval(shares: Sequence[float], samples: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval for the mean over rows, where each row has its share of ``samples`` draws.

    Draws of one row are alike, so there are fewer independent ones than draws: as many as give the
    variance that the shares have between rows, at least one a row (Dean and Pagano 2015). With one
    sample it is Wilson's interval itself; (0, 1) without rows.
    """
    n = len(shares)
    if n == 0:
        return 0.0, 1.0
    mean = math.fsum(shares) / n
    most = n * samples
    spread = math.fsum((share - mean) ** 2 for share in shares) / max(1, n - 1) / n
    draws = mean * (1 - mean) / spread if spread > 0 else most
    draws = min(max(draws, n), most) if 0 < mean < 1 else n
    return wilson(mean * draws, draws, confidence)


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


def sign_flip(changes: Sequence[int]) -> float:
    """Exact two-sided p-value of paired rows, from the change of each (in draws, of as many a row).

    Under no change, that of a row is as likely the other way round; the sum is held against all such
    flips. With one draw a row this is McNemar's exact test. 1.0 when nothing changed.
    """
    sizes = [abs(change) for change in changes if change]
    total, seen = sum(sizes), abs(sum(changes))
    if seen == 0:
        return 1.0
    chance = np.zeros(2 * total + 1)  # of each sum, -total..total
    chance[total] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    return min(1.0, float(chance[: total - seen + 1].sum() + chance[total + seen :].sum()))


def paired_interval(differences: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean of the differences of paired rows, each within -1..1, and its interval.

    For proportions (-1, 0 and 1) the adjusted Wald interval of Bonett and Price (2012), which holds
    its coverage down to few discordant rows: one row is added that changed each way. For shares of
    several draws the same. The mean itself is not adjusted. ValueError without rows, or beyond 1.
    """
    if not differences or max(map(abs, differences)) > 1:
        raise ValueError(f"differences of {len(differences)} rows; wanted some, within -1..1")
    values = np.asarray([*differences, 1.0, -1.0], dtype=np.float64)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, half = float(values.mean()), z * float(values.std()) / math.sqrt(len(values))
    mean = math.fsum(differences) / len(differences)
    return mean, max(-1.0, centre - half), min(1.0, centre + half)


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


def detectable_difference(
    discordant: float, n: int, confidence: float, power: float = 0.8
) -> float:
    """The least difference of two paired proportions that ``n`` rows would show with ``power``.

    ``discordant``: rows that changed; of several draws the sum of squared changes of the share.
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
