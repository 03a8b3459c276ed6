"""When a training has lost its way: a rule that no healthy run meets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median_low

WINDOW = 5
LOSSES = ("cross_entropy", "kl")


class Divergence:
    """For each loss, unweighted, in nats a token: the low median of the last ``WINDOW`` steps (of all
    steps, while they are fewer) may not exceed the lowest such median by more than ``nats``.

    A single bad batch does not move a median, and a loss that falls and wavers never gains 5 nats a
    token: a uniform guess over 100,000 tokens costs 11.5.
    """

    def __init__(self, nats: float, history: Iterable[Mapping[str, float]]) -> None:
        self.nats = nats
        self.last: dict[str, list[float]] = {}
        self.lowest: dict[str, float] = {}
        self.suspicious = False
        for record in history:
            self.see(record)

    def see(self, record: Mapping[str, float]) -> str | None:
        """Take in the losses of a step; says what is wrong. ``suspicious``: this step alone is."""
        found = None
        self.suspicious = False
        for name in LOSSES:
            if name not in record:
                continue
            last = [*self.last.get(name, []), record[name]][-WINDOW:]
            now = median_low(last)
            lowest = min(self.lowest.get(name, now), now)
            self.last[name], self.lowest[name] = last, lowest
            self.suspicious |= record[name] > lowest + self.nats
            if now > lowest + self.nats:
                found = (
                    f"{name} has risen to {now:.2f} nats a token (median of the last {len(last)}"
                    f" steps) from {lowest:.2f}"
                )
        return found
