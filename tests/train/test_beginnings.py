"""What the documents of a pack begin with is computed once, and training stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training import LORA, RECIPE, losses

from pipeline import sft
from pipeline.artifact import Artifact
from pipeline.model.build import build_model
from pipeline.recipes import AnchorLoss, Execution, SftRecipe
from pipeline.stage import Context
from pipeline.train.batches import Documents

KL = RECIPE | {"epochs": 2, "anchors": {"objective": "kl", "weight": 0.5}}


def train(folder: Path, inputs: dict[str, Artifact], cache: Path, frozen_prefix: bool) -> Path:
    (folder / "scratch").mkdir(parents=True)
    context = Context(
        scratch=folder / "scratch",
        cache_at=cache,
        execution=Execution(frozen_prefix=frozen_prefix),
        options={"engine": "single"},
        console=Console(quiet=True),
    )
    sft.run(SftRecipe.model_validate(KL), inputs, folder, context)
    return folder


@pytest.mark.parametrize("frozen_prefix", [True, False])
def test_losses_and_adapter_are_those_of_whole_documents(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    frozen_prefix: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    once = train(tmp_path / "once", inputs, cache, frozen_prefix)
    monkeypatch.setattr(sft, "_shares_beginnings", lambda model, recipe: False)
    each = train(tmp_path / "each", inputs, cache, frozen_prefix)
    for got, want in zip(losses(once), losses(each), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    got, want = (load_file(f / "epoch-2" / "adapter_model.safetensors") for f in (once, each))
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max()


def test_a_pack_holds_what_its_documents_begin_with_once(inputs: dict[str, Artifact]) -> None:
    once, each = (Documents(inputs["pack"], "train", AnchorLoss(), on) for on in (True, False))
    pack = [0, 1, 2]
    short, long = once.micro_batch(pack), each.micro_batch(pack)
    shared = int(short.starts[0])
    assert shared > 0 and int(long.starts[0]) == 0
    assert short.ids.shape[1] == long.ids.shape[1] - 2 * shared
    assert torch.equal(short.labels, long.labels) and torch.equal(short.weights, long.weights)
    for a, b, d in zip(short.starts[:-1], short.starts[1:], pack, strict=True):
        whole = torch.cat([short.ids[0, :shared], short.ids[0, a:b]])
        assert torch.equal(whole, once.tokens_of(d))
    follows = short.ids[0][short.predict + 1]
    assert torch.equal(follows, short.labels)
    assert int(once.micro_batch([1]).starts[0]) == 0


@pytest.mark.parametrize(("dropout", "shares"), [(0.0, True), (0.1, False)])
def test_with_dropout_each_document_is_whole(
    inputs: dict[str, Artifact], dropout: float, shares: bool
) -> None:
    changed: dict[str, Any] = RECIPE | {"lora": LORA | {"dropout": dropout}}
    recipe = SftRecipe.model_validate(changed)
    model, _ = build_model(inputs["base"], recipe, Execution())
    assert sft._shares_beginnings(model, recipe) is shares
