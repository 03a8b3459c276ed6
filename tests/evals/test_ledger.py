"""Answers survive a kill at any moment; nothing is generated twice, nothing of another model kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UntaxedError
from pipeline.evals.asking import Generation, Request
from pipeline.evals.engines import Done
from pipeline.evals.generate import generate
from pipeline.evals.ledger import answer, too_many
from pipeline.model.base import load_model

ENDS = frozenset(range(0, 600, 37))


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    return load_model(base_folder, torch.float32)


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.jsonl"


def asked(count: int = 12) -> list[Request]:
    return [Request(f"suite:{i}", [5 + i, 40 + i, 100 + 7 * i], 5 + i) for i in range(count)]


class Killed(BaseException):
    pass


@dataclass
class Tried:
    """An engine around the real ``generate``: it counts what is asked, and may be killed, or fail to
    answer some rows."""

    model: Any
    temperature: float = 0.0
    kill_after: int | None = None
    fails: frozenset[str] = frozenset()
    ids: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    identity: str = ""

    def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
        finished: list[int] = []

        def told(index: int, generation: Generation) -> None:
            if requests[index].id in self.fails:
                generation = Generation([], False, error="HTTP 500")
            done(index, generation)
            finished.append(index)
            if len(finished) == self.kill_after:
                raise Killed

        self.ids += [request.id for request in requests]
        options = {"end_ids": ENDS, "batch_rows": 4, "temperature": self.temperature}
        generate(self.model, requests, done=told, **options)

    def losses(self, pairs: Any, title: str) -> list[tuple[float, int] | None]:
        raise AssertionError("not asked for")


def ask(
    engine: Any,
    path: Path,
    requests: list[Request],
    identity: str = "one",
    log: Callable[[str], None] = print,
) -> list[Generation]:
    engine = engine if isinstance(engine, Tried) else Tried(engine)
    return answer(engine, requests, path=path, identity=identity, title="test", log=log)


def test_the_same_answers_as_without_a_ledger(model: Any, path: Path) -> None:
    want = generate(model, asked(), end_ids=ENDS, batch_rows=4)
    assert ask(model, path, asked()) == want
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"identity": "one"}
    assert {row["id"] for row in rows} == {request.id for request in asked()}


def test_a_second_call_generates_nothing(model: Any, path: Path) -> None:
    first = ask(model, path, asked())
    content, again = path.read_bytes(), Tried(model)
    assert ask(again, path, asked()) == first
    assert again.ids == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_killed_midway_goes_on_where_it_stopped(model: Any, path: Path, temperature: float) -> None:
    whole = ask(Tried(model, temperature), path.with_name("whole.jsonl"), asked())
    for kept in (3, 6):  # killed twice
        with pytest.raises(Killed):
            ask(Tried(model, temperature, kill_after=3), path, asked())
        assert len(path.read_text().splitlines()) == 1 + kept
    before = {json.loads(line)["id"] for line in path.read_text().splitlines()[1:]}
    last = Tried(model, temperature)
    assert ask(last, path, asked()) == whole
    assert set(last.ids) == {request.id for request in asked()} - before
    assert len(last.ids) == 6


def test_a_line_cut_anywhere_costs_that_row_only(model: Any, path: Path) -> None:
    whole = ask(model, path, asked(4))
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (1, 2, len(lines[-1]) // 2, len(lines[-1]) - 1):
        path.write_bytes(content[:-cut])
        again = Tried(model)
        assert ask(again, path, asked(4)) == whole
        assert again.ids == [json.loads(lines[-1])["id"]]
        assert path.read_bytes() == content


@pytest.mark.parametrize("junk", [b"\0" * 40 + b"\n", b"7\n", b'{"id": "x"}\n', b"\xff\xfe\n"])
def test_a_line_that_is_no_row_ends_what_is_trusted(model: Any, path: Path, junk: bytes) -> None:
    whole = ask(model, path, asked(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], junk, *lines[3:]]))
    again = Tried(model)
    assert ask(again, path, asked(4)) == whole
    assert len(again.ids) == 2
    assert junk not in path.read_bytes()
    assert len(path.read_bytes().splitlines()) == 5


@pytest.mark.parametrize(
    "content", [b"", b'{"identity": "on', b'{"identity": "other"}\n{"id": "suite:0"}\n', b"\0\n"]
)
def test_another_identity_starts_anew(model: Any, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    engine = Tried(model)
    want = ask(engine, path, asked(4))
    assert len(engine.ids) == 4
    assert want == generate(model, asked(4), end_ids=ENDS, batch_rows=4)
    said: list[str] = []
    other = ask(engine, path, asked(4), identity="two", log=said.append)
    assert len(engine.ids) == 8
    assert [line.split(":")[1].split(" are")[0] for line in said] == [" 4 finished answers"]
    assert other == want
    assert json.loads(path.read_text().splitlines()[0]) == {"identity": "two"}


def test_one_answer_for_an_id_that_is_asked_twice(model: Any, path: Path) -> None:
    engine = Tried(model)
    twice = [*asked(3), *asked(3)]
    got = ask(engine, path, twice)
    assert got[:3] == got[3:]
    assert len(engine.ids) == 3


def test_text_and_no_error_is_kept(path: Path) -> None:
    """What a server gave as text comes back as it was, whatever characters it holds."""
    text = 'caf\u00e9 \u2028 \U0001f600 \x00 "end"'

    class Told(Tried):
        def answers(self, requests: Sequence[Request], done: Done, title: str) -> None:
            for index, request in enumerate(requests):
                self.ids.append(request.id)
                done(index, Generation([index], True, text))

    first = ask(Told(None), path, asked(2))
    again = Told(None)
    assert ask(again, path, asked(2)) == first == [Generation([i], True, text) for i in range(2)]
    assert again.ids == []
    assert path.read_bytes().isascii()


def test_answers_that_failed_are_tried_again_by_the_next_run(model: Any, path: Path) -> None:
    some = frozenset({"suite:1", "suite:5"})
    got = ask(Tried(model, fails=some), path, asked())
    assert [g.error for g in got] == ["HTTP 500" if i in (1, 5) else None for i in range(12)]
    again = Tried(model)
    assert ask(again, path, asked()) == generate(model, asked(), end_ids=ENDS, batch_rows=4)
    assert set(again.ids) == some


@pytest.mark.parametrize(
    ("failed", "finished", "total", "many"),
    [
        (1, 0, 4, False),
        (4, 0, 4, True),  # all there are
        (9, 0, 500, False),
        (10, 0, 500, True),  # the first ten
        (10, 1, 12, False),
        (11, 1, 12, True),
        (11, 300, 200, True),
        (25, 300, 500, False),
        (26, 300, 500, True),
    ],
)
def test_how_many_failures_are_too_many(failed: int, finished: int, total: int, many: bool) -> None:
    assert too_many(failed, finished, total) is many


def test_too_many_failures_stop_and_what_is_finished_stays(model: Any, path: Path) -> None:
    every = frozenset(request.id for request in asked())
    with pytest.raises(
        UntaxedError, match=r"test: 10 of 12 requests failed, the last \(row suite:"
    ) as e:
        ask(Tried(model, fails=every), path, asked())
    assert "HTTP 500; 0 answers are kept: see to the server, then run again" in str(e.value)
    ask(model, path, asked(1))
    with pytest.raises(UntaxedError, match=r"11 of 12 requests failed.*; 1 answers are kept"):
        ask(Tried(model, fails=every), path, asked())
    assert len(path.read_text().splitlines()) == 2
