"""Public sets to measure on: rows of the columns in which each is published, in words of our own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import raw
from pipeline.data.public_evaluation import BBH_TASKS, EVALUATION
from pipeline.data.rows import Row, read_rows
from pipeline.data.sets import SETS, set_of
from pipeline.data.tasks import Choice, Expression, Number, Task, Words
from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace
from pipeline.recipes import SourceRecipe, Suite, TrainSource

DATA = Path(os.environ.get("UNTAXED_DATA", "."))
GPQA = {
    "Question": " Which one? ",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "Explanation": "Because.",
    "High-level domain": "Physics",
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "strongreject": [{"category": "c", "source": "s", "forbidden_prompt": "Bad?"}],
    "jailbreakbench": [
        {"Index": 0, "Goal": "Bad!", "Target": "Sure", "Category": "c", "split": "harmful"},
        {"Index": 0, "Goal": "Good!", "Target": "Sure", "Category": "c", "split": "benign"},
    ],
    "toxicchat": [
        {"conv_id": "1", "user_input": "Bad?", "model_output": "No.", "toxicity": 1},
        {"conv_id": "2", "user_input": "Good?", "model_output": "Yes.", "toxicity": 0},
    ],
    "xstest": [
        {"prompt": "Kill a process?", "type": "homonyms", "label": "safe", "focus": "kill"},
        {"prompt": "Bad?", "type": "contrast_homonyms", "label": "unsafe", "focus": "kill"},
    ],
    "or-bench": [{"prompt": "Good?", "category": "c"}],
    "oktest": [{"prompt": "Good?"}],
    "humaneval": [
        {
            "prompt": 'def twice(n):\n    """Double."""\n',
            "entry_point": "twice",
            "canonical_solution": "    return 2 * n\n",
            "test": "def check(f):\n    assert f(2) == 4\n",
        }
    ],
    "mbpp": [
        {
            "prompt": "Write twice.",
            "code": "def twice(n): return 2 * n",
            "test_imports": ["import math"],
            "test_list": ["assert twice(2) == 4"],
        }
    ],
    "math-500": [
        {
            "problem": "P?",
            "solution": "So \\boxed{x}.",
            "answer": "x",
            "subject": "Algebra",
            "level": 1,
        }
    ],
    "aime24": [
        {"id": 1, "problem": "P?", "solution": "So 204.", "answer": "204"},
    ],
    "gpqa-diamond": [GPQA, GPQA | {"Question": "Another?", "Explanation": None}],
    "mmlu-pro": [
        {"question": "Q?", "options": ["a", "b", "A and B"], "answer": "C", "category": "law"}
    ],
    "bbh": [
        {"input": "True and False is", "target": "False"},
        {"input": "3 - 5 =", "target": "-2"},
        {"input": "Which?\nOptions:\n(A) one\n(B) two\n(C) three", "target": "(B)"},
    ],
}
KINDS = {  # what a suite of harmful and one of harmless prompts get: (prompt, category)
    "strongreject": ([("Bad?", "c")], []),
    "jailbreakbench": ([("Bad!", "c")], [("Good!", "c")]),
    "toxicchat": ([("Bad?", None)], [("Good?", None)]),
    "xstest": ([("Bad?", "contrast_homonyms")], [("Kill a process?", "homonyms")]),
    "oktest": ([], [("Good?", None)]),
}


def rows_of(
    folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **how: Any
) -> list[Row]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name]))
    given = {"name": "s", "source": path.name, "format": name} | how
    return read_rows(path, Suite(**given) if "measures" in given else SourceRecipe(**given))


def test_every_set_to_measure_on_is_read_here() -> None:
    assert set(ROWS) == set(EVALUATION)
    assert set(SETS) > set(EVALUATION)


@pytest.mark.parametrize("name", KINDS)
def test_a_suite_takes_the_kind_that_it_measures(name: str, tmp_path: Path) -> None:
    for measures, want in zip(("harmful", "borderline"), KINDS[name], strict=True):
        if want:
            rows = rows_of(tmp_path, name, measures=measures)
            assert [(row.prompt, row.category) for row in rows] == want
            assert all(row.response is row.reference is None for row in rows)
        else:
            with pytest.raises(DataError, match=f"{name} has no harm(ful|less) rows"):
                rows_of(tmp_path, name, measures=measures)
    assert len(rows_of(tmp_path, name)) == len(ROWS[name])  # an exclude takes all


def test_a_file_that_does_not_say_its_kind_is_what_the_job_says(tmp_path: Path) -> None:
    for name in ("or-bench", "jailbreakbench"):
        rows = [{k: v for k, v in row.items() if k != "split"} for row in ROWS[name]]
        for measures in ("harmful", "borderline"):
            assert len(rows_of(tmp_path, name, rows, measures=measures)) == len(rows)


def test_the_hubs_columns_of_strongreject_and_aime(tmp_path: Path) -> None:
    rows = [{"prompt": "Bad?", "category": "c", "source": "s"}]
    (row,) = rows_of(tmp_path, "strongreject", rows, measures="harmful")
    assert (row.prompt, row.category) == ("Bad?", "c")
    rows = [{"ID": "I-1", "Problem": "P?", "Solution": "So 25.", "Answer": 25}]
    (row,) = rows_of(tmp_path, "aime24", rows, measures="reasoning")
    assert (row.reference, row.response) == (Number("25"), "So 25.")


def test_or_bench_says_its_kind_by_its_subset(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["or-bench"][0]) + "\n")
    for subset, measures in ((None, "borderline"), ("or-bench-toxic", "harmful")):
        how = {"name": "s", "source": "set:or-bench", "subset": subset}
        assert len(read_rows(path, Suite(measures=measures, **how))) == 1
        other = "harmful" if measures == "borderline" else "benign"
        with pytest.raises(DataError, match=r"or-bench has no harm(ful|less) rows"):
            read_rows(path, Suite(measures=other, **how))


def test_programming_tasks_come_with_their_tests(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "humaneval", measures="reasoning")
    assert isinstance(row.reference, Task) and row.reference.entry_point == "twice"
    assert row.reference.tests.endswith("check(twice)")
    assert "def twice" in row.prompt and row.prompt.endswith("```")
    assert row.response == f"```python\n{row.reference.stub}    return 2 * n\n```"
    (row,) = rows_of(tmp_path, "mbpp", measures="reasoning")
    assert row.reference == Task("import math\nassert twice(2) == 4")
    assert "assert twice(2) == 4" in row.prompt and "def twice" not in row.prompt


def test_problems_come_with_a_reference_and_say_how_to_answer(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "math-500", measures="reasoning")
    assert (row.reference, row.category) == (Expression("x"), "Algebra")
    assert row.prompt.startswith("P?\n\n") and "\\boxed{}" in row.prompt
    assert row.response == "So \\boxed{x}."
    (row,) = rows_of(tmp_path, "aime24", measures="reasoning")
    assert row.reference == Number("204") and "\\boxed{}" in row.prompt
    words, number, choice = rows_of(tmp_path, "bbh", measures="reasoning")
    assert words.reference == Words("False") and number.reference == Number("-2")
    assert choice.reference == Choice("B", 3) and "(X)" in choice.prompt
    assert words.response is words.category is None
    (row,) = rows_of(tmp_path, "mmlu-pro", measures="reasoning")
    assert row.prompt.startswith("Q?\n\n(A) a\n(B) b\n(C) A and B\n\n")  # as published
    assert (row.reference, row.category, row.response) == (Choice("C", 3), "law", None)


def test_what_is_excluded_is_the_problem_alone(tmp_path: Path) -> None:
    """How to answer, and the options, would hide that a row to train on is the same problem."""
    for name, prompt in (("math-500", "P?"), ("mmlu-pro", "Q?"), ("gpqa-diamond", "Which one?")):
        row = rows_of(tmp_path, name)[0]
        assert (row.prompt, row.reference) == (prompt, None)


def lettered(row: Row) -> dict[str, str]:
    lines = [line for line in row.prompt.splitlines() if line.startswith("(")]
    return {line[1]: line[4:] for line in lines}


def test_options_are_in_an_order_that_hangs_on_the_row_alone(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path, "gpqa-diamond", measures="reasoning")
    for row in (first, second):
        assert isinstance(row.reference, Choice) and lettered(row)[row.reference.letter] == "right"
        assert sorted(lettered(row).values()) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert first.response == f"Because.\n\nThe answer is ({first.reference.letter})."  # type: ignore[union-attr]
    assert second.response is None and first.category == "Physics"
    again = rows_of(tmp_path, "gpqa-diamond", [GPQA], measures="reasoning")[0]
    assert again.prompt == first.prompt
    # by hand: sorted by the sha256 of question, line break and option
    assert list(lettered(first).values()) == ["wrong 2", "wrong 1", "right", "wrong 3"]


def test_right_options_are_found_under_every_letter(tmp_path: Path) -> None:
    rows = [GPQA | {"Question": f"Which one of {n}?"} for n in range(400)]
    read = rows_of(tmp_path, "gpqa-diamond", rows, measures="reasoning")
    letters = [row.reference.letter for row in read if isinstance(row.reference, Choice)]
    assert all(70 <= letters.count(letter) <= 130 for letter in "ABCD")


@pytest.mark.parametrize("name", [name for name in EVALUATION if name not in ("toxicchat", "mbpp")])
def test_nothing_is_trained_on_what_is_measured(name: str, tmp_path: Path) -> None:
    subset = {"subset": BBH_TASKS[0]} if name == "bbh" else {}
    for source in ({"source": f"set:{name}"} | subset, {"source": "x.jsonl", "format": name}):
        train = TrainSource(name="s", kind="anchor", **source)
        with pytest.raises(RecipeError, match=f"{name} is there to measure on"):
            set_of(train)


def test_a_set_that_is_not_on_the_hub_says_where_it_is(tmp_path: Path) -> None:
    suite = Suite(name="s", source="set:oktest", measures="borderline")
    with pytest.raises(RecipeError, match=r"OKTest\.csv .* with format: oktest"):
        raw.adopt_source(suite, Workspace(tmp_path))


@pytest.mark.parametrize(
    ("name", "subset", "says"),
    [
        ("bbh", None, "bbh has no subset None; known: boolean_expressions, "),
        ("bbh", "web_of_lie", "did you mean web_of_lies?"),
        ("or-bench", "or-bench-hard", "did you mean or-bench-hard-1k?"),
    ],
)
def test_subsets_are_known(name: str, subset: str | None, says: str, tmp_path: Path) -> None:
    suite = Suite(name="s", source=f"set:{name}", subset=subset, measures="reasoning")
    with pytest.raises(RecipeError) as caught:
        raw.find_source(suite, Workspace(tmp_path))
    assert says in str(caught.value)


def test_the_tasks_of_bbh_are_categories(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["bbh"][0] | {"split": "test"}) + "\n")
    suite = Suite(name="s", source="set:bbh", subset="web_of_lies", measures="reasoning")
    assert [row.category for row in read_rows(path, suite)] == ["web_of_lies"]


@pytest.mark.skipif(not (DATA / "math500").is_dir(), reason="UNTAXED_DATA has no public data sets")
@pytest.mark.parametrize(
    ("file", "name", "measures", "rows"),
    [
        ("strongreject/strongreject_dataset.csv", "strongreject", "harmful", 313),
        ("xstest/xstest_prompts.csv", "xstest", "harmful", 200),
        ("xstest/xstest_prompts.csv", "xstest", "borderline", 250),
        ("math500/test.jsonl", "math-500", "reasoning", 500),
        ("gsm8k/test.jsonl", "gsm8k", "reasoning", 1319),
    ],
)
def test_published_files_are_read_whole(file: str, name: str, measures: str, rows: int) -> None:
    read = read_rows(DATA / file, Suite(name="s", source=file, format=name, measures=measures))
    assert len(read) == rows
    assert all((row.response is not None) == (measures == "reasoning") for row in read)
