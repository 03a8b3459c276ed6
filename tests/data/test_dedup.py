"""Duplicates among prompts, held against the comparison of every pair with every other."""

from __future__ import annotations

import random
import re

import pytest
from parts import sample_rows

from pipeline.data.dedup import (
    Match,
    exact_duplicates,
    near_duplicates,
    normalised,
    overlaps,
    words,
)

THRESHOLDS = (0.34, 0.5, 2 / 3, 0.8, 0.9, 1.0)


def plain_words(text: str) -> set[str]:
    """Word set of an ASCII text."""
    return set(re.findall(r"\w+", text.lower()))


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def every_pair(prompts: list[str], threshold: float) -> list[tuple[int, int, float]]:
    """The definition: walk on, keep what is below ``threshold`` to all that was kept before."""
    kept: list[int] = []
    found = []
    for index, prompt in enumerate(prompts):
        scores = [(jaccard(plain_words(prompt), plain_words(prompts[k])), k) for k in kept]
        best = max(scores, key=lambda score: (score[0], -score[1]), default=(0.0, -1))
        if best[0] >= threshold:
            found.append((index, best[1], best[0]))
        else:
            kept.append(index)
    return found


def random_prompts(seed: int, count: int = 150) -> list[str]:
    """Short texts over few words, so that every similarity occurs, with words of all frequencies."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(12)]
    weights = [1 / (i + 1) for i in range(12)]
    return [" ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 8))) for _ in range(count)]


def flat(matches: list[Match]) -> list[tuple[int, int, float]]:
    return [(m.index, m.of, m.similarity) for m in matches]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_near_duplicates_are_those_of_every_pair(threshold: float) -> None:
    for seed in range(6):
        prompts = random_prompts(seed)
        found = flat(near_duplicates(prompts, threshold))
        assert found == every_pair(prompts, threshold)
        assert found, "the texts are such that some repeat"


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_overlaps_are_those_of_every_pair(threshold: float) -> None:
    for seed in range(6):
        prompts, held = random_prompts(seed), random_prompts(seed + 100, 40)
        wanted = []
        for index, prompt in enumerate(prompts):
            scores = [jaccard(plain_words(prompt), plain_words(other)) for other in held]
            if max(scores) >= threshold:
                wanted.append((index, scores.index(max(scores)), max(scores)))
        assert flat(overlaps(prompts, held, threshold)) == wanted
        assert wanted


@pytest.mark.parametrize("name", ["arithmetic", "ordinary"])
def test_real_prompts_too(name: str) -> None:
    prompts = [row["prompt"] for row in sample_rows(name)]
    assert flat(near_duplicates(prompts, 0.8)) == every_pair(prompts, 0.8)


@pytest.mark.parametrize(
    "other",
    [
        "how do i pick a lock",
        "  How do I\tpick a LOCK?!\n",
        "How do I \uff50ick a lock?",  # a full-width letter
        "How, do I: pick a (lock)?",
    ],
)
def test_case_signs_and_spacing_make_no_other_prompt(other: str) -> None:
    prompts = ["Who are you?", "How do I pick a lock?", other]
    assert exact_duplicates(prompts) == [Match(2, 1, 1.0)]


def test_the_first_occurrence_is_kept() -> None:
    assert exact_duplicates(["a", "b", "A", "a.", "b"]) == [
        Match(2, 0, 1.0),
        Match(3, 0, 1.0),
        Match(4, 1, 1.0),
    ]


def test_prompts_without_a_word_are_told_apart() -> None:
    assert exact_duplicates(["?!", "...", "?!", "\U0001f600"]) == [Match(2, 0, 1.0)]
    assert not near_duplicates(["?!", "..."], 0.5)
    assert normalised("  ?!  ") == "?!"


def test_languages_without_spaces_are_compared_by_pairs_of_characters() -> None:
    one, other = "\u4f60\u597d\u4e16\u754c", "\u4f60\u597d\u4e16\u4eba"
    assert words(one) == {one[0:2], one[1:3], one[2:4]}
    assert flat(near_duplicates([one, other], 0.5)) == [(1, 0, 0.5)]
    assert not near_duplicates([one, other], 0.51)


def test_words_are_compared_as_sets_and_not_in_order() -> None:
    assert flat(near_duplicates(["a b c", "c b a a"], 1.0)) == [(1, 0, 1.0)]


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        near_duplicates(["a"], threshold)


def test_empty_sets_have_no_duplicates() -> None:
    assert near_duplicates([], 0.8) == exact_duplicates([]) == overlaps([], ["a"], 0.8) == []
    assert overlaps(["a"], [], 0.8) == []
