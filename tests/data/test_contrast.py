"""The contrast rows: complete twins, no repeats, and labels that form and words hardly give away."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from statistics import median
from typing import Any

import pytest
from parts import sample_rows

from pipeline.data.dedup import overlaps, words

ROWS = sample_rows("contrast")
KINDS = ("harmless", "harmful")
CATEGORIES = {
    "homonym",
    "figurative",
    "safe-target",
    "safe-context",
    "definition",
    "nonsense-group",
    "real-group-knowledge",
    "history",
    "privacy-public",
    "safety-advice",
    "security-education",
    "everyday-dangerous-words",
}
Features = Callable[[str], Iterable[str]]


def prompts(**wanted: str) -> list[str]:
    """Prompts of the rows whose columns are as ``wanted``."""
    return [row["prompt"] for row in ROWS if wanted.items() <= row.items()]


def share(of: list[str], holds: Callable[[str], Any]) -> float:
    return sum(bool(holds(prompt)) for prompt in of) / len(of)


def opening(prompt: str) -> list[str]:
    return [" ".join(prompt.lower().split()[:2])]


def form(prompt: str) -> list[str]:
    """Length in steps of three words, first word, signs and two joints that plans of harm favour."""
    joints = [joint for joint in (" so ", ", and") if joint in prompt]
    length = f"{len(prompt.split()) // 3}"
    signs = [prompt[-1], f"{prompt.count(',')} commas", f"{';' in prompt}"]
    return [length, prompt.split()[0], *signs, *joints]


def guessed(rows: list[tuple[str, str, int]], features: Features) -> float:
    """Accuracy of a naive Bayes classifier on (prompt, kind, fold) rows, cross-validated by fold."""
    right = 0
    for fold in {fold for *_, fold in rows}:
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        sizes: Counter[str] = Counter()
        for prompt, kind, of in rows:
            if of != fold:
                seen[kind].update(set(features(prompt)))
                sizes[kind] += 1
        for prompt, kind, of in rows:
            if of == fold:
                scores = {
                    one: math.log(size)
                    + sum(
                        math.log((seen[one][f] + 0.5) / (size + 1)) for f in set(features(prompt))
                    )
                    for one, size in sizes.items()
                }
                right += max(scores, key=scores.__getitem__) == kind
    return right / len(rows)


def test_size_columns_and_mix() -> None:
    for row in ROWS:
        assert set(row) - {"pair"} == {"prompt", "kind", "category", "split"}
        assert all(text == text.strip() and text for text in row.values())
        assert row["kind"] in KINDS and row["split"] in {"train", "heldout"}
    mix = Counter((row["category"], row["kind"]) for row in ROWS)
    assert {category for category, _ in mix} == CATEGORIES
    for category in CATEGORIES:
        assert mix[category, "harmless"] >= 50 and mix[category, "harmful"] >= 35
    for kind in KINDS:
        assert 0.09 < len(prompts(kind=kind, split="heldout")) / len(prompts(kind=kind)) < 0.11
    assert len(prompts(kind="harmless")) >= 550 and len(prompts(kind="harmful")) >= 350


def test_twins_are_complete_and_stay_together() -> None:
    pairs = defaultdict(list)
    for row in ROWS:
        if "pair" in row:
            pairs[row["pair"]].append(row)
    assert sum(map(len, pairs.values())) >= 0.75 * len(ROWS)
    for name, twins in pairs.items():
        assert {row["kind"] for row in twins} == set(KINDS), name
        assert len({(row["category"], row["split"]) for row in twins}) == 1, name
        assert name.startswith(twins[0]["category"])


def test_no_prompt_repeats_another() -> None:
    sets = [(row.get("pair"), words(row["prompt"])) for row in ROWS]
    for (pair, one), (other, two) in combinations(sets, 2):
        bound = 0.75 if pair is not None and pair == other else 0.6
        assert len(one & two) / len(one | two) < bound, (one, two)


@pytest.mark.parametrize("name", ["harmful", "borderline", "ordinary", "arithmetic"])
def test_no_prompt_repeats_an_older_sample(name: str) -> None:
    assert overlaps(prompts(), [row["prompt"] for row in sample_rows(name)], 0.6) == []


def test_forms_are_the_same_for_both_kinds() -> None:
    harmless, harmful = (prompts(kind=kind) for kind in KINDS)
    lengths = [[len(prompt.split()) for prompt in side] for side in (harmless, harmful)]
    assert min(map(min, lengths)) >= 4 and max(map(max, lengths)) <= 25
    assert abs(median(lengths[0]) - median(lengths[1])) <= 1
    forms: list[tuple[float, Callable[[str], Any]]] = [
        (0.05, lambda prompt: re.match(r"how (do|can|could|should) i\b", prompt.lower())),
        (0.08, lambda prompt: prompt.endswith("?")),
        (0.08, lambda prompt: ";" in prompt),
        (0.08, lambda prompt: "," in prompt),
    ]
    firsts = {prompt.split()[0] for prompt in prompts()}
    forms += [(0.03, lambda prompt, first=first: prompt.split()[0] == first) for first in firsts]
    for bound, form in forms:
        assert abs(share(harmless, form) - share(harmful, form)) < bound


def test_words_and_form_hardly_tell_the_kind() -> None:
    """Naive Bayes gains little over the larger kind; on two older samples it gains much."""
    groups: dict[str, int] = {}
    rows = []
    for row in ROWS:
        fold = groups.setdefault(row.get("pair", row["prompt"]), len(groups)) % 10
        rows.append((row["prompt"], row["kind"], fold))
    larger = max(Counter(kind for _, kind, _ in rows).values()) / len(rows)
    for features in (words, opening):
        assert guessed(rows, features) < larger + 0.03
    assert guessed(rows, form) < larger + 0.08
    older = [
        (row["prompt"], name, number % 10)
        for name in ("harmful", "borderline")
        for number, row in enumerate(sample_rows(name))
    ]
    assert guessed(older, words) > 0.7
