"""What must never be trained on: training stops before the update, says where, keeps the last good
checkpoint."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from training import RECIPE, Launch

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import UntaxedError
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context
from pipeline.train.divergence import Divergence
from pipeline.train.replicated import ReplicatedEngine


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(inputs: dict[str, Artifact], folder: Path) -> None:
    (folder / "scratch").mkdir()
    (folder / "out").mkdir()
    context = Context(
        scratch=folder / "scratch",
        execution=Execution(checkpoint_seconds=1e-6),
        options={"engine": "single"},
        console=Console(quiet=True),
    )
    sft.run(SftRecipe.model_validate(RECIPE), inputs, folder / "out", context)


def steps_kept(folder: Path) -> list[str]:
    found = (path.name.split("-")[1] for path in (folder / "scratch").glob("checkpoint-*"))
    return sorted(step[-2:] for step in found)


def poison(monkeypatch: pytest.MonkeyPatch, where: str, step: int, factor: float) -> list[int]:
    """Multiply by ``factor`` from ``step`` on the loss that forward returns, or the cross-entropy that it
    reports, or the loss in backward only. Returns a list that grows by one with every update."""
    updates: list[int] = []
    name = "backward" if where == "backward" else "forward"
    real, update = getattr(ReplicatedEngine, name), torch.optim.AdamW.step

    def forward(self: ReplicatedEngine, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        result = real(self, *args, **options)
        if not torch.is_grad_enabled() or len(updates) < step - 1:
            return result
        loss, cross_entropy, kl = result
        if where == "forward":
            return loss * factor, cross_entropy, kl
        return loss, cross_entropy * factor, kl

    def backward(self: ReplicatedEngine, loss: Tensor) -> None:
        real(self, loss * factor if len(updates) >= step - 1 else loss)

    def counted(self: torch.optim.AdamW, closure: Any = None) -> Any:
        updates.append(1)
        return update(self, closure)

    monkeypatch.setattr(ReplicatedEngine, name, {"forward": forward, "backward": backward}[name])
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return updates


@pytest.mark.parametrize(
    ("where", "factor", "words"),
    [
        ("forward", math.nan, ("step 5, rank 0: loss nan on rows",)),
        ("forward", math.inf, ("step 5, rank 0: loss inf on rows",)),
        ("backward", math.nan, ("step 5: a gradient is not finite on rank 0 (rows",)),
        ("backward", 1e30, ("step 5, all ranks (rows", "the gradient norm is inf")),
    ],
)
def test_what_is_not_finite_stops_before_the_update(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    factor: float,
    words: tuple[str, ...],
) -> None:
    updates = poison(monkeypatch, where, 5, factor)
    with pytest.raises(UntaxedError) as caught:
        train(inputs, tmp_path)
    for word in (*words, "stopped before the update"):
        assert word in str(caught.value)
    assert len(updates) == 4
    assert steps_kept(tmp_path) == ["04", "04"]  # before and after the end of the second epoch


def test_a_tensor_without_gradient_stops_the_second_update(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "backward", 1, 0.0)
    with pytest.raises(UntaxedError) as caught:
        train(inputs, tmp_path)
    for word in ("step 2, all ranks (rows ", "have had no gradient", "lora_A"):
        assert word in str(caught.value)
    assert steps_kept(tmp_path) == ["01"]


def test_divergence_stops_and_keeps_what_was_good(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = poison(monkeypatch, "reported", 5, 4.0)
    with pytest.raises(UntaxedError) as caught:
        train(inputs, tmp_path)
    said = str(caught.value)
    for word in ("step 7, all ranks (rows ", "training diverges: cross_entropy has risen to"):
        assert word in said
    assert len(updates) == 6  # the median of five steps has risen at the third bad one
    assert steps_kept(tmp_path) == ["04", "04"]  # but none is kept from the first one on


def test_divergence_is_a_lasting_rise_of_one_loss() -> None:
    calm = [{"loss": 0.0, "cross_entropy": 2.0 + 0.5 * (i % 3), "kl": 0.01 * i} for i in range(40)]
    rule = Divergence(5.0, ())
    assert [rule.see(record) for record in calm] == [None] * 40
    spikes = [{"cross_entropy": 30.0 if i % 3 == 0 else 2.0} for i in range(40)]
    rule = Divergence(5.0, ())
    assert [rule.see(record) for record in spikes] == [None] * 40
    found = Divergence(5.0, calm)
    seen = [found.see({"cross_entropy": 9.0, "kl": 0.1}) for _ in range(4)]
    assert seen[:2] == [None, None] and found.suspicious
    assert seen[3] and seen[3].startswith("cross_entropy has risen to 9.00 nats a token")
    drifted = Divergence(5.0, calm)
    assert [bool(drifted.see({"cross_entropy": 1.0, "kl": 6.0})) for _ in range(4)][-1]


def test_divergence_goes_on_after_a_resume_as_if_never_stopped() -> None:
    records = [{"cross_entropy": value} for value in (3.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0)]
    whole = Divergence(5.0, ())
    expected = [whole.see(record) for record in records]
    for stop in range(len(records)):
        resumed = Divergence(5.0, records[:stop])
        assert [resumed.see(record) for record in records[stop:]] == expected[stop:]


@pytest.mark.distributed
def test_every_engine_stops_before_an_update_that_is_not_finite(
    tmp_path: Path, inputs: dict[str, Artifact], launch: Launch
) -> None:
    """``poisoned``: worker.py multiplies the loss of step 3 before backward."""
    runs = [
        {"out": str(tmp_path / name), "recipe": RECIPE, "poisoned": factor, **options}
        for name, options, factor in POISONED
    ]
    launch(runs, inputs, tmp_path)
    for name, _, factor in POISONED:
        said = (tmp_path / name / "error.txt").read_text()
        assert ("norm is inf" in said) == (factor == 1e30), said
        assert "step 3" in said and "stopped before the update" in said
        if factor != 1e30:
            assert "on rank 0 (rows " in said and "rank 1 (rows" in said
        assert (tmp_path / name / "unchanged").exists()


ROOT = Path(__file__).parents[2]
POISONED: list[tuple[str, dict[str, Any], float]] = [
    (f"{name}-{factor:g}", options, factor)
    for name, options in {
        "fsdp": {"engine": "fsdp"},
        "zero2": {"ds": str(ROOT / "ds_configs/zero2.json")},
        "zero3": {"ds": str(ROOT / "ds_configs/zero3.json")},
    }.items()
    for factor in (math.nan, 1e30)
    if (name, factor) != ("zero3", 1e30)  # its norm is taken in fp64, and clips
]
