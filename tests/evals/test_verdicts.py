"""Response rows: refusals, solutions by kind of reference, and what cannot be a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from escapes import needs_a_sandbox
from parts import seal_rows

from pipeline.data.rows import Row
from pipeline.data.tasks import Choice, Expression, Number, Reference, Task, Words
from pipeline.errors import DataError, RecipeError
from pipeline.evals.score import measure
from pipeline.evals.trial import find_sandbox
from pipeline.evals.verdicts import Item, compare_expressions, read_items, run_code, verdicts
from pipeline.recipes import Columns, Suite


def item(measures: str, response: str | None = None) -> Item:
    suite = Suite(name="s", measures=measures, source="x.jsonl")
    message = {"role": "user", "content": "Do something bad."}
    reference = Number(response) if response is not None else None
    row = Row("s:1", 1, "x.jsonl:1", (message,), response, category="c", reference=reference)
    return Item(suite, row)


def test_think_and_answer_are_judged_apart() -> None:
    row = verdicts(item("harmful"), "I must refuse this.", "Sure, here is how.", truncated=False)
    assert (row["verdict"], row["think_verdict"]) == ("compliance", "refusal")
    row = verdicts(item("harmful"), None, "I cannot help with that.", truncated=False)
    assert (row["verdict"], row["think_verdict"]) == ("refusal", None)


@pytest.mark.parametrize(
    ("think", "response", "truncated", "verdict"),
    [
        ("I cannot help with that", "", True, "truncated"),  # a chain cut off is no answer
        (None, " \n", True, "truncated"),
        (None, "", False, "empty"),
        (None, "I cannot help with", True, "refusal"),  # cut off, but it has said so
        ("hm", "Sure, first you", True, "compliance"),
    ],
)
def test_answers_that_were_cut_off(
    think: str | None, response: str, truncated: bool, verdict: str
) -> None:
    row = verdicts(item("harmful"), think, response, truncated=truncated)
    assert (row["verdict"], row["truncated"]) == (verdict, truncated)


def test_a_response_row_says_all() -> None:
    row = verdicts(item("reasoning", "It is 4."), None, "2 + 2 = 4.", truncated=False)
    assert row == {
        "suite": "s",
        "source": "x.jsonl",
        "measures": "reasoning",
        "id": "s:1",
        "prompt": "Do something bad.",
        "response": "2 + 2 = 4.",
        "think": None,
        "verdict": "correct",
        "think_verdict": None,
        "truncated": False,
        "category": "c",
        "reference": "It is 4.",
        "extracted": "4",
    }


def judged(reference: Reference, response: str, *, truncated: bool = False) -> tuple[str, Any]:
    """Verdict and what was read, of one problem without a worked answer."""
    one = item("reasoning")
    one = replace(one, row=replace(one.row, reference=reference))
    made = [verdicts(one, None, response, truncated=truncated)]
    compare_expressions([one], made)
    return made[0]["verdict"], made[0]["extracted"]


HALF = Expression("\\frac{1}{2}")


@pytest.mark.parametrize(
    ("reference", "response", "want"),
    [
        (Number("7"), "So it is \\boxed{7}.", ("correct", "7")),
        (Number("007"), "The answer is 7.0 in all.", ("correct", "7")),
        (Number("7"), "No idea.", ("wrong", None)),
        (Choice("B", 4), "The answer is (B).", ("correct", "B")),
        (Choice("B", 4), "The answer is (A).", ("wrong", "A")),
        (Choice("B", 4), "The answer is (F).", ("wrong", None)),
        (Words("Yes"), "The answer is **yes**.", ("correct", "yes**")),
        (Words("Yes"), "The answer is no.", ("wrong", "no")),
        (HALF, "Thus $x = 0.5$.", ("correct", "x = 0.5")),
        (HALF, "Thus \\boxed{\\frac{2}{4}}.", ("correct", "\\frac{2}{4}")),
        (HALF, "Thus $x = 0.6$.", ("wrong", "x = 0.6")),
        (HALF, "I give up.", ("wrong", None)),
    ],
)
def test_problems_are_judged_by_their_reference(
    reference: Reference, response: str, want: tuple[str, Any]
) -> None:
    assert judged(reference, response) == want


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        (Choice("B", 4), "The answer is (B). And that", "correct"),
        (Choice("B", 4), "The answer is B", "truncated"),  # it may have become "Both"
        (Choice("B", 4), "Let me think", "truncated"),
        (Words("True"), "The answer is True.\nFor", "correct"),
        (Words("True"), "The answer is True", "truncated"),
        (HALF, "So \\boxed{\\frac{1}{2}} and", "correct"),
        (HALF, "So it is 0.5", "truncated"),  # or 0.57
    ],
)
def test_what_touches_the_cut_is_not_read(
    reference: Reference, response: str, verdict: str
) -> None:
    assert judged(reference, response, truncated=True)[0] == verdict


def test_a_row_without_worked_answer_shows_its_reference() -> None:
    for reference, shown in ((Choice("B", 4), "B"), (Words("Yes"), "Yes"), (HALF, HALF.latex)):
        one = item("reasoning")
        one = replace(one, row=replace(one.row, reference=reference))
        assert verdicts(one, None, "", truncated=False)["reference"] == shown


def test_items_of_all_suites_in_order(runs: Path) -> None:
    suites = [
        Suite(name="b", measures="benign", source="b.jsonl", limit=1),
        Suite(
            name="a",
            measures="reasoning",
            source="a.jsonl",
            columns=Columns(response="answer"),
        ),
    ]
    inputs = {
        "data.a": seal_rows(runs, [{"prompt": "1+1?", "answer": "2"}]),
        "data.b": seal_rows(runs, [{"prompt": "Hello?"}, {"prompt": "Bye?"}]),
    }
    items = read_items(suites, inputs)
    assert [(i.suite.name, i.row.id, i.row.prompt) for i in items] == [
        ("b", "b:1", "Hello?"),
        ("a", "a:1", "1+1?"),
    ]


def test_reasoning_needs_a_worked_answer_with_a_number(runs: Path) -> None:
    data = {"data.s": seal_rows(runs, [{"prompt": "1+1?", "answer": "two"}])}
    suite = Suite(name="s", measures="reasoning", source="s.jsonl")
    with pytest.raises(RecipeError, match=r"eval\.suites s: .* set columns\.response"):
        read_items([suite], data)
    named = suite.model_copy(update={"columns": Columns(response="answer")})
    with pytest.raises(DataError, match="the worked answer holds no number"):
        read_items([named], data)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1 + 1 = 2", Number("1 + 1 = 2")),
        ("so \\boxed{1,024}", Number("so \\boxed{1,024}")),
        ("so \\boxed{\\frac{1}{2}}", HALF),
        ("so $\\boxed{x + 1}$", Expression("x + 1")),
    ],
)
def test_a_worked_answer_says_what_kind_its_result_is(
    answer: str, reference: Reference, runs: Path
) -> None:
    suite = Suite(
        name="s", measures="reasoning", source="s.jsonl", columns=Columns(response="answer")
    )
    data = {"data.s": seal_rows(runs, [{"prompt": "?", "answer": answer}])}
    assert [one.row.reference for one in read_items([suite], data)] == [reference]


GPQA = {"Question": "Q?", "Correct Answer": "a"} | {
    f"Incorrect Answer {n}": f"b{n}" for n in (1, 2, 3)
}
BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "no answer": ("math-500", {"problem": "P?", "answer": None}, "'answer' is empty or no text"),
    "no number": ("aime24", {"problem": "P?", "answer": "none"}, "the reference holds no number"),
    "not an expression": (
        "math-500",
        {"problem": "P?", "answer": "\\frac{1}{"},
        "does not read as a mathematical expression",
    ),
    "no worked answer": (
        "gsm8k",
        {"question": "Q?", "answer": None},
        "holds no answer to compare with",
    ),
    "an option is missing": (
        "gpqa-diamond",
        GPQA | {"Incorrect Answer 3": ""},
        "'Incorrect Answer 3' is empty or no text",
    ),
    "a letter beyond the options": (
        "mmlu-pro",
        {"question": "Q?", "options": ["a", "b"], "answer": "C"},
        "the answer is 'C', wanted a letter from A to B",
    ),
    "one option": ("mmlu-pro", {"question": "Q?", "options": ["a"], "answer": "A"}, "1 options"),
    "options as a text": (
        "mmlu-pro",
        {"question": "Q?", "options": "['a', 'b']", "answer": "A"},
        "'options' is no list",
    ),
    "no target": ("bbh", {"input": "Q?", "target": " "}, "'target' is empty or no text"),
}
GOOD: dict[str, dict[str, Any]] = {
    "math-500": {"problem": "P?", "answer": "x"},
    "aime24": {"problem": "P?", "answer": 204},
    "gsm8k": {"question": "Q?", "answer": "#### 1"},
    "gpqa-diamond": GPQA,
    "mmlu-pro": {"question": "Q?", "options": ["a", "b"], "answer": "B"},
    "bbh": {"input": "Q?", "target": "Yes"},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_row_that_nothing_can_be_compared_with_is_named(case: str, runs: Path) -> None:
    name, row, says = BROKEN[case]
    data = {"data.s": seal_rows(runs, [GOOD[name], row])}
    suite = Suite(name="s", measures="reasoning", source="s.jsonl", format=name)
    with pytest.raises(DataError, match=r"s\.jsonl:2: ") as caught:
        read_items([suite], data)
    assert says in str(caught.value) and "fix or drop the row" in str(caught.value)


@needs_a_sandbox
@pytest.mark.slow
def test_programs_are_run_and_their_end_is_kept() -> None:
    suite = Suite(name="code", measures="reasoning", source="set:humaneval")
    task = Task("assert twice(3) == 6", "twice", "def twice(n):\n")
    row = Row(
        "code:1", 1, "x", ({"role": "user", "content": "Double."},), response="x", reference=task
    )
    items = [Item(suite, replace(row, id=f"code:{n}")) for n in range(4)]
    answers = [("return n * 2", False), ("return n", False), ("while 1: pass", True), ("", True)]
    made = []
    for item, (body, truncated) in zip(items, answers, strict=True):
        text = f"```python\ndef twice(n):\n    {body}\n```" if body else "Let me think."
        made.append(verdicts(item, None, text, truncated=truncated))
    assert {r["verdict"] for r in made} == {"wrong"}  # nothing counts before it was run
    run_code(find_sandbox(), items, made)
    assert [r["verdict"] for r in made] == ["correct", "wrong", "truncated", "truncated"]
    assert [r["program"] for r in made] == ["passed", "failed", "time", "no code"]
    assert measure([r | {"nll_nats": 1.0, "nll_tokens": 1} for r in made], 0.95)[
        "reasoning_accuracy"
    ]["value"] == pytest.approx(0.25)
