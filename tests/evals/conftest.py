"""Fixtures of served models, and of a machine that does not wait before it tries again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import make_served
from serving import RealModels

from pipeline.data.chat import Chat
from pipeline.evals import client
from pipeline.model.base import load_tokenizer
from pipeline.recipes import ChatRecipe


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A very small base, the same again under another name, and one that differs from it."""
    base, other = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("aligned")
    make_served(base, seed=1)
    make_served(other, seed=0)
    return {"base": base, "twin": base, "aligned": other}


@pytest.fixture(scope="session")
def real(folders: dict[str, Path]) -> RealModels:
    return RealModels(folders)


@pytest.fixture()
def knows(real: RealModels) -> Iterator[Callable[[str], RealModels]]:
    """The real models on a server that knows less."""
    before = real.knows

    def less(what: str) -> RealModels:
        real.knows = what.split()
        return real

    yield less
    real.knows = before


@pytest.fixture()
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT_SECONDS", 0.0)


@pytest.fixture()
def chat(folders: dict[str, Path]) -> Chat:
    return Chat(load_tokenizer(folders["base"]), ChatRecipe())
