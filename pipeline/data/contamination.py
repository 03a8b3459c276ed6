"""Rows to train on that are, or quote, rows to evaluate on. Torch-free.

A row is contaminated by a row of an evaluation set when one of these holds:

- a prompt of one is nearly a prompt of the other (``dedup.overlaps``);
- they share a run of ``RUN`` words, in prompts or answers. 13 is the measure of GPT-3 (arXiv
  2005.14165, appendix C). Runs that stand in many different rows of one set, such as an instruction,
  are its boilerplate and ignored: in more than ``COMMON_ROWS`` and more than ``COMMON_SHARE`` of them;
- a prompt that is shorter than a run, and has at least ``LEAST`` words, stands whole in the other.
  Shorter ones are told by similarity alone.

Case, punctuation and spacing do not matter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.data.dedup import overlaps, sequence
from pipeline.data.rows import Row

RUN = 13
LEAST = 8
COMMON_ROWS = 3
COMMON_SHARE = 0.01


@dataclass(frozen=True)
class Text:
    """What a row says: its user turns, and what else of it counts."""

    id: str
    prompts: tuple[str, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def words(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(sequence(text)) for text in (*self.prompts, *self.others))

    @property
    def runs(self) -> set[str]:
        """All that it can share, in ``RUN`` words each."""
        return {
            " ".join(text[i : i + RUN]) for text in self.words for i in range(len(text) - RUN + 1)
        }

    @property
    def short_prompts(self) -> list[str]:
        prompts = self.words[: len(self.prompts)]
        return [" ".join(words) for words in prompts if LEAST <= len(words) < RUN]


def text_of(name: str, messages: Iterable[Mapping[str, str]], *answers: str | None) -> Text:
    """What a conversation says, with those answers to it that count."""
    turns: dict[bool, list[str]] = {True: [], False: []}
    for message in messages:
        turns[message["role"] == "user"].append(message["content"])
    said = [answer for answer in answers if answer is not None]
    return Text(name, tuple(turns[True]), (*turns[False], *said))


def texts_of(rows: Iterable[Row], *, answered: bool = True) -> list[Text]:
    """What rows say; without their answers where the base gives others."""
    return [
        text_of(row.id, row.messages, *((row.think, row.response) if answered else ()))
        for row in rows
    ]


@dataclass(frozen=True)
class Hit:
    """Row ``index`` is contaminated by row ``of`` of ``suite``: how similar their prompts are, or
    which words they share."""

    index: int
    suite: str
    of: str
    similarity: float | None = None
    shared: str | None = None


class Suites:
    """Evaluation sets to compare with. ``ignored``: how many runs of each are boilerplate."""

    def __init__(self, suites: Mapping[str, Sequence[Text]]) -> None:
        self.held = [(suite, text) for suite, texts in suites.items() for text in texts]
        self.common = {name: max(COMMON_ROWS, COMMON_SHARE * len(t)) for name, t in suites.items()}
        self.ignored: dict[str, int] = {}
        self.phrases = _Phrases()
        first = 0
        for suite, texts in suites.items():
            different = {text.words: text.runs for text in texts}
            counts = Counter(run for runs in different.values() for run in runs)
            common = {run for run, count in counts.items() if count > self.common[suite]}
            for at, text in enumerate(texts, start=first):
                for phrase in (*sorted(different[text.words] - common), *text.short_prompts):
                    self.phrases.add(phrase, at)
            self.ignored[suite] = len(common)
            first += len(texts)

    def find(self, rows: Sequence[Text], threshold: float) -> list[Hit]:
        """The contaminated ones of ``rows``, in order, each with the first reason that holds.

        ``threshold``: the word-set similarity from which two prompts count as one.
        """
        hits = self._near(rows, threshold)
        left = [index for index in range(len(rows)) if index not in hits]
        quoted = self._quoted({index: rows[index] for index in left})
        for index in left:
            found = next((f for text in rows[index].words for f in self.phrases.find(text)), None)
            found = found or quoted.get(index)
            if found is not None:
                suite, text = self.held[found[1]]
                hits[index] = Hit(index, suite, text.id, shared=found[0])
        return [hits[index] for index in sorted(hits)]

    def _near(self, rows: Sequence[Text], threshold: float) -> dict[int, Hit]:
        turns = [(index, turn) for index, row in enumerate(rows) for turn in row.prompts]
        held = [(at, turn) for at, (_, text) in enumerate(self.held) for turn in text.prompts]
        hits: dict[int, Hit] = {}
        for match in overlaps([t for _, t in turns], [t for _, t in held], threshold):
            index, (suite, text) = turns[match.index][0], self.held[held[match.of][0]]
            hits.setdefault(index, Hit(index, suite, text.id, similarity=match.similarity))
        return hits

    def _quoted(self, rows: Mapping[int, Text]) -> dict[int, tuple[str, int]]:
        """Short prompts of ``rows`` that stand in evaluation rows, and are no boilerplate there."""
        phrases = _Phrases()
        for index, row in rows.items():
            for prompt in row.short_prompts:
                phrases.add(prompt, index)
        places: defaultdict[tuple[int, str, str], set[int]] = defaultdict(set)
        for at, (suite, text) in enumerate(self.held):
            for words in text.words:
                for prompt, index in phrases.find(words):
                    places[index, suite, prompt].add(at)
        found: dict[int, tuple[str, int]] = {}
        for (index, suite, prompt), among in places.items():
            if len(among) <= self.common[suite]:
                found.setdefault(index, (prompt, min(among)))
        return found


class _Phrases:
    """Phrases of at least ``LEAST`` words by how they begin, each with whose it is."""

    def __init__(self) -> None:
        self.by_start: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)

    def add(self, phrase: str, whose: int) -> None:
        self.by_start[" ".join(phrase.split(" ", LEAST)[:LEAST])].append((phrase, whose))

    def find(self, words: Sequence[str]) -> Iterator[tuple[str, int]]:
        """The phrases that stand in ``words``, by where they begin."""
        for i in range(len(words) - LEAST + 1):
            for phrase, whose in self.by_start.get(" ".join(words[i : i + LEAST]), ()):
                if " ".join(words[i : i + phrase.count(" ") + 1]) == phrase:
                    yield phrase, whose
