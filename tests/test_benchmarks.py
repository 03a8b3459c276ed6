"""The benchmarks stay runnable: all of them by --help, the GPU one on a tiny model on this CPU."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.jobfile import load_job

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
COMMANDS = sorted(p.stem for p in FOLDER.glob("*.py") if "ArgumentParser" in p.read_text())
LIGHT = {"torch", "numpy", "safetensors", "transformers", "peft", "pipeline"}
TINY = "--shape tiny --device cpu --tokens 96 --median 40 --packs 1 --steps 1 --rounds 2 --warmup 1"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the folder import one another, as they do when they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", COMMANDS)
def test_it_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as done:
        importlib.import_module(name).main()
    assert done.value.code == 0
    assert "--json" in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_sft", *options])
    importlib.import_module("gpu_sft").main()


def test_the_gpu_benchmark_trains_alike_in_all_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cells.json"
    run(monkeypatch, *TINY.split(), "--json", str(file))
    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 5
    for cell in cells.values():
        assert len(cell["rounds"]) == 2 and min(cell["rounds"]) > 0
        first = cell["losses"][0]
        assert first == pytest.approx(cells["hf+peft"]["losses"][0], rel=2e-3)
        assert first == pytest.approx(6.3, abs=0.3)  # ln(512) and a little, for random weights
    ours, plain = cells["untaxed"], cells["hf+peft, checkpointing"]
    ratio = ours["tokens_per_second"] / plain["tokens_per_second"]
    assert ours["mfu"] / plain["mfu"] == pytest.approx(ratio)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_its_operations_are_those_that_pytorch_counts(
    tmp_path: Path, cut: bool, again: bool
) -> None:
    """Matrix products of one step; attention on a CPU has products of another kind."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    gpu_sft, gpu_work = (importlib.import_module(name) for name in ("gpu_sft", "gpu_work"))
    shape, given = gpu_work.SHAPES["tiny"], gpu_sft.arguments().parse_args(TINY.split())
    work = gpu_work.make_work(shape, given, tmp_path)
    options = {"cut": cut, "again": again, "compiled": False}
    step = gpu_sft.untaxed(shape, work, torch.device("cpu"), **options)
    with FlopCounterMode(display=False) as counter:
        step(work.steps[0])
    counted = counter.get_flop_counts()["Global"]
    got = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    tokens, _, rows = work.numbers(work.steps[:1])
    first = shape.adapted[0]
    wanted = gpu_work.operations(
        shape, (tokens, 0, rows), first=first if cut else 0, lowest=first, again=again
    )
    # the adapters: two products forward, and backward for both factors and for what is below
    each, low = 2 * tokens * shape.hidden, 2 * tokens * shape.inner
    adapters = (each + low) * (2 + again) * len(shape.adapted) + (each + low) * len(shape.adapted)
    adapters -= each  # nothing below the lowest wants a gradient
    assert got == wanted + adapters


def test_the_gpu_benchmark_needs_three_packages() -> None:
    """And what those need: nothing else of this project's own is imported."""
    waiting, seen = [FOLDER / "gpu_sft.py", FOLDER / "gpu_work.py"], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module, top in imported(path):
            if top in {"gpu_work"} | set(sys.stdlib_module_names):
                continue
            assert top in LIGHT, f"{path.relative_to(ROOT)}: {module}"
            if top == "pipeline":
                inner = ROOT / (module.replace(".", "/") + ".py")
                waiting.append(inner if inner.exists() else ROOT / "pipeline/__init__.py")


def imported(path: Path) -> list[tuple[str, str]]:
    """(module, its top) that are imported as ``path`` is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = itertools.chain(
        (name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names),
        (str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)),
    )
    return [(module, module.partition(".")[0]) for module in modules]


def test_a_goal_is_stated_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--plan")
    assert "24,000 tokens/s are 46.9% MFU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no GPU here"):
        run(monkeypatch)


def test_every_recipe_is_a_job_that_differs_from_the_others(tmp_path: Path) -> None:
    recipes = importlib.import_module("recipes")
    trees = {}
    for recipe in recipes.RECIPES:
        file = tmp_path / f"{recipe.name}.yaml"
        file.write_text(yaml.safe_dump(recipe.tree()))
        trees[recipe.name] = load_job(file).model_dump_json(exclude={"name"})
    assert len(trees) == len(recipes.RECIPES)
    assert len(set(trees.values())) == len(trees)
