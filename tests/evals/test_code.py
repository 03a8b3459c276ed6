"""Code in answers, and the programs made of it; published solutions pass in the sandbox."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from escapes import needs_a_sandbox

from pipeline.data.rows import read_rows
from pipeline.data.tasks import Task
from pipeline.evals.code import extract, program, run_answers
from pipeline.evals.trial import find_sandbox
from pipeline.recipes import Suite

DATA = Path(os.environ.get("UNTAXED_DATA", "."))
STUB = 'import math\n\ndef half(n):\n    return n / 2\n\ndef twice(n):\n    """Double it."""\n'
TASK = Task("assert twice(3) == 6", "twice", STUB)
WHOLE = "def twice(n):\n    return n * 2"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (f"Here it is:\n```python\n{WHOLE}\n```\nIt doubles.", f"{WHOLE}\n"),
        (f"```\n{WHOLE}\n```", f"{WHOLE}\n"),
        (f"First:\n```python\nx = 1\n```\nthen\n```python\n{WHOLE}\n```", f"{WHOLE}\n"),
        (f"```python\n{WHOLE}\n```\nUse it:\n```python\nprint(twice(2))\n```", f"{WHOLE}\n"),
        (f"```python\n{WHOLE}\n", f"{WHOLE}\n"),  # cut off before the block was closed
        (f"Sure.\n{WHOLE}", WHOLE),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("It cannot be done, import taxes are too high.", None),
        ("", None),
    ],
)
def test_code_is_found_in_answers(answer: str, code: str | None) -> None:
    assert extract(answer, "twice") == code


def test_a_whole_function_replaces_the_stub_and_keeps_its_helpers() -> None:
    made = program(TASK, f"```python\n{WHOLE}\n```")
    assert made is not None
    assert made.count("def twice") == 1 and "def half" in made and made.startswith("import math")
    assert made.rstrip().endswith("assert twice(3) == 6")
    exec(made, {})


@pytest.mark.parametrize("answer", ["    return n * 2", "```python\n    return n * 2\n```"])
def test_a_body_goes_on_where_the_stub_ends(answer: str) -> None:
    made = program(TASK, answer)
    assert made is not None
    exec(made, {})


def test_prose_is_no_program() -> None:
    assert program(TASK, "I would multiply by two.") is None


def outcomes(answers: list[tuple[Task, str]]) -> list[str | None]:
    return [ended and ended.status for ended in run_answers(find_sandbox(), answers)]


@needs_a_sandbox
def test_answers_are_run_and_prose_is_not() -> None:
    right, wrong = f"```python\n{WHOLE}\n```", f"```python\n{WHOLE} + 1\n```"
    answers = [(TASK, right), (TASK, wrong), (TASK, "No."), (TASK, "```python\nimport os\n```")]
    assert outcomes(answers) == ["passed", "failed", None, "failed"]


def rows_of(file: str, name: str) -> list[tuple[Task, str]]:
    """The tasks of a published file, each with its own solution as an answer."""
    suite = Suite(name=name, measures="reasoning", source=file, format=name)
    rows = read_rows(DATA / file, suite)
    tasks = [row.reference for row in rows if isinstance(row.reference, Task)]
    assert len(tasks) == len(rows) and all(row.response for row in rows)
    return [(task, row.response or "") for task, row in zip(tasks, rows, strict=True)]


@needs_a_sandbox
@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="no HumanEval below UNTAXED_DATA")
def test_published_solutions_of_humaneval_pass() -> None:
    whole = rows_of("humaneval/HumanEval.jsonl.gz", "humaneval")
    assert outcomes(whole) == ["passed"] * 164
    nothing = [(task, f"```python\n{task.stub}    return None\n```") for task, _ in whole[:20]]
    assert "passed" not in outcomes(nothing)
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt") as stream:
        bodies = [str(json.loads(line)["canonical_solution"]) for line in stream][:20]
    goes_on = [(task, body) for (task, _), body in zip(whole, bodies, strict=False)]
    assert outcomes(goes_on) == ["passed"] * 20


@needs_a_sandbox
@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mbpp").is_dir(), reason="no MBPP below UNTAXED_DATA")
def test_published_solutions_of_mbpp_pass() -> None:
    answers = rows_of("mbpp/sanitized-mbpp.json", "mbpp")[::4]
    assert outcomes(answers) == ["passed"] * len(answers)
