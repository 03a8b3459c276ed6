"""Which documents train together: the order, the steps, and packs without padding. Torch-free.

A step is the documents of one optimiser update, a function of (lengths, strata, batch, seed, epoch)
alone. A pack is several of them in one token row; how they are shared among ranks changes no result.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
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
    bins = best_fit_decreasing([lengths[d] for d in step], capacity)
    count = ranks * max(1, -(-len(bins) // ranks))
    packs = _balanced(step, lengths, capacity, count)
    if packs is None:
        packs = [[step[i] for i in members] for members in bins]
        packs += [[] for _ in range(count - len(packs))]
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for pack in sorted(packs, key=lambda pack: -sum(cost(lengths[d]) for d in pack)):
        rank = min(
            (r for r in range(ranks) if len(shares[r]) < count // ranks), key=load.__getitem__
        )
        shares[rank].append(pack)
        load[rank] += sum(cost(lengths[d]) for d in pack)
    return shares


def _balanced(step: Step, lengths: Sequence[int], capacity: int, count: int) -> list[Pack] | None:
    """``count`` packs, costliest document first, each into the cheapest pack that has room; None
    where that leaves a document without one."""
    packs: list[Pack] = [[] for _ in range(count)]
    room, load = [capacity] * count, [0.0] * count
    for document in sorted(step, key=lambda d: (-lengths[d], d)):
        length = lengths[document]
        fitting = [p for p in range(count) if room[p] >= length]
        if not fitting:
            return None
        pack = min(fitting, key=load.__getitem__)
        packs[pack].append(document)
        room[pack] -= length
        load[pack] += cost(length)
    return packs


def cost(length: int) -> float:
    """Of a document: its tokens (matrix products) and its squared length over 4096 (attention)."""
    return length + length**2 / 4096


def imbalance(steps: Sequence[Step], lengths: Sequence[int], capacity: int, ranks: int) -> float:
    """Share of the time that ranks wait for the costliest of them, over all ``steps``."""
    used = total = 0.0
    for step in steps:
        for turn in zip(*share(step, lengths, capacity, ranks), strict=True):
            costs = [sum(cost(lengths[d]) for d in pack) for pack in turn]
            used += sum(costs)
            total += max(costs) * ranks
    return 1.0 - used / total
