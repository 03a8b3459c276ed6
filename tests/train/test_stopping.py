"""SIGTERM at any moment: the process ends at once or at the next boundary, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from training import LORA, RECIPE, losses

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import Stopped
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context, Solo

DROPOUT = SftRecipe.model_validate(RECIPE | {"lora": LORA | {"dropout": 0.1}})
STEPS_AN_EPOCH = 2


class Signalled(Solo):
    """Gets SIGTERM where it comes to ``at``."""

    def __init__(self, at: str) -> None:
        self.at = at

    def mark(self, at: str) -> None:
        if at == self.at:
            self.at = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(inputs: dict[str, Artifact], folder: Path, out: str, at: str = "") -> None:
    """From where the scratch of ``folder`` stands; no checkpoint but the one that a stop makes."""
    context = Context(
        scratch=folder / "scratch",
        execution=Execution(checkpoint_seconds=3600),
        world=Signalled(at),
        options={"engine": "single"},
        console=Console(quiet=True),
    )
    context.scratch.mkdir(exist_ok=True, parents=True)
    (folder / out).mkdir(parents=True)
    sft.run(DROPOUT, inputs, folder / out, context)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Artifact]) -> Path:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    train(inputs, folder, "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("at", "stopped", "kept"),
    [
        ("loading the model", KeyboardInterrupt, []),
        ("the frozen prefix", KeyboardInterrupt, []),
        ("step 1", Stopped, ["checkpoint-00000001-0000"]),
        ("step 7", Stopped, ["checkpoint-00000007-0003"]),
        ("validation after step 2", Stopped, ["checkpoint-00000002-0000"]),
        ("saving epoch 3", Stopped, ["checkpoint-00000006-0003"]),
        ("step 20", Stopped, ["checkpoint-00000020-0009"]),
        ("validation after step 20", Stopped, ["checkpoint-00000020-0009"]),
        ("saving epoch 10", Stopped, ["checkpoint-00000020-0010"]),
    ],
)
def test_a_stop_anywhere_loses_nothing(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    whole: Path,
    at: str,
    stopped: type[BaseException],
    kept: list[str],
) -> None:
    with pytest.raises(stopped):
        train(inputs, tmp_path, "first", at)
    assert [path.name for path in (tmp_path / "scratch").glob("checkpoint-*")] == kept
    train(inputs, tmp_path, "second")
    names = sorted(str(p.relative_to(whole)) for p in whole.glob("epoch-*/*"))
    assert len(names) == 20
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (whole / name).read_bytes(), name
    assert losses(tmp_path / "second") == losses(whole)
    validations = (tmp_path / "second" / "metrics.jsonl").read_text().count("dev_loss")
    assert validations == 20 / STEPS_AN_EPOCH


def test_a_request_is_heard_once_however_often_it_comes(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    """Launchers ask again while the process cleans up."""
    with pytest.raises(KeyboardInterrupt):
        train(inputs, tmp_path, "first", "loading the model")
    signal.raise_signal(signal.SIGTERM)
