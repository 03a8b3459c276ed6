"""What is read as the answer: numbers, letters and texts, from answers in words of our own."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from parts import sample_rows

from pipeline.evals.answers import boxed, letter_of, normalised, words_of
from pipeline.evals.numbers import judge_number, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is 18.", "18"),
        ("2 + 3 = 5 apples", "5"),
        ("It costs $1,234.50 in all.", "1234.5"),
        ("They have 1,000,000 seats", "1000000"),
        ("#### 1,080", "1080"),
        ("#### 72\n", "72"),
        ("so x = -4", "-4"),
        ("so x = \u22124", "-4"),
        ("-7", "-7"),
        ("a loss of -5kg", "-5"),
        ("from 3-4", "4"),
        ("(7)-2", "2"),
        ("she runs 5km", "5"),
        ("**42**", "42"),
        ("\\boxed{42}", "42"),
        ("\\boxed{025}. That took 3 steps.", "25"),
        ("The answer is 4. No: \\boxed{5}", "5"),
        ("#### 7 and not \\boxed{8}", "7"),
        ("0.50", "0.5"),
        ("100.00", "100"),
        ("The answer is 12. It took 3 steps.", "12"),
        ("Answer: 9 (out of 10)", "9"),
        ("answer is 3, no, the answer is 4 of 5", "4"),
        ("#### 5\nBy the way, 6 is even.", "5"),
        ("in lists 1,2,3", "3"),
        ("1,0000", "0"),
        ("the 1,000th", "1000"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no numbers", "twelve", "- , .", "#### none"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


def test_every_shipped_worked_answer_has_its_number() -> None:
    rows = sample_rows("arithmetic")
    assert len(rows) > 100
    for row in rows:
        stated = row["answer"].rpartition(" ")[2].strip(".$\n").replace(",", "")
        assert last_number(row["answer"]) == Decimal(stated).normalize()


@pytest.mark.parametrize(
    ("response", "truncated", "verdict"),
    [
        ("That makes 18.", False, "correct"),
        ("That makes 18.0 in all", False, "correct"),
        ("That makes 17.", False, "wrong"),
        ("I do not know.", False, "wrong"),
        ("", False, "wrong"),
        ("", True, "truncated"),
        ("First, 9 + 9 = 18 and then", True, "correct"),
        ("First, 9 + 9 = 18", True, "truncated"),  # it may have become 180
        ("First, 9 + 9 = 18.", True, "truncated"),  # or 18.5
        ("First, 9 + 8 = 17, so", True, "truncated"),
    ],
)
def test_judge_number(response: str, truncated: bool, verdict: str) -> None:
    assert judge_number(response, "9 + 9 = 18\n#### 18", truncated=truncated) == verdict


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("So \\boxed{42}.", "42"),
        ("\\boxed{1}, no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {x} and \\fbox{y}", "x"),
        ("\\boxed{done} and then \\boxed{cut", "done"),
        ("\\boxed{never closed", None),
        ("\\boxed{\\boxed{5}}", "5"),
        ("} \\boxed{\\{1, 2\\}} {", "\\{1, 2\\}"),
        ("{ \\boxed{3}", "3"),
        ("none", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("The answer is C", "C"),
        ("Therefore, the correct answer is: **(B)** 5 m/s.", "B"),
        ("**Answer:** D", "D"),
        ("Answer: option A, since it is the largest.", "A"),
        ("The answer is the option B.", "B"),
        ("The answer is:\n\n(D)", "D"),
        ("so \\boxed{C}", "C"),
        ("so $\\boxed{\\text{(C)}}$.", "C"),
        ("so \\boxed{\\textbf{B) } 4}", "B"),
        ("The answer is (A). Wait, no: the answer is (B).", "B"),
        ("\\boxed{5} metres. The answer is (D).", "D"),
        ("It must be this one.\nC", "C"),
        ("Thus\n**C**", "C"),
        ("C) 5 m/s", "C"),
        ("(B) because it fits", "B"),
        ("I choose option B.", "B"),
        ("(A) and (B) are wrong, so (C).", "C"),
        ("The answer is not A but D.", "D"),
        # none of these is an option
        ("The answer is (E).", None),
        ("The answer is Zebra.", None),
        ("The answer is a bit hard to tell", None),
        ("A cat sat on it", None),
        ("I don't know", None),
        ("The answer is A's", None),
        ("answer: c", None),
        ("", None),
        ("\\boxed{5}", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert letter_of(text, "ABCD") == letter


def test_a_letter_beyond_the_options_does_not_hide_one_among_them() -> None:
    assert letter_of("The answer is (F).\nSo, of these, (B)", "ABCD") == "B"
    assert letter_of("The answer is (F).\nSo, of these, (B)", "ABCDEF") == "F"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Let me see.\nThe answer is Yes.", "yes"),
        ("The answer is: **True**", "True"),
        ("**Answer:** valid. It follows from the first.", "valid"),
        ("So the answer is apple, bread, cheese.", "apple bread cheese"),
        ("the answer is ] ) }.", "] ) }"),
        ("The answer is \\boxed{\\text{no}}.", "No"),
        ("The answer is no. No, wait. The answer is yes.", "yes"),
        ("I counted.\n\nFalse", "False"),
        ('The answer is "left".', "left"),
        ("The answer is 05/01/2021.", "05/01/2021"),
    ],
)
def test_words(text: str, wanted: str) -> None:
    found = words_of(text)
    assert found is not None and normalised(found) == normalised(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is not valid.", "valid"),
        ("The answer is yes and no.", "yes"),
        ("Yes\nNo", "yes"),
    ],
)
def test_other_words_are_another_answer(text: str, wanted: str) -> None:
    found = words_of(text)
    assert found is not None and normalised(found) != normalised(wanted)


def test_nothing_said_is_no_answer() -> None:
    assert words_of(" \n") is None


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "answer is " * 20_000,
        "{" * 200_000,
        "A " * 100_000,
        "1" * 100_000 + "x",
        "\\text{" * 30_000,
        "answer" + " " * 200_000,
    ],
)
def test_long_nonsense_is_read_at_once(text: str) -> None:
    """Time grows with the length and not with its square: these would take hours otherwise."""
    started = time.process_time()
    boxed(text), letter_of(text, "ABCD"), words_of(text), last_number(text)
    assert time.process_time() - started < 10
