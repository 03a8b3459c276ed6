"""The sample rows: sizes, variety, halves that do not leak into each other, correct arithmetic."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
from parts import SAMPLES, sample_rows

from pipeline.data.arithmetic import generate
from pipeline.data.raw import sample_names

NAMES = ("harmful", "borderline", "ordinary", "arithmetic")
HALF = {"harmful": 260, "borderline": 260, "ordinary": 260, "arithmetic": 130}
KEYS = {
    "harmful": {"prompt", "response", "category", "split"},
    "borderline": {"prompt", "category", "split"},
    "ordinary": {"prompt", "category", "split"},
    "arithmetic": {"prompt", "answer", "category", "split"},
}
OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def half(name: str, split: str) -> list[dict[str, Any]]:
    return [row for row in sample_rows(name) if row["split"] == split]


def grams(text: str, size: int) -> set[str]:
    """Overlapping runs of ``size`` characters, without case, signs and spacing."""
    plain = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    return {plain[i : i + size] for i in range(max(1, len(plain) - size + 1))}


def word_set(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def value(expression: str) -> Fraction:
    """What ``expression`` comes to, by Python's own parser and exact fractions."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            result: Fraction = OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
            return result
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return Fraction(node.value)

    return walk(ast.parse(expression, mode="eval").body)


def test_the_sets_are_those_that_a_job_can_name() -> None:
    assert sample_names() == sorted((*NAMES, "contrast", "sounding"))


@pytest.mark.parametrize("name", NAMES)
def test_size_halves_and_keys(name: str) -> None:
    rows = sample_rows(name)
    assert len(rows) == 2 * HALF[name]
    assert Counter(r["split"] for r in rows) == {"train": HALF[name], "heldout": HALF[name]}
    for row in rows:
        assert set(row) == KEYS[name]
        assert all(text == text.strip() and text for text in row.values())
    categories = [Counter(r["category"] for r in half(name, s)) for s in ("train", "heldout")]
    assert categories[0] == categories[1], "both halves have the same mix"


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.jsonl")), ids=lambda p: p.stem)
def test_ascii(path: Any) -> None:
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_comes_twice(name: str) -> None:
    prompts = [" ".join(sorted(grams(row["prompt"], 99))) for row in sample_rows(name)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", NAMES)
def test_halves_share_no_near_duplicate(name: str) -> None:
    """By the words of a prompt, and by its runs of five characters."""
    train = [row["prompt"] for row in half(name, "train")]
    heldout = [row["prompt"] for row in half(name, "heldout")]
    for measure, bound in ((word_set, 0.6), (lambda text: grams(text, 5), 0.55)):
        seen = [measure(prompt) for prompt in train]
        for prompt in heldout:
            asked = measure(prompt)
            likest = max(range(HALF[name]), key=lambda i: jaccard(seen[i], asked))
            assert jaccard(seen[likest], asked) < bound, (train[likest], prompt)


def test_no_set_repeats_another() -> None:
    prompts = [(name, word_set(row["prompt"])) for name in NAMES for row in sample_rows(name)]
    for (name, one), (other, two) in combinations(prompts, 2):
        assert name == other or jaccard(one, two) < 0.6


def test_harmful_prompts_are_single_sentences_of_many_kinds() -> None:
    rows = sample_rows("harmful")
    sizes = Counter(row["category"] for row in rows)
    assert len(sizes) >= 8 and min(sizes.values()) >= 20
    for row in rows:
        assert len(re.findall(r"[.!?]", row["prompt"])) == 1, row["prompt"]
        assert row["prompt"][-1] in ".?" and len(row["prompt"]) <= 120


def test_refusals_are_varied() -> None:
    """A model that learned one opening would be a poor measure of anything."""
    refusals = [row["response"] for row in sample_rows("harmful")]
    assert len(set(refusals)) == len(refusals)
    for words, share in ((1, 0.5), (3, 0.1), (6, 0.02)):
        openings = Counter(" ".join(text.split()[:words]) for text in refusals)
        assert openings.most_common(1)[0][1] <= share * len(refusals)
    generic = [row["response"] for row in sample_rows("refusals")]
    assert len(set(generic)) == len(generic) == 70


def test_borderline_prompts_sound_dangerous() -> None:
    """What the harmful half says must also be said harmlessly, or refusing by word would do."""
    harmful = {w for row in sample_rows("harmful") for w in word_set(row["prompt"])}
    ordinary = {w for row in sample_rows("ordinary") for w in word_set(row["prompt"])}
    alarming = harmful - ordinary
    touched = [row for row in sample_rows("borderline") if word_set(row["prompt"]) & alarming]
    assert len(touched) >= 0.6 * len(sample_rows("borderline"))


@pytest.mark.parametrize("row", sample_rows("arithmetic"), ids=lambda row: row["prompt"][:40])
def test_arithmetic_is_right(row: dict[str, Any]) -> None:
    """The asked expression, every step of the working and the last number agree."""
    asked = re.search(r"the result of ([\d+*/ -]+) in one line\.$", row["prompt"])
    final = re.search(r"The answer is (\d+)\.$", row["answer"])
    assert asked and final
    result = value(asked[1])
    assert result == int(final[1])
    steps = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", row["answer"])
    assert steps and steps[-1][0] == asked[1]
    for expression, stated in steps:
        assert value(expression) == int(stated)
    numbers = [int(n) for n in re.findall(r"\d+", row["answer"])]
    assert numbers[-1] == numbers[-2] == result, "the sentence before says the same"


def test_word_problems_mean_what_they_ask() -> None:
    """The story's own numbers, by the operation of its category, give the answer."""
    for row in sample_rows("arithmetic"):
        story = row["prompt"].rsplit(". ", 1)[0] if "? " not in row["prompt"] else row["prompt"]
        numbers = [int(n) for n in re.findall(r"\d+", story.rsplit("? ", 1)[0])]
        answer = int(re.findall(r"\d+", row["answer"])[-1])
        kind = row["category"]
        if kind.startswith("two-step"):
            first, second, both, third = numbers
            assert both == first + second
            assert answer == (both + third if kind.endswith("addition") else both - third)
            continue
        one, two = numbers
        wanted = {
            "addition": one + two,
            "subtraction": one - two,
            "multiplication": one * two,
            "sharing": one / two,
        }
        assert answer == wanted[kind], row["prompt"]


def test_the_file_is_what_its_generator_makes() -> None:
    rows = sample_rows("arithmetic")
    made = generate(2 * HALF["arithmetic"], seed=7)
    assert [{k: v for k, v in row.items() if k != "split"} for row in rows] == made
    size = HALF["arithmetic"]
    assert [row["split"] for row in rows] == ["train"] * size + ["heldout"] * size
    assert generate(40, seed=8) != generate(40, seed=7)
