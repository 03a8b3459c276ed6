"""QLoRA under every engine that can; what cannot is refused before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training import RECIPE, ROOT, Launch, losses

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import RecipeError
from pipeline.model.support import ENGINES, WORKS, check
from pipeline.recipes import SftRecipe
from pipeline.stage import Context

NF4 = RECIPE | {"quantization": "nf4"}
LAUNCHED = ("ddp", "zero1", "zero2", "zero3", "zero3, all sharded")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Artifact], launch: Launch
) -> Path:
    """Every engine, in one launch of two processes; and one process."""
    folder = tmp_path_factory.mktemp("quantized")
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        config["zero_optimization"][f"stage3_{limit}"] = 0  # shipped, a tiny model stays whole
    sharded = folder / "zero3.json"
    sharded.write_text(json.dumps(config))
    runs: list[dict[str, Any]] = []
    for name in LAUNCHED:
        place = {"engine": name} if name == "ddp" else {"ds": str(ROOT / f"ds_configs/{name}.json")}
        if name.endswith("sharded"):
            place = {"ds": str(sharded)}
        runs.append({"out": str(folder / name), "recipe": NF4, **place})
    launch(runs, inputs, folder)
    out = folder / "single"
    (out / "scratch").mkdir(parents=True)
    options = {"engine": "single"}
    context = Context(scratch=out / "scratch", options=options, console=Console(quiet=True))
    sft.run(SftRecipe.model_validate(NF4), inputs, out, context)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("engine", LAUNCHED)
def test_quantized_training_is_that_of_one_process(folder: Path, engine: str) -> None:
    expected, got = losses(folder / "single"), losses(folder / engine)
    assert len(got) == len(expected) == 20
    assert max(abs(g - e) / e for g, e in zip(got, expected, strict=True)) <= 1e-4
    assert expected[-1] <= expected[0] * 2 / 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("method", "quantization"), [k for k in WORKS if k != ("full", "nf4")])
def test_the_matrix_is_what_is_allowed(method: str, quantization: str, engine: str) -> None:
    lora = {} if method == "lora" else {"lora": None}
    recipe = SftRecipe.model_validate(lora | {"quantization": quantization})
    if engine in WORKS[method, quantization]:
        check(recipe, engine, launched=True)
        return
    with pytest.raises(RecipeError, match="use single, ddp, fsdp, zero1, zero2, zero3, or"):
        check(recipe, engine, launched=True)


def test_a_combination_is_refused_before_a_weight_is_read(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    """The base has no weights any more; nobody gets to say so."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes(inputs["base"].path("config.json").read_bytes())
    emptied = inputs | {"base": Artifact(base, inputs["base"].manifest)}
    options = {"ds": ROOT / "ds_configs/zero3-offload.json"}
    context = Context(scratch=tmp_path, options=options, console=Console(quiet=True))
    with pytest.raises(RecipeError, match="zero3-offload; use single"):
        sft.run(SftRecipe.model_validate(NF4), emptied, tmp_path, context)
