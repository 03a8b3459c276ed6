"""Which engine may train what; what cannot is refused before a weight is read.

That QLoRA trains alike under every engine that can is shown in test_engines.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from training import RECIPE, ROOT

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.errors import RecipeError
from pipeline.model.support import ENGINES, WORKS, check
from pipeline.recipes import SftRecipe
from pipeline.stage import Context

NF4 = RECIPE | {"quantization": "nf4"}


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
