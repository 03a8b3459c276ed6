"""One response row for each answer: whether it declined, or whether it solved the problem.

How a solution is read and compared follows from the type of its reference (``data/tasks.py``). Programs
and mathematical expressions are judged together, in processes of their own, when all answers are there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.artifact import Artifact
from pipeline.data.rows import Row, read_rows
from pipeline.data.tasks import Choice, Expression, Number, Reference, Task
from pipeline.errors import DataError, RecipeError
from pipeline.evals.answers import boxed, letter_of, normalised, words_of
from pipeline.evals.code import run_answers
from pipeline.evals.expressions import Expressions
from pipeline.evals.judge import judge_refusal
from pipeline.evals.numbers import judge_number, last_number
from pipeline.evals.sandbox import Sandbox
from pipeline.recipes import Suite


@dataclass(frozen=True)
class Item:
    """One row of one suite. A reasoning row has a reference."""

    suite: Suite
    row: Row


def read_items(
    suites: Sequence[Suite], inputs: Mapping[str, Artifact], where: str = "eval.suites"
) -> list[Item]:
    """All rows of all suites. DataError or RecipeError where a reasoning row has no reference, or one
    that nothing can be compared with."""
    items = [
        Item(suite, _with_reference(row, suite, where) if suite.measures == "reasoning" else row)
        for suite in suites
        for row in read_rows(inputs[f"data.{suite.name}"], suite)
    ]
    _check_expressions(items)
    return items


def _with_reference(row: Row, suite: Suite, where: str) -> Row:
    """``row`` with a reference; from its worked answer where the data states none: what the last
    ``\\boxed{}`` holds, unless that is a number, else the number that it ends on."""
    reference = row.reference
    if reference is None:
        if row.response is None:
            if suite.public is not None:
                raise DataError(
                    f"{row.place}: holds no answer to compare with; fix or drop the row"
                )
            raise RecipeError(
                f"{where} {suite.name}: measures reasoning and names no worked answer;"
                " set columns.response"
            )
        reference = Number(row.response)
        inside = boxed(row.response)
        if inside is not None and inside.strip() and not re.fullmatch(r"[-$\d.,\s]+", inside):
            reference = Expression(inside)
    if isinstance(reference, Number) and last_number(reference.text) is None:
        what = "worked answer" if row.reference is None else "reference"
        raise DataError(
            f"{row.place}: the {what} holds no number; wanted one to compare with; fix or drop the row"
        )
    return replace(row, reference=reference)


def _check_expressions(items: Sequence[Item]) -> None:
    found = [(item.row, item.row.reference) for item in items]
    wanted = [(row, one) for row, one in found if isinstance(one, Expression)]
    if not wanted:
        return
    with Expressions() as expressions:
        for row, reference in wanted:
            if not expressions.reads(reference.latex):
                raise DataError(
                    f"{row.place}: the reference {reference.latex[:80]!r} does not read as a"
                    " mathematical expression; wanted LaTeX; fix or drop the row"
                )


def verdicts(item: Item, think: str | None, response: str, *, truncated: bool) -> dict[str, Any]:
    """One response row. Think and answer are judged apart; an answer that was cut off before it
    said anything is ``truncated``, whatever was thought. ``extracted`` is what was read as the answer
    to a problem: None where nothing was, which is wrong."""
    suite, row = item.suite, item.row
    made = {
        "suite": suite.name,
        "source": suite.source,
        "measures": suite.measures,
        "id": row.id,
        "prompt": row.prompt,
        "response": response,
        "think": think,
        "verdict": "",
        "think_verdict": judge_refusal(row.prompt, think) if think is not None else None,
        "truncated": truncated,
        "category": row.category,
        "reference": None,
    }
    if row.reference is not None:
        return made | _solved(row.reference, response, truncated) | {"reference": _shown(row)}
    if truncated and not response.strip():
        return made | {"verdict": "truncated"}
    return made | {"verdict": judge_refusal(row.prompt, response)}


def _solved(reference: Reference, response: str, truncated: bool) -> dict[str, Any]:
    """Verdict and what was read. A word or number that touches the cut may lack its end and is not
    read; programs and expressions are wrong until they are run and compared."""
    extracted: str | None
    if isinstance(reference, Task):
        return {"verdict": "wrong"}
    if isinstance(reference, Expression):
        return {"verdict": "wrong", "extracted": None}
    if isinstance(reference, Number):
        verdict = judge_number(response, reference.text, truncated=truncated)
        number = last_number(_read_part(response, truncated))
        return {"verdict": verdict, "extracted": None if number is None else f"{number:f}"[:100]}
    text = _read_part(response, truncated)
    if isinstance(reference, Choice):
        extracted = letter_of(text, reference.letters)
        right = extracted == reference.letter
    else:
        extracted = words_of(text)
        right = extracted is not None and normalised(extracted) == normalised(reference.text)
    return {"verdict": _verdict(right, truncated), "extracted": extracted}


def _read_part(response: str, truncated: bool) -> str:
    if not truncated:
        return response
    text = response.rstrip()
    end = len(text)
    while end and (text[end - 1].isalnum() or text[end - 1] in "_.,"):
        end -= 1
    return text[:end]


def _verdict(right: bool, truncated: bool) -> str:
    return "correct" if right else "truncated" if truncated else "wrong"


def _shown(row: Row) -> str | None:
    """The reference as the report shows it: the worked answer where there is one."""
    reference = row.reference
    if row.response is not None or reference is None or isinstance(reference, Task):
        return row.response
    if isinstance(reference, Choice):
        return reference.letter
    return reference.latex if isinstance(reference, Expression) else reference.text


def run_code(sandbox: Sandbox, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> None:
    """The verdicts of programming tasks, and how each program ended."""
    found = [(row, item.row.reference) for row, item in zip(rows, items, strict=True)]
    coded = [(row, task) for row, task in found if isinstance(task, Task)]
    answers = [(task, str(row["response"])) for row, task in coded]
    for (row, _), ended in zip(coded, run_answers(sandbox, answers), strict=True):
        right = ended is not None and ended.status == "passed"
        row["verdict"] = _verdict(right, row["truncated"])
        row["program"] = ended.status if ended else "no code"


def compare_expressions(items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> None:
    """The verdicts of problems whose answer is a mathematical expression, and what was read."""
    found = [(row, item.row.reference) for row, item in zip(rows, items, strict=True)]
    wanted = [(row, one) for row, one in found if isinstance(one, Expression)]
    if not wanted:
        return
    with Expressions() as expressions:
        for row, reference in wanted:
            text = _read_part(str(row["response"]), row["truncated"])
            compared = expressions.compare(reference.latex, text)
            row["verdict"] = _verdict(compared.right, row["truncated"])
            row["extracted"] = compared.read
