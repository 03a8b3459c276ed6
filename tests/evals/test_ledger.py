"""Answers survive a kill at any moment; nothing is generated twice, nothing of another model kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.evals import ledger
from pipeline.evals.generate import Generation, Request, generate
from pipeline.evals.ledger import answer
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


def ask(model: Any, path: Path, requests: list[Request], **options: Any) -> list[Generation]:
    options = {"identity": "one", "temperature": 0.0, "seed": 0} | options
    return answer(
        model,
        requests,
        path=path,
        end_ids=ENDS,
        batch_rows=4,
        console=None,
        title="test",
        **options,
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that are really generated from now on."""
    ids: list[str] = []

    def spy(model: Any, requests: list[Request], **options: Any) -> list[Generation]:
        ids.extend(request.id for request in requests)
        return generate(model, requests, **options)

    monkeypatch.setattr(ledger, "generate", spy)
    return ids


def test_the_same_answers_as_without_a_ledger(model: Any, path: Path) -> None:
    want = generate(model, asked(), end_ids=ENDS, batch_rows=4)
    assert ask(model, path, asked()) == want
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"identity": "one"}
    assert {row["id"] for row in rows} == {request.id for request in asked()}


def test_a_second_call_generates_nothing(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(model, path, asked())
    content, ids = path.read_bytes(), counted(monkeypatch)
    assert ask(model, path, asked()) == first
    assert ids == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_killed_midway_goes_on_where_it_stopped(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    whole = ask(model, path.with_name("whole.jsonl"), asked(), temperature=temperature)

    class Killed(BaseException):
        pass

    def dies(model: Any, requests: list[Request], *, done: Any, **options: Any) -> Any:
        finished: list[int] = []

        def third(index: int, generation: Generation) -> None:
            done(index, generation)
            finished.append(index)
            if len(finished) == 3:
                raise Killed

        return generate(model, requests, done=third, **options)

    for kept in (3, 6):  # killed twice
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ledger, "generate", dies)
            ask(model, path, asked(), temperature=temperature)
        assert len(path.read_text().splitlines()) == 1 + kept
    before = {json.loads(line)["id"] for line in path.read_text().splitlines()[1:]}
    ids = counted(monkeypatch)
    assert ask(model, path, asked(), temperature=temperature) == whole
    assert set(ids) == {request.id for request in asked()} - before
    assert len(ids) == 6


def test_a_line_cut_anywhere_costs_that_row_only(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(model, path, asked(4))
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    ids = counted(monkeypatch)
    for cut in (1, 2, len(lines[-1]) // 2, len(lines[-1]) - 1):
        path.write_bytes(content[:-cut])
        ids.clear()
        assert ask(model, path, asked(4)) == whole
        assert ids == [json.loads(lines[-1])["id"]]
        assert path.read_bytes() == content


@pytest.mark.parametrize("junk", [b"\0" * 40 + b"\n", b"7\n", b'{"id": "x"}\n', b"\xff\xfe\n"])
def test_a_line_that_is_no_row_ends_what_is_trusted(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, junk: bytes
) -> None:
    whole = ask(model, path, asked(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], junk, *lines[3:]]))
    ids = counted(monkeypatch)
    assert ask(model, path, asked(4)) == whole
    assert len(ids) == 2
    assert junk not in path.read_bytes()
    assert len(path.read_bytes().splitlines()) == 5


@pytest.mark.parametrize(
    "content", [b"", b'{"identity": "on', b'{"identity": "other"}\n{"id": "suite:0"}\n', b"\0\n"]
)
def test_another_identity_starts_anew(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path.write_bytes(content)
    ids = counted(monkeypatch)
    want = ask(model, path, asked(4))
    assert len(ids) == 4
    assert want == generate(model, asked(4), end_ids=ENDS, batch_rows=4)
    other = ask(model, path, asked(4), identity="two")
    assert len(ids) == 8
    assert other == want
    assert json.loads(path.read_text().splitlines()[0]) == {"identity": "two"}


def test_one_answer_for_an_id_that_is_asked_twice(
    model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = counted(monkeypatch)
    twice = [*asked(3), *asked(3)]
    got = ask(model, path, twice)
    assert got[:3] == got[3:]
    assert len(ids) == 3
