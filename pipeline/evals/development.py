"""The rows that a choice among trainings is made on: what prep split off, and suites of the job's own.

None is a row that is reported or was trained on: one that asks nearly the same is dropped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import Artifact
from pipeline.data.dedup import overlaps
from pipeline.data.rows import Row, prompt_of, read_rows, spread
from pipeline.errors import DataError
from pipeline.evals.score import read_lines
from pipeline.evals.verdicts import Item, read_items
from pipeline.recipes import DEV_TOKENS, ChooseRecipe, DevRows, EvalSource, Suite
from pipeline.recipes.choosing import MEASURED

MEASURES = {"refusal": "harmful", "anchor": "benign"}


@dataclass(frozen=True)
class Development:
    """``anchors``: rows with ``messages`` and the base's own answer as ``response_ids``. ``dropped``:
    how many rows were taken out, because they are ``reported`` or ``trained`` on."""

    items: list[Item]
    anchors: list[Mapping[str, Any]]
    dropped: dict[str, int]

    @property
    def measured(self) -> set[str]:
        """The metrics that these rows give."""
        measures = {item.suite.measures for item in self.items}
        found: set[str] = {metric for name in measures for metric in MEASURED[name]}
        if not any(i.row.response for i in self.items if i.suite.measures == "reasoning"):
            found.discard("reasoning_nll")  # it is measured on worked answers
        return found | ({"anchor_nll"} if self.anchors else set())


def read_development(
    choose: ChooseRecipe,
    reported: Sequence[EvalSource],
    inputs: Mapping[str, Artifact],
    threshold: float,
) -> Development:
    """The development rows; ``threshold``: how alike two prompts are that ask the same.

    DataError where a suite, or what prep split off from a source, has no row left.
    """
    conversations = inputs["anchor" if "anchor" in inputs else "prep"]
    rows: dict[str, Mapping[str, Any]] = {}
    items = read_items(choose.suites, inputs, "choose.suites")
    if choose.dev is not None:
        rows = {_id(row): row for row in read_lines(conversations.path("dev.jsonl"))}
        items += _split_off(list(rows.values()), choose.dev)
    held = [t for suite in reported for row in _bare(suite, inputs) for t in row.user_turns]
    trained = [prompt_of(row["messages"]) for row in read_lines(conversations.path("train.jsonl"))]
    # as they stand in their files: a suite's options and how to answer would hide what is the same
    bare = {row.id: row for suite in choose.suites for row in _bare(suite.whole, inputs)}
    asked = [bare.get(item.row.id, item.row) for item in items]
    same = {
        "reported": _alike([(row.id, t) for row in asked for t in row.user_turns], held, threshold),
        "trained": _alike([(row.id, row.prompt) for row in asked], trained, threshold),
    }
    same["trained"] -= same["reported"]  # a row is told once
    kept = [item for item in items if not any(item.row.id in ids for ids in same.values())]
    _check_left(items, kept, same)
    anchors = [rows[i.row.id] for i in kept if rows.get(i.row.id, {}).get("kind") == "anchor"]
    return Development(kept, anchors, {why: len(ids) for why, ids in same.items()})


def _split_off(rows: Sequence[Mapping[str, Any]], recipe: DevRows) -> list[Item]:
    """The rows that prep split off from each source as a suite; given answers measure nothing."""
    found = []
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source and row["kind"] in MEASURES]
        for number, row in enumerate(spread(own, recipe.limit), start=1):
            suite = Suite(
                name=f"dev-{source}"[:40],
                source="dev.jsonl",
                measures=MEASURES[row["kind"]],  # type: ignore[arg-type]
                max_new_tokens=recipe.max_new_tokens or DEV_TOKENS,
            )
            place = f"dev.jsonl: {row['id']}"
            messages = tuple(row["messages"])
            found.append(
                Item(suite, Row(_id(row), number, place, messages, category=row["category"]))
            )
    return found


def _id(row: Mapping[str, Any]) -> str:
    """Apart from the rows of suites, which may have the name of a source."""
    return f"dev/{row['id']}"


def _bare(suite: EvalSource, inputs: Mapping[str, Artifact]) -> list[Row]:
    return read_rows(inputs[f"data.{suite.name}"], suite)


def _alike(asked: Sequence[tuple[str, str]], held: Sequence[str], threshold: float) -> set[str]:
    """Ids of the rows that ask (id, prompt) what ``held`` asks."""
    distinct = list(dict.fromkeys(held))
    found = overlaps([prompt for _, prompt in asked], distinct, threshold) if distinct else []
    return {asked[match.index][0] for match in found}


def _check_left(items: Sequence[Item], kept: Sequence[Item], same: Mapping[str, set[str]]) -> None:
    left = Counter(item.suite.name for item in kept)
    for name in dict.fromkeys(item.suite.name for item in items):
        if left[name]:
            continue
        own = {item.row.id for item in items if item.suite.name == name}
        reported, trained = (len(own & same[why]) for why in ("reported", "trained"))
        raise DataError(
            f"choose: of the {len(own)} rows of {name}, {reported} ask what a suite that is reported"
            f" asks and {trained} what was trained on, so none is left; give it rows of its own"
        )
