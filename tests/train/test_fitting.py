"""Checkpointing is chosen for the device that is there, and left alone where the job says."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from training import RECIPE
from transformers import AutoConfig

from pipeline.artifact import Artifact
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context
from pipeline.train import fitting
from pipeline.train.fitting import settle

SFT = SftRecipe.model_validate(RECIPE)


def settled(tmp_path: Path, base: Artifact, execution: Execution, recipe: SftRecipe) -> object:
    context = Context(scratch=tmp_path, execution=execution, console=Console(quiet=True))
    config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    return settle(config, recipe, 1, 1024, "single", context).activation_checkpointing


def test_it_is_off_where_all_fits(tmp_path: Path, base: Artifact) -> None:
    assert settled(tmp_path, base, Execution(), SFT) is False


def test_it_is_on_where_memory_is_short(
    tmp_path: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("400000000\n")  # what Python and its libraries take alone
    monkeypatch.setattr(fitting, "MEMORY_LIMIT", limit)
    assert settled(tmp_path, base, Execution(), SFT) is True


@pytest.mark.parametrize("stated", [True, False])
def test_the_job_has_the_last_word(tmp_path: Path, base: Artifact, stated: bool) -> None:
    execution = Execution(activation_checkpointing=stated)
    assert settled(tmp_path, base, execution, SFT) is stated


def test_on_a_cpu_what_cannot_be_planned_runs_without(tmp_path: Path, base: Artifact) -> None:
    full = SFT.model_copy(update={"lora": None})
    assert settled(tmp_path, base, Execution(), full) is False
