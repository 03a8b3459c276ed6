"""Fixtures that every test may use; what they are made of is in parts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import adopt_folder, make_model, make_tokenizer

from pipeline.artifact import Artifact


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long come first: begun last, one would keep a single core busy."""
    long = {
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("distributed")
    }
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, as a local base."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables and nothing in them: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture()
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path


@pytest.fixture()
def base(runs: Path, base_folder: Path) -> Artifact:
    return adopt_folder(runs, base_folder)
