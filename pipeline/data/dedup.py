"""Exact and near duplicates among prompts, by the Jaccard similarity of their word sets.

Word sets, not word shingles: prompts are short, and in ten words one exchanged word already brings
the similarity of their 3-shingles down to 0.45, of their word sets to 0.82. The result is exact,
not sampled: a prefix filter (Bayardo et al., "Scaling up all pairs similarity search", WWW 2007)
only skips pairs that cannot reach the threshold. MinHash misses a fifth of these pairs and takes
no less time (benchmarks/dedup.py). Torch-free.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Scripts written without spaces; their runs are cut into overlapping pairs of characters.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]")


@dataclass(frozen=True)
class Match:
    """``index`` of a prompt, ``of`` which other one it repeats, and how similar they are."""

    index: int
    of: int
    similarity: float


def normalised(prompt: str) -> str:
    """The words of a prompt without case, punctuation and spacing.

    A prompt without a single word (only signs) stands for itself.
    """
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(_WORD.findall(folded)) or " ".join(folded.split())


def sequence(text: str) -> list[str]:
    """The normalised words of a text in order; of scripts without spaces, pairs of characters."""
    found: list[str] = []
    for word in normalised(text).split():
        if _UNSPACED_RUN.match(word) and len(word) > 2:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            found.append(word)
    return found


def words(prompt: str) -> frozenset[str]:
    """The set of words that similarity is measured on."""
    return frozenset(sequence(prompt))


def exact_duplicates(prompts: Sequence[str]) -> list[Match]:
    """Prompts whose normalised text came up before, each with its first occurrence."""
    first: dict[str, int] = {}
    found = []
    for index, prompt in enumerate(prompts):
        of = first.setdefault(normalised(prompt), index)
        if of != index:
            found.append(Match(index, of, 1.0))
    return found


def near_duplicates(prompts: Sequence[str], threshold: float) -> list[Match]:
    """Prompts at least ``threshold`` similar to an earlier prompt that was itself kept.

    Each comes with the most similar of those (the earliest, of equals), in order of ``index``.
    """
    sets = [words(prompt) for prompt in prompts]
    index = _Index(sets, threshold)
    found = []
    for position, one in enumerate(sets):
        match = index.best(one)
        if match is None:
            index.add(position, one)
        else:
            found.append(Match(position, *match))
    return found


def overlaps(prompts: Sequence[str], excluded: Sequence[str], threshold: float) -> list[Match]:
    """Prompts at least ``threshold`` similar to one of ``excluded``; ``of`` counts in there."""
    sets, others = [words(p) for p in prompts], [words(p) for p in excluded]
    index = _Index([*sets, *others], threshold)
    for position, other in enumerate(others):
        index.add(position, other)
    matches = ((position, index.best(one)) for position, one in enumerate(sets))
    return [Match(position, *match) for position, match in matches if match is not None]


class _Index:
    """Word sets by their rarest words.

    Two sets of sizes a >= b with Jaccard >= t share at least ceil(t a) words, so in one common
    order of words the first a - ceil(t a) + 1 of each must have one in common. Where the first such
    word has i words before it in one set and j in the other, at most min(a - i, b - j) are shared,
    of at least t / (1 + t) (a + b): most pairs fail that unseen (Xiao et al., "Efficient similarity
    joins for near duplicate detection", WWW 2008). So a word's sets are kept by size and place.
    """

    def __init__(self, sets: Iterable[frozenset[str]], threshold: float) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.threshold = threshold
        self.frequency = Counter(word for one in sets for word in one)
        self.sets: dict[int, frozenset[str]] = {}
        self.by_word: defaultdict[str, dict[tuple[int, int], list[int]]] = defaultdict(dict)

    def _prefix(self, one: frozenset[str]) -> list[str]:
        # The small slack keeps pairs that rounding of t * size would lose.
        length = len(one) - math.ceil(self.threshold * len(one) - 1e-9) + 1
        return sorted(one, key=lambda word: (self.frequency[word], word))[:length]

    def add(self, position: int, one: frozenset[str]) -> None:
        self.sets[position] = one
        for place, word in enumerate(self._prefix(one)):
            self.by_word[word].setdefault((len(one), len(one) - place), []).append(position)

    def best(self, one: frozenset[str]) -> tuple[int, float] | None:
        """The most similar set in here, if any reaches the threshold."""
        share, candidates = self.threshold / (1 + self.threshold), set[int]()
        for place, word in enumerate(self._prefix(one)):
            for (size, left), positions in self.by_word.get(word, {}).items():
                if min(len(one) - place, left) >= share * (len(one) + size) - 1e-9:
                    candidates.update(positions)
        best: tuple[int, float] | None = None
        for position in sorted(candidates):
            other = self.sets[position]
            shared = len(one & other)
            similarity = shared / (len(one) + len(other) - shared)
            if similarity >= self.threshold and (best is None or similarity > best[1]):
                best = (position, similarity)
        return best
