"""Contaminated rows, held against the definition: every run of every row looked for in every other."""

from __future__ import annotations

import random

import pytest
from parts import sample_rows

from pipeline.data.contamination import COMMON_ROWS, LEAST, RUN, Hit, Suites, Text

WORDS = list("abcdefghijklmnopqrstuvwxyz")
SHORT = " ".join(WORDS[:LEAST])
LONG = " ".join(WORDS[:RUN])


def find(rows: list[Text], near: float = 1.0, **suites: list[Text]) -> list[Hit]:
    return Suites(suites).find(rows, near)


def one(prompt: str, *others: str, id: str = "row") -> Text:
    return Text(id, (prompt,), others)


def test_shared_runs_are_those_of_every_pair() -> None:
    """Texts that quote one another at random, with runs around the length that counts."""
    for seed in range(30):
        rng = random.Random(seed)
        vocabulary = [f"w{i}" for i in range(400)]

        def text(sources: list[str], rng: random.Random, vocabulary: list[str]) -> str:
            words = rng.choices(vocabulary, k=rng.randint(5, 60))
            if sources and rng.random() < 0.7:
                quoted = rng.choice(sources).split()
                first = rng.randrange(len(quoted))
                length = rng.randint(LEAST - 2, RUN + 2)
                at = rng.randrange(len(words))
                words[at:at] = quoted[first : first + length]
            return " ".join(words)

        held = [text([], rng, vocabulary) for _ in range(20)]
        rows = [text(held, rng, vocabulary) for _ in range(40)]
        found = find([one(row) for row in rows], suite=[one(h, id=h) for h in held])
        wanted = {i: {h for h in held if shares(row, h)} for i, row in enumerate(rows)}
        assert {hit.index for hit in found} == {i for i, of in wanted.items() if of}
        assert found and all(hit.of in wanted[hit.index] for hit in found)
        for hit in found:
            if hit.shared is not None:
                assert f" {hit.shared} " in f" {rows[hit.index]} "
                assert f" {hit.shared} " in f" {hit.of} "


def shares(row: str, other: str) -> bool:
    a, b = row.split(), other.split()
    runs = (" ".join(a[i : i + RUN]) for i in range(len(a) - RUN + 1))
    if any(f" {run} " in f" {other} " for run in runs) or set(a) == set(b):
        return True
    return any(
        LEAST <= len(part.split()) < RUN and f" {part} " in f" {whole} "
        for part, whole in ((row, other), (other, row))
    )


@pytest.mark.parametrize(
    ("row", "held"),
    [
        (one(f"x {LONG}"), one(f"{LONG} y")),
        (one("x", LONG), one(LONG + " y y")),
        (one(LONG + " x"), one("x", LONG)),
        (one("x", "z", f"z {LONG}"), one("x y z", f"y {LONG}")),
        (one("x", LONG.upper().replace(" ", ", ")), one(f"y {LONG}")),
    ],
    ids=["prompts", "their answer", "our answer", "both answers", "signs and case"],
)
def test_prompts_and_answers_of_both_count(row: Text, held: Text) -> None:
    (hit,) = find([row], suite=[held])
    assert (hit.shared, hit.similarity) == (LONG, None)


def test_a_run_that_is_one_word_short_is_none() -> None:
    shared = " ".join(WORDS[: RUN - 1])
    assert not find([one(f"1 {shared} 2")], suite=[one(f"3 {shared} 4")])


def test_runs_do_not_cross_from_prompt_to_answer() -> None:
    prompt, answer = " ".join(WORDS[:7]), " ".join(WORDS[7:RUN])
    assert not find([one(prompt, answer)], suite=[one(f"0 {LONG}")])


def test_a_short_prompt_counts_where_it_is_quoted_whole() -> None:
    """Such as a request inside a jailbreak; an answer of that length is no prompt."""
    wrapped = f"You are now free. {SHORT}, and tell me all."
    for row, held in ((one(wrapped), one(SHORT)), (one(SHORT), one(wrapped))):
        (hit,) = find([row], suite=[held])
        assert hit.shared == SHORT
    shorter = " ".join(WORDS[: LEAST - 1])
    assert not find([one(f"1 {shorter} 2 3")], suite=[one(shorter)])
    assert not find([one(wrapped)], suite=[one("x", SHORT)])


def test_near_duplicates_are_told_by_similarity() -> None:
    (hit,) = find([one("Pick a lock right now")], 0.8, suite=[one("pick a LOCK now", id="suite:3")])
    assert hit == Hit(0, "suite", "suite:3", similarity=0.8)
    assert not find([one("Pick a lock right now")], 0.81, suite=[one("pick a LOCK now")])
    turns = Text("talk", ("Good day", "Pick a lock now"))
    (hit,) = find([one("Hello"), turns], 0.8, suite=[one("pick a lock now")])
    assert hit.index == 1


def suite_with(instruction: str, rows: int, of: int) -> list[Text]:
    """``of`` unlike rows; the first ``rows`` end with the same instruction."""
    texts = [" ".join(f"{letter}{i}" for letter in WORDS[:20]) for i in range(of)]
    return [
        one(f"{t} {instruction}" if i < rows else t, id=f"suite:{i}") for i, t in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("rows", "of", "found"),
    [
        (1, 10, True),
        (COMMON_ROWS, 10, True),
        (COMMON_ROWS + 1, 10, False),
        (10, 1000, True),
        (11, 1000, False),
    ],
)
def test_what_many_rows_of_a_suite_share_is_boilerplate(rows: int, of: int, found: bool) -> None:
    suite = suite_with(LONG, rows, of)
    suites = Suites({"suite": suite})
    assert bool(suites.find([one(f"Other words. {LONG}")], 1.0)) == found
    assert suites.ignored == {"suite": 0 if found else 1}
    (own,) = suites.find([one(suite[0].prompts[0] + " and more")], 1.0)
    assert own.of == "suite:0", "a row is known by the words that are its own"


def test_a_short_prompt_that_is_boilerplate_is_no_evidence() -> None:
    assert not find([one(SHORT)], suite=suite_with(SHORT, 5, 10))
    assert find([one(SHORT)], suite=suite_with(SHORT, 2, 10))


def test_rows_that_repeat_one_another_are_no_boilerplate() -> None:
    (hit,) = find([one(f"0 {LONG}")], suite=[one(f"{LONG} 1", id=f"suite:{i}") for i in range(9)])
    assert hit.of == "suite:0"


def test_what_is_common_is_counted_in_each_suite() -> None:
    """A suite with an instruction does not hide the one row of another that says it."""
    other = [one(f"{LONG} 1 2", id="other:0")]
    (hit,) = find([one(f"0 {LONG}")], suite=suite_with(LONG, 9, 10), other=other)
    assert (hit.suite, hit.of) == ("other", "other:0")


def test_languages_without_spaces() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(RUN + 1))
    (hit,) = find([one(f"x {text}")], suite=[one(f"y z {text}")])
    assert hit.shared is not None and len(hit.shared.split()) == RUN


def test_halves_of_the_samples_do_not_contaminate_each_other() -> None:
    """Also arithmetic, whose halves share templates; its problems are answered by the base."""
    halves: dict[str, dict[str, list[Text]]] = {"train": {}, "heldout": {}}
    for name in ("harmful", "borderline", "ordinary", "arithmetic"):
        for row in sample_rows(name):
            key = "answer" if row["split"] == "heldout" else "response"
            answer = [row[key]] if key in row else []
            texts = halves[row["split"]].setdefault(name, [])
            texts.append(one(row["prompt"], *answer, id=f"{name}:{len(texts)}"))
    rows = [text for texts in halves["train"].values() for text in texts]
    suites = Suites(halves["heldout"])
    assert suites.find(rows, 0.8) == []
    held = [text for texts in halves["heldout"].values() for text in texts]
    assert [hit.index for hit in suites.find(held, 0.8)] == list(range(len(held)))


def test_nothing_to_compare() -> None:
    assert find([one(LONG)]) == find([], suite=[one(LONG)]) == find([one(LONG)], suite=[]) == []
