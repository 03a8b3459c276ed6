"""Raw rows to conversations: filter, map the columns, check every value.

Shared by prep and the evaluation suites, so that both mean the same rows. Torch-free.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifact import Artifact
from pipeline.data.chat import Message
from pipeline.data.public import HARMFUL
from pipeline.data.sets import check_columns, set_of
from pipeline.data.tables import Record, kind_of, read_table
from pipeline.data.tasks import Reference
from pipeline.errors import DataError, RecipeError
from pipeline.recipes import Columns, EvalSource, SourceRecipe, Suite, TrainSource

T = TypeVar("T")
ROLES = ("system", "user", "assistant")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MAX_TEXT_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Row:
    """One conversation up to where the answer begins, and what is known of that answer.

    ``messages`` ends with a user turn. ``number`` is the row's line or place in its file, from 1;
    ``place`` is file and row for error messages. ``reference`` is what a right answer to a reasoning
    problem is, where the set says so apart from its worked answer.
    """

    id: str
    number: int
    place: str
    messages: tuple[Message, ...]
    response: str | None = None
    think: str | None = None
    category: str | None = None
    reference: Reference | None = None

    @property
    def user_turns(self) -> tuple[str, ...]:
        return user_turns(self.messages)

    @property
    def prompt(self) -> str:
        """The user's words; several turns are joined by an empty line."""
        return prompt_of(self.messages)


def user_turns(messages: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """What the user said, turn by turn."""
    return tuple(m["content"] for m in messages if m["role"] == "user")


def prompt_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The user's words; several turns are joined by an empty line."""
    return "\n\n".join(user_turns(messages))


def read_rows(data: Artifact | Path, source: SourceRecipe) -> list[Row]:
    """The rows of ``source`` in file order, after ``split``, ``where`` and ``limit``.

    ``where`` and ``split`` compare a value's text (``true`` and ``false`` for booleans); a row
    without a value does not match, of a list one element is enough. ``limit`` takes that many of
    the rows that match, evenly spaced over the file. Only rows that are taken are checked.

    Raises:
        DataError: a broken file or row, a column that is not there, no row left.
        RecipeError: columns that contradict one another.
    """
    records = read_table(_file_of(data), source.source)
    if source.public is None:
        _check_columns(source)
        records = _select(records, source)
    else:
        records = _adapted(records, source)
    return [_row(record, source) for record in spread(records, source.limit)]


def spread(records: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most ``limit`` of ``records``, evenly spaced and in order: many files are sorted by
    category, and their first rows would be of one kind. All of them if there are no more.
    """
    if limit is None or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def split_think(text: str, place: str) -> tuple[str | None, str]:
    """``<think>..</think>`` at the start of a response apart from the answer after it.

    Line breaks around both parts are dropped; an empty section counts as none.
    """
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not opened and not closed:
        return None, text
    if (opened, closed) != (1, 1) or not text.lstrip().startswith(THINK_OPEN):
        raise DataError(
            f"{place}: wanted one {THINK_OPEN}..{THINK_CLOSE} section at the start of the response,"
            f" got {opened} opening and {closed} closing marks; fix or drop the row"
        )
    think, _, answer = text.lstrip().removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return think.strip() or None, answer.lstrip()


def _file_of(data: Artifact | Path) -> Path:
    if isinstance(data, Path):
        return data
    if len(data.manifest.files) != 1:
        raise DataError(f"{data.folder}: wanted one data file, got {sorted(data.manifest.files)}")
    return data.path(next(iter(data.manifest.files)))


def _check_columns(source: SourceRecipe) -> None:
    columns, who = source.columns, f"source {source.name}: columns"
    if columns.messages and (columns.response or columns.think):
        raise RecipeError(f"{who}: messages replaces response and think; leave those out")
    if columns.think and not columns.response:
        raise RecipeError(f"{who}: think without response; name the response column too")
    if not isinstance(source, TrainSource):
        return
    if source.kind == "answer" and not (columns.response or columns.messages):
        raise RecipeError(f"{who}: kind answer needs response or messages; name that column")
    if source.kind == "anchor" and (columns.response or columns.think):
        raise RecipeError(
            f"{who}: kind anchor is answered by the base model; leave response and think out"
        )


def _select(records: list[Record], source: SourceRecipe) -> list[Record]:
    """The records that match ``split`` and ``where``; checks that all named columns exist."""
    shown, columns = source.source, source.columns
    wanted = dict(source.where)
    if source.split is None and source.source.startswith("set:") and "split" not in wanted:
        public = set_of(source)
        if isinstance(source, TrainSource) and public.split is not None:
            wanted["split"] = public.split
        elif isinstance(source, EvalSource) and public.test_split is not None:
            wanted["split"] = public.test_split
    if source.split is not None:
        if wanted.get("split", source.split) != source.split:
            raise RecipeError(
                f"source {source.name}: split={source.split} and where.split={wanted['split']}"
                " contradict; keep one"
            )
        wanted["split"] = source.split
    there = {name: None for record in records for name in record.values}
    mapped = [columns.messages or columns.prompt, columns.response, columns.think, columns.category]
    for name in [*(mapped if source.public is None else ()), *wanted]:
        if name is not None and name not in there:
            raise DataError(f"{shown}: no column {name!r}; {_near(name, there, 'columns')}")
    kept = records
    for name, value in wanted.items():
        found = [record for record in kept if value in _texts(record.values.get(name))]
        if not found:
            values = {text: None for r in kept for text in _texts(r.values.get(name))}
            raise DataError(
                f"{shown}: no rows left where {name}={value}; {_near(value, values, 'values')}"
            )
        kept = found
    return kept


def _adapted(records: list[Record], source: SourceRecipe) -> list[Record]:
    """The records of a public set in the default columns, and those only that the source is about."""
    name = source.public or ""
    public = set_of(source)
    check_columns(public, name, records[0].values, source.source)
    named = source.source.startswith("set:")
    subset = {"subset": source.subset or public.subset} if named else {}
    wanted: bool | None = None
    if isinstance(source, TrainSource):
        wanted = source.kind == "refusal"
    elif isinstance(source, EvalSource):
        wanted = source.measures == "harmful"
    kept = []
    for record in _select(records, source):
        try:
            values = public.read(subset | record.values)
        except ValueError as error:
            raise DataError(f"{record.place}: {error}; fix or drop the row") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{record.place}: does not read as a row of {name} ({type(error).__name__}: {error});"
                " fix or drop the row"
            ) from None
        harmful = values.pop(HARMFUL)
        if not _reads_answers(source):
            values.pop("response", None)
        if wanted is None or harmful is None or harmful == wanted:
            kept.append(replace(record, values=values))
    if not kept:
        raise DataError(
            f"{source.source}: {name} has no {'harmful' if wanted else 'harmless'} rows among the"
            f" {len(records)} there; source {source.name} needs them"
        )
    if isinstance(source, TrainSource) and source.kind == "answer":
        kept = [record for record in kept if record.values.get("response") is not None]
        if not kept:
            raise DataError(f"{source.source}: {name} gives these rows no answer; use kind anchor")
    return kept


def _reads_answers(source: SourceRecipe) -> bool:
    """Whether the response of a row is of use; a broken one is no reason to lose a prompt."""
    if isinstance(source, TrainSource):
        return source.kind != "anchor"
    return _is_reasoning(source)


def _is_reasoning(source: SourceRecipe) -> bool:
    return isinstance(source, EvalSource) and source.measures == "reasoning"


def _texts(value: Any) -> tuple[str, ...]:
    """The texts a cell can be matched by."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(text for item in value for text in _texts(item))
    return (str(value).lower() if isinstance(value, bool) else str(value),)


def _near(name: str, there: Iterable[str], what: str) -> str:
    names = sorted(there)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    shown = ", ".join(n if len(n) <= 40 else n[:37] + "..." for n in names[:12]) or "none"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (f"did you mean {close[0]!r}? " if close else "") + f"{what} there: {shown}{more}"


def _row(record: Record, source: SourceRecipe) -> Row:
    columns, place = source.columns, record.place
    asked = source.public is not None and _is_reasoning(source)
    if source.public is not None:
        given = {n: n for n in ("response", "category") if record.values.get(n) is not None}
        columns = Columns(**given)
    response = think = None
    if columns.messages:
        messages, response = _conversation(record, columns.messages)
        needs_response = isinstance(source, TrainSource) and source.kind != "anchor"
        if response is None and needs_response:
            raise DataError(
                f"{place}: {columns.messages!r} ends with a user turn; wanted the assistant's"
                " answer last"
            )
    else:
        text = _text(record.values.get(columns.prompt), place, columns.prompt)
        if asked and isinstance(source, Suite) and record.values.get("ask"):
            text = f"{text}\n\n{record.values['ask']}"
        messages = ({"role": "user", "content": text},)
        if columns.response:
            response = _text(record.values.get(columns.response), place, columns.response)
    if response is not None:
        think, response = split_think(response, place)
        if not response.strip():
            raise DataError(f"{place}: no answer after the think section; fix or drop the row")
    if columns.think and record.values.get(columns.think) not in (None, ""):
        if think is not None:
            raise DataError(
                f"{place}: two think sections, in {columns.think!r} and in {columns.response!r};"
                " keep one"
            )
        think = _text(record.values[columns.think], place, columns.think)
    return Row(
        id=f"{source.name}:{record.number}",
        number=record.number,
        place=place,
        messages=messages,
        response=response,
        think=think,
        category=_category(record, columns.category),
        reference=record.values.get("reference") if asked else None,
    )


def _text(value: Any, place: str, name: str) -> str:
    """``value`` if it is a text with something in it that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r}: got {kind_of(value)}, wanted text; fix the row")
    if not value.strip():
        raise DataError(f"{place}: {name!r} is empty; wanted text; fill or drop the row")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise DataError(
            f"{place}: {name!r} has {len(value)} characters, wanted at most {MAX_TEXT_CHARACTERS};"
            " cut or drop the row"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {name!r}: half a surrogate pair at character {error.start + 1}; fix the"
            " escape there"
        ) from None
    return value


def _category(record: Record, name: str | None) -> str | None:
    value = record.values.get(name) if name else None
    if value is None or value == "":
        return None
    items: Sequence[Any] = value if isinstance(value, list) else [value]
    return "+".join(_text(item, record.place, str(name)) for item in items) or None


def _conversation(record: Record, name: str) -> tuple[tuple[Message, ...], str | None]:
    """The turns up to the last user turn, and the assistant's answer after it, if there is one."""
    turns, place = record.values.get(name), f"{record.place}: {name!r}"
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(f"{place}: got {got}, wanted a list of role and content")
    messages = [_turn(turn, f"{place} turn {i}") for i, turn in enumerate(turns, start=1)]
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    if not spoken:
        raise DataError(f"{place}: only a system turn; wanted a user turn after it")
    for index, message in enumerate(spoken):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            turn = index + 1 + len(messages) - len(spoken)
            raise DataError(f"{place} turn {turn}: got role {message['role']}, wanted {wanted}")
    if messages[-1]["role"] == "assistant":
        return tuple(messages[:-1]), messages[-1]["content"]
    return tuple(messages), None


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        got = f"keys {sorted(turn)}" if isinstance(turn, dict) else kind_of(turn)
        raise DataError(f"{place}: got {got}, wanted role and content")
    role = _text(turn["role"], place, "role")
    if role not in ROLES:
        raise DataError(f"{place}: unknown role {role!r}; wanted one of {', '.join(ROLES)}")
    return {"role": role, "content": _text(turn["content"], place, "content")}
