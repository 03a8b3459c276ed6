"""Raw rows to conversations: columns of every published shape, filters, the even spread of limit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import SAMPLES, sample_rows

from pipeline.artifact import open_artifact
from pipeline.data.raw import adopt_source, find_source
from pipeline.data.rows import Row, read_rows, split_think, spread
from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace
from pipeline.recipes import Columns, SourceRecipe, TrainSource

HUB = "hub: data sets need a network; only the way they fail without one is tried here"


def rows_of(folder: Path, rows: list[dict[str, Any]], **source: Any) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = source.pop("kind", None)
    values = {"name": "s", "source": "rows.jsonl"} | source
    recipe = TrainSource(kind=kind, **values) if kind else SourceRecipe(**values)
    return read_rows(path, recipe)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_prompts_alone(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [{"prompt": "Hi", "other": 1}])
    assert row == Row("s:1", 1, "rows.jsonl:1", (user("Hi"),))
    assert row.prompt == "Hi" and row.user_turns == ("Hi",)


def test_prompt_and_response_under_other_names(tmp_path: Path) -> None:
    columns = Columns(prompt="question", response="a", think="why", category="kind")
    given = {"question": "1 + 1?", "a": "2", "why": "One and one.", "kind": "sums"}
    (row,) = rows_of(tmp_path, [given], columns=columns)
    assert (row.prompt, row.response, row.think, row.category) == (
        "1 + 1?",
        "2",
        "One and one.",
        "sums",
    )


def test_direct_refusal_rows(tmp_path: Path) -> None:
    """Prompt and a refusal with its one think sentence inside, as DirectRefusal is published."""
    refusal = "<think>I should not answer this question!</think>I'm sorry, I can't help with that."
    for text in (
        refusal,
        refusal.replace("<think>", "\n<think>\n").replace("</think>", "\n</think>\n\n"),
    ):
        (row,) = rows_of(
            tmp_path,
            [{"prompt": "How?", "refusal": text}],
            columns=Columns(response="refusal"),
            kind="refusal",
        )
        assert row.think == "I should not answer this question!"
        assert row.response == "I'm sorry, I can't help with that."


def test_messages(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, user("Hi"), assistant("Hello."), user("How?"), assistant("<think>a</think>b")]
    (row,) = rows_of(tmp_path, [{"chat": turns}], columns=Columns(messages="chat"), kind="answer")
    assert row.messages == tuple(turns[:-1])
    assert (row.think, row.response) == ("a", "b")
    assert row.prompt == "Hi\n\nHow?", "words of the user alone"


@pytest.mark.parametrize("kind", [None, "anchor"])
def test_messages_may_end_with_the_user_where_no_answer_is_needed(
    kind: str | None, tmp_path: Path
) -> None:
    columns = Columns(messages="messages")
    (row,) = rows_of(tmp_path, [{"messages": [user("Hi")]}], columns=columns, kind=kind)
    assert row.messages == (user("Hi"),) and row.response is None


@pytest.mark.parametrize(
    ("category", "wanted"),
    [("a", "a"), (["a", "b"], "a+b"), (None, None), ("", None), ([], None)],
)
def test_categories(category: Any, wanted: str | None, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "c": category}]
    (row,) = rows_of(tmp_path, rows, columns=Columns(category="c"))
    assert row.category == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("No.", (None, "No.")),
        ("<think>a</think>b", ("a", "b")),
        ("\n <think>\na\n\nb\n</think>\n\nc\n", ("a\n\nb", "c\n")),
        ("<think>\n\n</think>\n\nb", (None, "b")),
    ],
)
def test_think_sections(text: str, wanted: tuple[str | None, str]) -> None:
    assert split_think(text, "here") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "a <think>b</think> c",
        "<think>a",
        "a</think>b",
        "<think>a<think>b</think>c",
        "</think>a<think>",
    ],
)
def test_think_sections_out_of_shape_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="here: wanted one <think>"):
        split_think(text, "here")


MIXED = [
    {"prompt": "0", "split": "train", "safe": True, "tags": ["x", "y"], "n": 1},
    {"prompt": "1", "split": "test", "safe": False, "tags": ["y"], "n": 2},
    {"prompt": "2", "split": "train", "safe": False, "tags": [], "n": None},
    {"prompt": "3", "split": "train", "safe": True, "tags": ["x"], "n": 12},
]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, "0123"),
        ({"split": "train"}, "023"),
        ({"where": {"split": "test"}}, "1"),
        ({"where": {"safe": "true"}}, "03"),
        ({"where": {"tags": "x"}}, "03"),
        ({"where": {"n": "1"}}, "0"),
        ({"where": {"safe": "false"}, "split": "train"}, "2"),
    ],
)
def test_filters(filters: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    assert "".join(row.prompt for row in rows_of(tmp_path, MIXED, **filters)) == wanted


def test_a_filtered_out_row_may_be_broken_and_keeps_its_number(tmp_path: Path) -> None:
    rows = [{"prompt": None, "split": "b"}, {"prompt": "Hi", "split": "a"}]
    (row,) = rows_of(tmp_path, rows, split="a")
    assert (row.id, row.place) == ("s:2", "rows.jsonl:2")


@pytest.mark.parametrize(("size", "limit"), [(10, 3), (130, 100), (7, 7), (1000, 999), (9, 1)])
def test_limit_is_an_even_spread(size: int, limit: int) -> None:
    """Held against numpy: the floor of equal steps over the whole range."""
    taken = spread(range(size), limit)
    assert list(taken) == [int(x) for x in np.linspace(0, size, limit, endpoint=False) + 1e-9]
    steps = np.diff([*taken, size])
    assert steps.max(initial=0) - steps.min(initial=size) <= 1 or limit == 1
    assert len(set(taken)) == limit


def test_a_limit_above_the_rows_takes_all() -> None:
    assert list(spread(range(5), 6)) == list(spread(range(5), None)) == [0, 1, 2, 3, 4]


def test_limit_covers_all_categories_of_a_file_in_their_order() -> None:
    """The samples are sorted by category: their first hundred rows would be of eight kinds."""
    source = SourceRecipe(
        name="s",
        source="sample:harmful",
        where={"split": "heldout"},
        limit=100,
        columns=Columns(category="category"),
    )
    rows = read_rows(SAMPLES / "harmful.jsonl", source)
    assert rows == read_rows(SAMPLES / "harmful.jsonl", source)
    assert len(rows) == 100 and [r.number for r in rows] == sorted(r.number for r in rows)
    sizes = Counter(row.category for row in rows)
    assert len(sizes) == 10 and set(sizes.values()) == {10}


def test_limit_counts_what_matches(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, MIXED, split="train", limit=2)
    assert [row.prompt for row in rows] == ["0", "2"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"messages": "m", "think": "t"}, "messages replaces response and think"),
        ({"think": "t"}, "think without response"),
    ],
)
def test_columns_that_contradict_each_other(
    columns: dict[str, str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        rows_of(tmp_path, [{"prompt": "a"}], columns=Columns(**columns))


def test_two_think_sections_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "r": "<think>b</think>c", "t": "d"}]
    columns = Columns(response="r", think="t")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: two think sections"):
        rows_of(tmp_path, rows, columns=columns)
    rows[0]["t"] = ""
    assert rows_of(tmp_path, rows, columns=columns)[0].think == "b"


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "got an empty list"),
        ("Hi", "got text, wanted a list"),
        ([{"role": "user"}], r"turn 1: got keys \['role'\]"),
        (["Hi"], "turn 1: got text, wanted role and content"),
        ([{"role": "tool", "content": "a"}], "unknown role 'tool'"),
        ([{"role": "assistant", "content": "a"}], "turn 1: got role assistant, wanted user"),
        ([{"role": "user", "content": ""}], "turn 1: 'content' is empty"),
    ],
)
def test_turns_out_of_shape(turns: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{says}"):
        rows_of(tmp_path, [{"messages": turns}], columns=Columns(messages="messages"))


def test_a_file_is_adopted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    path, workspace = tmp_path / "rows.jsonl", Workspace(tmp_path / "runs")
    path.write_text('{"prompt": "a"}\n')
    source = SourceRecipe(name="s", source="rows.jsonl")
    assert find_source(source, workspace) is None and not workspace.runs.exists()
    first = adopt_source(source, workspace)
    other = source.model_copy(update={"name": "t", "limit": 1, "where": {"prompt": "a"}})
    assert adopt_source(other, workspace).folder == first.folder, "one file, two ways of reading"
    path.write_text('{"prompt": "other"}\n')
    assert find_source(source, workspace) is None
    second = adopt_source(source, workspace)
    assert second.digest != first.digest
    assert [row.prompt for row in read_rows(second, source)] == ["other"]
    assert [row.prompt for row in read_rows(open_artifact(first.folder), source)] == ["a"]
    path.chmod(0o644)
    path.write_text("still the user's own file")


def test_samples_are_adopted_whole(tmp_path: Path) -> None:
    source = SourceRecipe(name="s", source="sample:ordinary")
    artifact = adopt_source(source, Workspace(tmp_path))
    rows = read_rows(artifact, source)
    assert [row.prompt for row in rows] == [row["prompt"] for row in sample_rows("ordinary")]


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    source = SourceRecipe(name="s", source="hub:nobody/nothing", split="train")
    with pytest.raises(DataError, match=r"hub:nobody/nothing: cannot be fetched \(.+\); check id"):
        adopt_source(source, Workspace(tmp_path))
    assert not list(tmp_path.glob("data-*")), HUB


def test_splits_of_a_hub_data_set_become_a_column(tmp_path: Path) -> None:
    """All but the download itself: what the ``datasets`` library holds is written and read."""
    from datasets import Dataset

    from pipeline.data.raw import _write

    source = SourceRecipe(name="s", source="hub:org/name", split="test")
    splits = {
        "train": Dataset.from_list([{"prompt": "a", "tags": ["x"]}]),
        "test": Dataset.from_list([{"prompt": "b", "tags": []}, {"prompt": "c", "tags": ["y"]}]),
    }
    path = tmp_path / "rows.parquet"
    assert _write(splits, source, path) == {"train": 1, "test": 2}
    assert [(r.id, r.prompt) for r in read_rows(path, source)] == [("s:2", "b"), ("s:3", "c")]
    clash = {name: data.add_column("split", ["z"] * len(data)) for name, data in splits.items()}
    with pytest.raises(DataError, match="a column 'split' of its own"):
        _write(clash, source, path)
