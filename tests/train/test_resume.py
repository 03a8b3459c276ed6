"""A stopped run goes on where it was, and ends as if it had never stopped."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parts import adopt_folder, make_model, make_tokenizer
from rich.console import Console
from safetensors.torch import load_file
from training import LORA, ROOT, Launch, losses, make_pack
from training import RECIPE as LONGER

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import UntaxedError
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context
from pipeline.train import checkpoint, zero
from pipeline.train.replicated import ReplicatedEngine

EPOCHS, STEPS = 5, 10
ADAPTER = f"epoch-{EPOCHS}/adapter_model.safetensors"
MODEL = f"epoch-{EPOCHS}/model.safetensors"
RECIPE = LONGER | {"epochs": EPOCHS}
DROPOUT = RECIPE | {"lora": LORA | {"dropout": 0.1}}
FULL = RECIPE | {"lora": None, "optimizer": {"learning_rate": 0.001}}


def train(
    recipe: dict[str, Any],
    inputs: dict[str, Artifact],
    out: Path,
    scratch: Path,
    console: Console | None = None,
) -> None:
    """In one process, with a checkpoint after every step."""
    out.mkdir(parents=True)
    scratch.mkdir(parents=True, exist_ok=True)
    context = Context(
        scratch=scratch,
        execution=Execution(checkpoint_seconds=1e-6),
        options={"engine": "single"},
        console=console or Console(quiet=True),
    )
    sft.run(SftRecipe.model_validate(recipe), inputs, out, context)


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Artifact]:
    """A tiny base and rows for half as many steps as other tests take: there are many runs."""
    runs = tmp_path_factory.mktemp("inputs")
    base = adopt_folder(runs, base_folder)
    return {"base": base, "pack": make_pack(runs, base, epochs=EPOCHS)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Artifact]) -> Path:
    """Runs of one process that nobody stops, by what they train."""
    folder = tmp_path_factory.mktemp("whole")
    for name, recipe in (("lora", RECIPE), ("dropout", DROPOUT), ("full", FULL)):
        train(recipe, inputs, folder / name, folder / f"scratch-{name}")
    return folder


@pytest.mark.parametrize("step", [1, 2, 7, STEPS])
def test_resume_is_bitwise_with_dropout(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(UntaxedError, match="killed"):
            train(DROPOUT, inputs, tmp_path / "first", tmp_path / "scratch")
    train(DROPOUT, inputs, tmp_path / "second", tmp_path / "scratch")
    expected = (whole / "dropout" / ADAPTER).read_bytes()
    assert (tmp_path / "second" / ADAPTER).read_bytes() == expected
    assert losses(tmp_path / "second") == losses(whole / "dropout")
    assert len(list((tmp_path / "second").glob("epoch-*"))) == EPOCHS


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, inputs: dict[str, Artifact], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 9)
        with pytest.raises(UntaxedError):
            train(RECIPE, inputs, tmp_path / "first", tmp_path / "scratch")
    checkpoints = sorted((tmp_path / "scratch").glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-00000008-0003", "checkpoint-00000008-0004"]
    state = checkpoints[-1] / "state-00000.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[-1] ^= 1
    state.write_bytes(damaged)
    said = io.StringIO()
    train(RECIPE, inputs, tmp_path / "second", tmp_path / "scratch", Console(file=said, width=200))
    assert "checkpoint-00000008-0004 is damaged" in said.getvalue()
    assert "going on after step 8" in said.getvalue()
    assert losses(tmp_path / "second") == losses(whole / "lora")


ENGINES: dict[str, dict[str, str]] = {
    "fsdp": {"engine": "fsdp"},
    "ddp": {"engine": "ddp"},
    "zero2": {"ds": str(ROOT / "ds_configs/zero2.json")},
    "zero3": {"ds": str(ROOT / "ds_configs/zero3.json")},
}
ONE_TO_TWO = ("fsdp", "zero2", "zero3")
TWO_TO_TWO = (("zero3", "fsdp"), ("fsdp", "zero3"), ("ddp", "zero3"))
TWO_TO_ONE = ("fsdp", "zero3")
FULLY = (("zero3", "fsdp"), ("fsdp", "zero3"))
BITWISE = ("fsdp", "zero3")
ODD = (("lora", "zero3"), ("full", "zero3"), ("full", "fsdp"))
ODDLY = {"lora": RECIPE | {"lora": LORA | {"rank": 1}}, "full": FULL}
STOP = "step 5"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A model whose tensors two ranks cannot share evenly: 129 channels, 609 tokens."""
    folder = tmp_path_factory.mktemp("odd")
    make_model(folder / "base", intermediate_size=129, vocab_size=609)
    make_tokenizer(folder / "base")
    base = adopt_folder(folder, folder / "base")
    return {"base": base, "pack": make_pack(folder, base, epochs=EPOCHS)}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: dict[str, Artifact],
    odd: dict[str, Artifact],
    whole: Path,
    launch: Launch,
) -> Path:
    """All runs of two processes, in one launch: stopped ones, and those that go on after them.

    Several may go on after one that was stopped, each from a copy of its scratch folder.
    """
    folder = tmp_path_factory.mktemp("worlds")
    runs: list[dict[str, Any]] = []

    def add(out: str, engine: str, recipe: dict[str, Any] = RECIPE, **more: Any) -> None:
        place = {"out": str(folder / out), "scratch": str(folder / f"scratch-{out}")}
        runs.append({"recipe": recipe} | place | ENGINES[engine] | more)

    def go_on(out: str, engine: str, recipe: dict[str, Any], after: str, **more: Any) -> None:
        add(out, engine, recipe, copy_of=str(folder / f"scratch-{after}"), **more)

    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(UntaxedError):
            train(RECIPE, inputs, folder / "stopped-one", folder / "scratch-stopped-one")
    for engine in ONE_TO_TWO:
        go_on(f"one-to-{engine}", engine, RECIPE, "stopped-one")
    for first in dict.fromkeys(first for first, _ in TWO_TO_TWO):
        add(f"stopped-{first}", first, stop_at=STOP)
    for first, second in TWO_TO_TWO:
        go_on(f"{first}-to-{second}", second, RECIPE, f"stopped-{first}")
    for engine in BITWISE:
        for recipe, name in ((DROPOUT, f"{engine}-dropout"), (FULL, f"{engine}-full")):
            add(f"whole-{name}", engine, recipe)
            add(f"stopped-{name}", engine, recipe, stop_at=STOP)
            go_on(f"same-{name}", engine, recipe, f"stopped-{name}")
    for first, second in FULLY:
        go_on(f"{first}-to-{second}-full", second, FULL, f"stopped-{first}-full")
    for method, engine in ODD:
        add(f"stopped-odd-{method}-{engine}", engine, ODDLY[method], stop_at=STOP, inputs=odd)
        name = f"odd-{method}-{engine}"
        go_on(name, engine, ODDLY[method], f"stopped-{name}", inputs=odd)
    launch(runs, inputs, folder)
    for first in TWO_TO_ONE:
        for recipe, name in ((RECIPE, first), (FULL, f"{first}-full")):
            scratch = folder / f"scratch-to-one-{name}"
            shutil.copytree(folder / f"scratch-stopped-{name}", scratch)
            train(recipe, inputs, folder / name.replace(first, f"{first}-to-one"), scratch)
    for method, recipe in ODDLY.items():
        train(recipe, odd, folder / f"odd-{method}-one", folder / f"scratch-odd-{method}-one")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [f"one-to-{engine}" for engine in ONE_TO_TWO]
    + [f"{first}-to-{second}" for first, second in TWO_TO_TWO]
    + [f"{first}-to-{second}-full" for first, second in FULLY]
    + [f"{first}-to-one{method}" for first in TWO_TO_ONE for method in ("", "-full")],
)
def test_another_world_or_engine_goes_on(folder: Path, whole: Path, name: str) -> None:
    """The same rows, and the same loss within 1e-5 (fp32, no dropout)."""
    method = "full" if name.endswith("-full") else "lora"
    expected, got = losses(whole / method), losses(folder / name)
    assert len(got) == len(expected) == STEPS
    assert max(abs(g - e) / e for g, e in zip(got, expected, strict=True)) <= 1e-5
    if "-to-one" not in name:
        facts = json.loads((folder / name / "facts.json").read_text())
        assert facts["world_size"] == 2 and facts["steps"] == STEPS


@pytest.mark.distributed
@pytest.mark.parametrize("engine", BITWISE)
@pytest.mark.parametrize(("method", "file"), [("dropout", ADAPTER), ("full", MODEL)])
def test_the_same_world_goes_on_bitwise(folder: Path, engine: str, method: str, file: str) -> None:
    """LoRA with dropout, and full fine-tuning."""
    whole, same = (folder / f"{run}-{engine}-{method}" for run in ("whole", "same"))
    assert (same / file).read_bytes() == (whole / file).read_bytes()
    assert losses(same) == losses(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", BITWISE)
def test_each_rank_keeps_its_own_shards_of_a_model_that_is_trained_fully(
    folder: Path, engine: str
) -> None:
    (kept,) = (folder / f"scratch-stopped-{engine}-full").glob("checkpoint-*")
    parts = [load_file(path) for path in sorted(kept.glob("*.safetensors"))]
    model = load_file(folder / f"whole-{engine}-full" / MODEL)
    assert len(parts) == 2
    held = [sum(t.numel() for n, t in p.items() if not n.startswith("rng.")) for p in parts]
    three = 3 * sum(t.numel() for t in model.values())  # weights and two moments
    assert three <= sum(held) <= 1.01 * three
    assert max(held) <= 0.55 * three


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "engine"), ODD)
def test_shards_of_unlike_sizes_are_put_together_again(
    folder: Path, method: str, engine: str
) -> None:
    expected, got = (losses(folder / f"odd-{method}-{where}") for where in ("one", engine))
    assert len(got) == len(expected) == STEPS
    assert max(abs(g - e) / e for g, e in zip(got, expected, strict=True)) <= 1e-5


def test_zero_gathers_small_parameters_together_and_large_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zero, "AT_ONCE", 10)
    engine = zero.ZeroEngine(Path())
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 2}
    engine.parameters = {n: SimpleNamespace(ds_numel=size) for n, size in sizes.items()}
    assert [list(batch) for batch in engine._batches()] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_newer_checkpoint_that_is_damaged_does_not_push_out_the_one_just_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (8, 9):
        (tmp_path / f"checkpoint-{step:08d}-0000").mkdir()
    monkeypatch.setattr(checkpoint, "gather_objects", lambda mine: [mine])
    whole = {"w": torch.ones(2)}
    engine = SimpleNamespace(
        sharded=False, trainable_state=lambda keep: whole, optimizer_state=lambda keep: {}
    )
    with checkpoint.Checkpoints(tmp_path, engine, 0) as checkpoints:
        for step in (3, 4, 5):
            checkpoints.save(checkpoint.Position(step, 0, []))
            checkpoints.wait()
            newest = checkpoint.newest(tmp_path, lambda text: None)
            assert newest is not None and newest.name == f"checkpoint-{step:08d}-0000"
    kept = sorted(path.name.split("-")[1].lstrip("0") for path in tmp_path.iterdir())
    assert kept == ["4", "5", "8", "9"]


def test_a_shard_that_does_not_come_is_not_waited_for_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks the other one never writes."""
    monkeypatch.setattr(checkpoint, "gather_objects", lambda mine: [mine, ({}, False)])
    engine = SimpleNamespace(sharded=True, shards=lambda: ({"trainable.w": torch.ones(2)}, {}))
    with checkpoint.Checkpoints(tmp_path, engine, 0) as checkpoints:
        checkpoints.save(checkpoint.Position(1, 0, []))
    assert isinstance(checkpoints.pending.exception(), TimeoutError)
    assert not list(tmp_path.glob("checkpoint-*"))
