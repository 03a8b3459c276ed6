"""Packing: no pack overflows, nothing is lost or doubled, and no number of ranks changes a step."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from pipeline.data.packing import (
    best_fit_decreasing,
    cost,
    epoch_steps,
    measure,
    mixed_order,
    share,
)
from pipeline.recipes import Batch

BATCHES = (Batch(rows=1), Batch(rows=7), Batch(rows=1000), Batch(tokens=1), Batch(tokens=300))


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The plain way, in the given order: into the first bin that has room."""
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        for members in bins:
            if sum(lengths[i] for i in members) + length <= capacity:
                members.append(item)
                break
        else:
            bins.append([item])
    return bins


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying everything (a handful of items)."""

    def place(left: list[int], rooms: tuple[int, ...], best: int) -> int:
        if len(rooms) >= best:
            return best
        if not left:
            return len(rooms)
        for at in range(len(rooms)):
            if rooms[at] >= left[0]:
                fuller = (*rooms[:at], rooms[at] - left[0], *rooms[at + 1 :])
                best = place(left[1:], fuller, best)
        return place(left[1:], (*rooms, capacity - left[0]), best)

    return place(sorted(lengths, reverse=True), (), len(lengths) + 1)


def some_lengths(seed: int, count: int | None = None, capacity: int = 64) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, capacity) for _ in range(count or rng.randint(1, 60))]


@pytest.mark.parametrize("seed", range(40))
def test_bins_hold_every_item_once_and_never_too_much(seed: int) -> None:
    lengths = some_lengths(seed)
    bins = best_fit_decreasing(lengths, 64)
    assert Counter(chain(*bins)) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= 64 for members in bins)
    assert bins == best_fit_decreasing(lengths, 64)


@pytest.mark.parametrize("seed", range(40))
def test_never_worse_than_first_fit_and_near_the_bound(seed: int) -> None:
    lengths = some_lengths(seed)
    bins = len(best_fit_decreasing(lengths, 64))
    assert bins <= len(first_fit(lengths, 64))
    least = max(-(-sum(lengths) // 64), sum(length > 32 for length in lengths))
    assert bins <= 11 / 9 * least + 1


@pytest.mark.parametrize("seed", range(25))
def test_within_eleven_ninths_of_the_optimum(seed: int) -> None:
    lengths = some_lengths(seed, count=8, capacity=20)
    best = fewest_bins(lengths, 20)
    assert best <= len(best_fit_decreasing(lengths, 20)) <= 11 / 9 * best + 6 / 9


def test_edges() -> None:
    assert best_fit_decreasing([], 8) == []
    assert best_fit_decreasing([8, 8], 8) == [[0], [1]]
    assert best_fit_decreasing([3, 5, 4, 4], 8) == [[1, 0], [2, 3]]
    with pytest.raises(ValueError, match="item 1 of length 9 exceeds the capacity 8"):
        best_fit_decreasing([1, 9], 8)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_holds_every_document_once(batch: Batch, seed: int) -> None:
    lengths = some_lengths(5, count=90)
    strata = [i % 3 for i in range(90)]
    steps = epoch_steps(lengths, strata, batch, seed, epoch=2)
    assert Counter(chain(*steps)) == Counter(range(90))
    for step in steps:
        if batch.rows is not None:
            assert len(step) == batch.rows or step is steps[-1]
        if batch.tokens is not None:
            assert sum(lengths[d] for d in step) <= batch.tokens or len(step) == 1


def test_a_step_in_tokens_takes_as_many_documents_as_fit() -> None:
    lengths = some_lengths(8, count=60)
    order = mixed_order([0] * 60, 0, 0)
    steps = epoch_steps(lengths, [0] * 60, Batch(tokens=200), 0, 0)
    firsts = np.cumsum([0, *map(len, steps)])
    for number, step in enumerate(steps[:-1]):
        assert sum(lengths[d] for d in [*step, order[firsts[number + 1]]]) > 200


def test_epochs_and_seeds_are_shuffled_anew_and_always_alike() -> None:
    orders = {
        (seed, epoch): tuple(mixed_order([0] * 50, seed, epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert orders == {key: tuple(mixed_order([0] * 50, *key)) for key in orders}


@pytest.mark.parametrize("counts", [(80, 20), (50, 30, 20), (97, 3)])
def test_every_stretch_has_the_same_mix(counts: tuple[int, ...]) -> None:
    """In any ten in a row each stratum has its share, but for one row at either end."""
    strata = list(chain(*([i] * n for i, n in enumerate(counts))))
    for seed in range(5):
        order = mixed_order(strata, seed, 0)
        for start in range(90):
            seen = Counter(strata[d] for d in order[start : start + 10])
            for stratum, count in enumerate(counts):
                assert abs(seen[stratum] - count / 10) < 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(10))
def test_ranks_share_every_document_once_in_equal_numbers_of_packs(ranks: int, seed: int) -> None:
    lengths = some_lengths(seed)
    step = list(range(len(lengths)))
    shares = share(step, lengths, 64, ranks)
    packs = list(chain(*shares))
    assert Counter(chain(*packs)) == Counter(step)
    assert all(sum(lengths[d] for d in pack) <= 64 for pack in packs)
    fewest = len(best_fit_decreasing(lengths, 64))
    (each,) = {len(one) for one in shares}
    assert -(-sum(lengths) // (64 * ranks)) <= each <= -(-fewest // ranks)
    assert shares == share(step, lengths, 64, ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_near_equal_work(ranks: int) -> None:
    """Greedy by decreasing cost is within 4/3 of the optimum (Graham, 1969); in bulk far closer."""
    rng = random.Random(ranks)
    lengths = [rng.randint(40, 90) for _ in range(32 * ranks)]
    shares = share(list(range(len(lengths))), lengths, 4096, ranks)
    loads = [sum(cost(lengths[d]) for pack in one for d in pack) for one in shares]
    assert max(loads) <= 1.01 * sum(loads) / ranks
    steps = [list(range(len(lengths)))]
    found = measure(steps, lengths, 4096, ranks)
    assert found.imbalance == pytest.approx(1 - sum(loads) / ranks / max(loads))
    assert found.efficiency == pytest.approx(sum(lengths) / (ranks * 4096))
    for power, value in ((1, found.token_imbalance), (2, found.square_imbalance)):
        sums = [sum(lengths[d] ** power for pack in one for d in pack) for one in shares]
        assert value == pytest.approx(1 - sum(sums) / ranks / max(sums))


def test_a_small_step_is_spread_over_ranks_though_one_pack_would_hold_it() -> None:
    shares = share([3, 1, 2, 0], [64, 60, 8, 4], 1024, 2)
    assert [sorted(chain(*one)) for one in shares] == [[0, 3], [1, 2]]


def test_full_packs_fall_back_to_the_closest_fit() -> None:
    """Spreading by cost would leave no room for the last document; the fewest packs still hold all."""
    lengths = [6, 5, 4, 3, 2]
    shares = share(list(range(5)), lengths, 10, 2)
    assert sorted(sum(lengths[d] for d in pack) for pack in chain(*shares)) == [10, 10]


def test_more_ranks_than_documents() -> None:
    assert share([0], [5], 8, 3) == [[[0]], [[]], [[]]]
    assert measure([[0]], [5], 8, 1).imbalance == 0.0
    assert measure([[0]], [5], 8, 1).efficiency == 5 / 8
    assert measure([[0]], [5], 8, 4).imbalance == pytest.approx(0.75)


def plainly_balanced(lengths: list[int], capacity: int, count: int) -> list[list[int]] | None:
    """The plain way: for each document, look at all packs."""
    packs: list[list[int]] = [[] for _ in range(count)]
    for d in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        fit = [p for p in packs if sum(lengths[i] for i in p) + lengths[d] <= capacity]
        if not fit:
            return None
        min(fit, key=lambda p: sum(cost(lengths[i]) for i in p)).append(d)
    return packs


@pytest.mark.parametrize("seed", range(30))
def test_heaps_find_what_looking_at_all_packs_finds(seed: int) -> None:
    lengths = some_lengths(seed, capacity=64 if seed % 2 else 20)
    least = -(-sum(lengths) // 64)
    for ranks in (least, least + 1, least + 5):
        wanted = plainly_balanced(lengths, 64, ranks)
        shares = share(list(range(len(lengths))), lengths, 64, ranks)
        if wanted is not None:
            assert sorted(chain(*shares)) == sorted(wanted)


def test_a_large_pass_is_shared_in_a_moment() -> None:
    """Work grows with the documents and not with documents times packs."""
    rng = random.Random(0)
    calls = 0

    class Counted(list[int]):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return super().__getitem__(index)

    for count in (2000, 8000):
        calls = 0
        lengths = Counted(rng.randint(20, 200) for _ in range(count))
        packs = list(chain(*share(list(range(count)), lengths, 512, 8)))
        assert Counter(chain(*packs)) == Counter(range(count))
        assert calls < 20 * count


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_nearly_full_packs_are_found_by_exchanges(ranks: int, seed: int) -> None:
    """Documents of like length leave gaps that none fits: greedy packing needs more packs."""
    rng = random.Random(seed)
    count, lengths = 8 * ranks, list[int]()
    while sum(lengths) + 107 <= 0.999 * count * 1024:
        lengths.append(rng.randint(47, 107))
    assert len(best_fit_decreasing(lengths, 1024)) > count
    packs = list(chain(*share(list(range(len(lengths))), lengths, 1024, ranks)))
    assert len(packs) == count
    assert Counter(chain(*packs)) == Counter(range(len(lengths)))
    assert max(sum(lengths[d] for d in pack) for pack in packs) <= 1024
    assert measure([list(range(len(lengths)))], lengths, 1024, ranks).efficiency > 0.99


def test_where_no_exchange_helps_there_are_more_packs() -> None:
    shares = share([0, 1, 2], [6, 6, 6], 10, 2)
    assert sorted(chain(*chain(*shares))) == [0, 1, 2]
    assert [len(one) for one in shares] == [2, 2]
