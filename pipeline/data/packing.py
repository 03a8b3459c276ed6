"""Which documents train together: the order, the steps, and packs without padding. Torch-free.

A step is the documents of one optimiser update, a function of (lengths, strata, batch, seed, epoch)
alone. A pack is several of them in one token row; how they are shared among ranks changes no result.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.recipes import Batch

Pack = list[int]
Step = list[int]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of ``capacity``: longest first, each into the fullest bin it fits.

    Returns bins of item indices. Within 11/9 of the optimal number of bins (Johnson, 1974).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} of length {length} exceeds the capacity {capacity}")
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([item])
            bisect.insort(room, (capacity - length, len(bins) - 1))
        else:
            left, index = room.pop(at)
            bins[index].append(item)
            bisect.insort(room, (left - length, index))
    return bins


def mixed_order(strata: Sequence[int], seed: int, epoch: int) -> list[int]:
    """A shuffle in which every stratum is spread evenly, so that each step sees the same mix."""
    random = np.random.default_rng([seed, epoch])
    strata_array = np.asarray(strata)
    place = np.empty(len(strata))
    for stratum in np.unique(strata_array):
        members = random.permutation(np.flatnonzero(strata_array == stratum))
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    return [int(i) for i in np.argsort(place, kind="stable")]


def epoch_steps(
    lengths: Sequence[int], strata: Sequence[int], batch: Batch, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch. Every document is in exactly one of them.

    ``batch.rows``: documents a step (the last one may be smaller); ``batch.tokens``: as many
    documents as fit, at least one.
    """
    steps: list[Step] = [[]]
    tokens = 0
    for document in mixed_order(strata, seed, epoch):
        length = lengths[document]
        if batch.rows is not None:
            full = len(steps[-1]) >= batch.rows
        else:
            assert batch.tokens is not None
            full = bool(steps[-1]) and tokens + length > batch.tokens
        if full:
            steps.append([])
            tokens = 0
        steps[-1].append(document)
        tokens += length
    return steps


def share(step: Step, lengths: Sequence[int], capacity: int, ranks: int) -> list[list[Pack]]:
    """Packs of each rank, of at most ``capacity`` tokens: equal in number, and as few as hold the
    documents; balanced by cost. An empty pack is a gap that training fills."""
    packs = _packs(step, lengths, capacity, ranks)
    each = len(packs) // ranks
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]  # a heap: (load, rank)
    costs = [sum(cost(lengths[d]) for d in pack) for pack in packs]
    for index in sorted(range(len(packs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(waiting)
        shares[rank].append(packs[index])
        if len(shares[rank]) < each:
            heapq.heappush(waiting, (load + costs[index], rank))
    return shares


def _packs(step: Step, lengths: Sequence[int], capacity: int, ranks: int) -> list[Pack]:
    """The packs of a step, a multiple of ``ranks``, in as few rows of packs as can be found."""
    least = -(-sum(lengths[d] for d in step) // capacity)
    count = _multiple(least, ranks)
    found = _balanced(step, lengths, capacity, count) or _exchanged(step, lengths, capacity, count)
    if found:
        return found
    bins = best_fit_decreasing([lengths[d] for d in step], capacity)
    count = _multiple(len(bins), ranks)
    packs = [[step[i] for i in members] for members in bins] + [[]] * (count - len(bins))
    return _balanced(step, lengths, capacity, count) or packs


def _multiple(count: int, ranks: int) -> int:
    """The smallest positive multiple of ``ranks`` that is at least ``count``."""
    return ranks * max(1, -(-count // ranks))


def _balanced(step: Step, lengths: Sequence[int], capacity: int, count: int) -> list[Pack] | None:
    """``count`` packs, longest document first, each into the cheapest pack that has room; None where
    that leaves a document without one. Every document moves a pack a few times between two heaps."""
    packs: list[Pack] = [[] for _ in range(count)]
    load, room = [0.0] * count, [capacity] * count
    cheapest = [(0.0, pack) for pack in range(count)]
    tight: list[tuple[int, int]] = []  # (-room, pack): had no room for a longer document
    for document in sorted(step, key=lambda d: (-lengths[d], d)):
        length = lengths[document]
        while tight and -tight[0][0] >= length:
            pack = heapq.heappop(tight)[1]
            heapq.heappush(cheapest, (load[pack], pack))
        while cheapest and room[cheapest[0][1]] < length:
            pack = heapq.heappop(cheapest)[1]
            heapq.heappush(tight, (-room[pack], pack))
        if not cheapest:
            return None
        pack = cheapest[0][1]
        packs[pack].append(document)
        room[pack] -= length
        load[pack] += cost(length)
        heapq.heapreplace(cheapest, (load[pack], pack))
    return packs


def _exchanged(step: Step, lengths: Sequence[int], capacity: int, count: int) -> list[Pack] | None:
    """``count`` packs balanced without regard to ``capacity``; then the fullest and the emptiest
    exchange documents until none is over-full. None where no exchange helps.

    Packs that are full to a few tokens are found like this; putting in one document after the other
    finds them only where some documents are very short.
    """
    packs = _balanced(step, lengths, sum(lengths[d] for d in step), count)
    assert packs is not None
    for pack in packs:
        pack.sort(key=lengths.__getitem__)
    tokens = [sum(lengths[d] for d in pack) for pack in packs]
    while (most := max(tokens)) > capacity:
        full, empty = tokens.index(most), tokens.index(min(tokens))
        pair = _halving(packs[full], packs[empty], lengths, most - tokens[empty])
        if pair is None:
            return None
        for document, here, there in ((pair[0], full, empty), (pair[1], empty, full)):
            if document is not None:
                packs[here].remove(document)
                bisect.insort(packs[there], document, key=lengths.__getitem__)
                tokens[here] -= lengths[document]
                tokens[there] += lengths[document]
    return packs


def _halving(
    full: Pack, empty: Pack, lengths: Sequence[int], gap: int
) -> tuple[int, int | None] | None:
    """The document of ``full`` and that of ``empty`` (or none) whose exchange comes closest to
    halving the ``gap`` between the two packs; None where every exchange widens it."""
    best: tuple[int, int | None] | None = None
    off = gap
    sizes = [0, *(lengths[d] for d in empty)]
    for document in full:
        at = bisect.bisect_left(sizes, lengths[document] - gap / 2)
        for other in (at - 1, at):
            if 0 <= other < len(sizes):
                moved = lengths[document] - sizes[other]
                if abs(gap - 2 * moved) < off:
                    off = abs(gap - 2 * moved)
                    best = (document, empty[other - 1] if other else None)
    return best


def cost(length: int) -> float:
    """Of a document: its tokens (matrix products) and its squared length over 4096 (attention)."""
    return length + length**2 / 4096


@dataclass(frozen=True)
class Fill:
    """How well a pass over steps uses its ranks.

    ``efficiency``: tokens over the capacity of all packs. (No pack is padded, so what is empty costs
    memory at most.) ``imbalance``: share of the time that ranks wait for the costliest of them,
    pack by pack; ``token_imbalance`` and ``square_imbalance``: the same where only tokens count, or
    only squared lengths, and over a rank's whole step.
    """

    efficiency: float
    imbalance: float
    token_imbalance: float
    square_imbalance: float


def measure(steps: Sequence[Step], lengths: Sequence[int], capacity: int, ranks: int) -> Fill:
    """``Fill`` of all ``steps``, shared among ``ranks``."""
    packs = 0
    used, waited = np.zeros(3), np.zeros(3)
    for step in steps:
        shares = share(step, lengths, capacity, ranks)
        packs += sum(len(one) for one in shares)
        for turn in zip(*shares, strict=True):
            costs = [sum(cost(lengths[d]) for d in pack) for pack in turn]
            used[0] += sum(costs)
            waited[0] += max(costs) * ranks
        for at, power in ((1, 1), (2, 2)):
            sums = [sum(lengths[d] ** power for pack in one for d in pack) for one in shares]
            used[at] += sum(sums)
            waited[at] += max(sums) * ranks
    return Fill(used[1] / (packs * capacity), *(float(x) for x in 1.0 - used / waited))
