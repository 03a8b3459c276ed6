"""A stopped run goes on where it was, and ends as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training import LORA, RECIPE, Launch, losses

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import UntaxedError
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context
from pipeline.train.replicated import ReplicatedEngine

ADAPTER = "epoch-10/adapter_model.safetensors"
DROPOUT = RECIPE | {"lora": LORA | {"dropout": 0.1}}


def context(scratch: Path) -> Context:
    return Context(
        scratch=scratch,
        execution=Execution(checkpoint_seconds=1e-6),
        options={"engine": "single"},
        console=Console(quiet=True),
    )


def train(recipe: dict[str, Any], inputs: dict[str, Artifact], out: Path, scratch: Path) -> None:
    out.mkdir(parents=True)
    scratch.mkdir(parents=True, exist_ok=True)
    sft.run(SftRecipe.model_validate(recipe), inputs, out, context(scratch))


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the single engine die in its ``step``-th update."""
    real = ReplicatedEngine.step
    calls = []

    def dying(self: ReplicatedEngine, learning_rate: float) -> float:
        calls.append(1)
        if len(calls) == step:
            raise UntaxedError("killed by the test")
        return real(self, learning_rate)

    monkeypatch.setattr(ReplicatedEngine, "step", dying)


@pytest.mark.parametrize("step", [1, 2, 7, 20])
def test_resume_is_bitwise_with_dropout(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train(DROPOUT, inputs, tmp_path / "whole", tmp_path / "scratch-whole")
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(UntaxedError, match="killed"):
            train(DROPOUT, inputs, tmp_path / "first", tmp_path / "scratch")
    train(DROPOUT, inputs, tmp_path / "second", tmp_path / "scratch")
    whole = (tmp_path / "whole" / ADAPTER).read_bytes()
    assert (tmp_path / "second" / ADAPTER).read_bytes() == whole
    assert losses(tmp_path / "second") == losses(tmp_path / "whole")
    assert len(list((tmp_path / "second").glob("epoch-*"))) == 10


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(RECIPE, inputs, tmp_path / "whole", tmp_path / "scratch-whole")
    with monkeypatch.context() as patch:
        crash_at(patch, 9)
        with pytest.raises(UntaxedError):
            train(RECIPE, inputs, tmp_path / "first", tmp_path / "scratch")
    checkpoints = sorted((tmp_path / "scratch").glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-00000007", "checkpoint-00000008"]
    state = checkpoints[-1] / "state.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[-1] ^= 1
    state.write_bytes(damaged)
    train(RECIPE, inputs, tmp_path / "second", tmp_path / "scratch")
    assert losses(tmp_path / "second") == losses(tmp_path / "whole")


@pytest.mark.distributed
def test_another_world_and_engine_goes_on(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(RECIPE, inputs, tmp_path / "whole", tmp_path / "scratch-whole")
    runs = []
    for name, options in {
        "fsdp": {"engine": "fsdp"},
        "zero2": {"ds": str(Path(__file__).parents[2] / "ds_configs/zero2.json")},
        "zero3": {"ds": str(Path(__file__).parents[2] / "ds_configs/zero3.json")},
    }.items():
        with monkeypatch.context() as patch:
            crash_at(patch, 11)
            with pytest.raises(UntaxedError):
                train(RECIPE, inputs, tmp_path / f"first-{name}", tmp_path / f"scratch-{name}")
        scratch = str(tmp_path / f"scratch-{name}")
        runs.append({"out": str(tmp_path / name), "scratch": scratch, "recipe": RECIPE, **options})
    launch(runs, inputs, tmp_path)
    expected = losses(tmp_path / "whole")
    for name in ("fsdp", "zero2", "zero3"):
        got = losses(tmp_path / name)
        assert max(abs(g - e) / e for g, e in zip(got, expected, strict=True)) <= 1e-5
        facts = json.loads((tmp_path / name / "facts.json").read_text())
        assert facts["world_size"] == 2 and facts["steps"] == 20
