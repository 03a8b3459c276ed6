"""Fixtures that every test may use; what they are made of is in parts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import adopt_folder, make_model, make_tokenizer

from pipeline.artifact import Artifact


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
