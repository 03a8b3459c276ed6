"""Which documents train together: the order, the steps, and packs without padding. Torch-free.

A pack is several documents in one token row; a step is the packs of one optimiser update. Both are
functions of (lengths, strata, batch, seed, epoch) alone, whatever the number of ranks.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from pipeline.recipes import Batch

Pack = list[int]
Step = list[Pack]


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
    lengths: Sequence[int],
    strata: Sequence[int],
    batch: Batch,
    capacity: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """The steps of one epoch. Every document is in exactly one pack of one step.

    ``batch.rows``: documents a step (the last one may be smaller); ``batch.tokens``: as many
    documents as fit, at least one.
    """
    groups: list[list[int]] = [[]]
    tokens = 0
    for document in mixed_order(strata, seed, epoch):
        length = lengths[document]
        if batch.rows is not None:
            full = len(groups[-1]) >= batch.rows
        else:
            assert batch.tokens is not None
            full = bool(groups[-1]) and tokens + length > batch.tokens
        if full:
            groups.append([])
            tokens = 0
        groups[-1].append(document)
        tokens += length
    steps = []
    for group in groups:
        bins = best_fit_decreasing([lengths[d] for d in group], capacity)
        steps.append([[group[i] for i in members] for members in bins])
    return steps


def assign(step: Step, lengths: Sequence[int], ranks: int) -> list[list[Pack]]:
    """Packs of each rank: equal in number (an empty pack fills a gap), balanced by cost.

    Cost of a pack: its tokens (matrix products) plus its squared lengths over 4096 (attention).
    """
    per_rank = -(-len(step) // ranks)
    cost = [sum(lengths[d] + lengths[d] ** 2 / 4096 for d in pack) for pack in step]
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for index in sorted(range(len(step)), key=lambda i: (-cost[i], i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < per_rank), key=lambda r: load[r])
        shares[rank].append(step[index])
        load[rank] += cost[index]
    for share in shares:
        share.extend([] for _ in range(per_rank - len(share)))
    return shares
