"""One model in memory that becomes each merged model in turn, against the files that merge writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merges import base_folders, merged, tensors_of, trained
from parts import adopt_folder, seal_as
from safetensors.torch import save_file

from pipeline import artifact as art
from pipeline.errors import DataError, RecipeError
from pipeline.evals.score import load_for_inference
from pipeline.model.epochs import open_epochs
from pipeline.model.inplace import InPlace


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return base_folders(tmp_path_factory)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(600, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{"layers_to_transform": [1]}, {"r": 4, "target_modules": "all-linear"}],
    ids=["rank1-one-layer", "rank4-all"],
)
def test_it_is_bit_for_bit_what_merge_writes(
    tmp_path: Path, runs: Path, folders, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    source = folders(dtype=dtype)
    base, sft = adopt_folder(runs, source), trained(runs, source, epochs=2, **options)
    epochs = open_epochs(base, sft)
    model = load_for_inference(base.folder)
    before, answers = weights(model), logits(model)
    variants = InPlace(model, epochs.checkpoint)
    variants.become(None)
    assert same(weights(model), before)
    for number, (epoch, scale) in enumerate([(1, 1.0), (2, 0.5), (1, 1.25), (2, 1.0)]):
        survival = variants.become(epochs.plan(epoch, scale))
        out, facts = merged(tmp_path, base, sft, f"out{number}", epoch=epoch, scale=scale)
        written = load_for_inference(out)
        assert same(weights(model), weights(written))
        assert torch.equal(logits(model), logits(written))
        assert not torch.equal(logits(model), answers)
        assert survival.share == pytest.approx(facts["survival"], rel=1e-9)
    variants.become(None)
    assert same(weights(model), before)
    assert torch.equal(logits(model), answers)
    assert art.verify(base.folder) == len(base.manifest.files)


def test_switching_leaves_no_trace(runs: Path, folders) -> None:
    """Each point is what it is when it is the first; also after one that touched other weights."""
    source = folders(dtype=torch.bfloat16)
    base = adopt_folder(runs, source)
    wide, narrow = (
        open_epochs(base, trained(runs, source, **options))
        for options in ({"target_modules": "all-linear"}, {"layers_to_transform": [2]})
    )
    plans = [wide.plan(1, 1.0), narrow.plan(1, 0.5), narrow.plan(1, 1.0)]
    alone = []
    for plan in plans:
        model = load_for_inference(base.folder)
        InPlace(model, wide.checkpoint).become(plan)
        alone.append(logits(model))
    model = load_for_inference(base.folder)
    variants = InPlace(model, wide.checkpoint)
    for which in (0, 1, 2, 0, 2, 1, 1, 0):
        variants.become(plans[which])
        assert torch.equal(logits(model), alone[which]), which


def test_epochs_of_full_fine_tuning(tmp_path: Path, runs: Path, folders) -> None:
    source = folders("llama", torch.bfloat16, tied=True)
    base = adopt_folder(runs, source)

    def fill(folder: Path) -> dict[str, Any]:
        for epoch, factor in ((1, 1.05), (2, 0.9)):
            (folder / f"epoch-{epoch}").mkdir()
            tensors = {name: tensor.float() * factor for name, tensor in tensors_of(source).items()}
            save_file(tensors, folder / f"epoch-{epoch}" / "model.safetensors")
        return {"epochs": 2, "method": "full"}

    epochs = open_epochs(base, seal_as(runs, "sft", fill))
    model = load_for_inference(base.folder)
    before, variants = weights(model), InPlace(model, epochs.checkpoint)
    for epoch, factor in ((2, 0.9), (1, 1.05)):
        variants.become(epochs.plan(epoch, 1.0))
        want = {name: (tensor.float() * factor).bfloat16() for name, tensor in before.items()}
        assert same(weights(model), want)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    variants.become(None)
    assert same(weights(model), before)
    with pytest.raises(RecipeError, match=r"=0\.5 needs an adapter"):
        epochs.plan(1, 0.5)


def test_what_cannot_be_is_refused(runs: Path, folders) -> None:
    source = folders(dtype=torch.bfloat16)
    base, sft = adopt_folder(runs, source), trained(runs, source)
    epochs = open_epochs(base, sft)
    model = load_for_inference(base.folder)
    with pytest.raises(DataError, match=r"is not finite as torch\.bfloat16 with the update; lower"):
        InPlace(model, epochs.checkpoint).become(epochs.plan(1, 1e38))
    other = torch.nn.Linear(2, 2)
    with pytest.raises(DataError, match=r"up_proj\.weight has another name in the loaded model"):
        InPlace(other, epochs.checkpoint).become(epochs.plan(1, 1.0))
    path = sft.folder / "epoch-1" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DataError, match="content changed since it was sealed; run sft with"):
        open_epochs(base, sft).plan(1, 1.0)
