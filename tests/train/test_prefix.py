"""The frozen prefix: cut off, cached, lost or damaged, training stays what it is with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parts import adopt_folder, make_model, make_tokenizer
from training import KL, LORA, RECIPE, losses, make_pack, train
from transformers import AutoConfig

from pipeline.artifact import Artifact
from pipeline.model.build import build_model
from pipeline.model.geometry import cut_of
from pipeline.recipes import AnchorLoss, Execution, SftRecipe
from pipeline.train.batches import Documents
from pipeline.train.loss import SftModule

ADAPTER = "epoch-2/adapter_model.safetensors"
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
}


def relative(got: list[float], expected: list[float]) -> float:
    return max(abs(g - e) / e for g, e in zip(got, expected, strict=True))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """A tiny random model of one architecture, and packed rows."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder / "base", request.param, **FAMILIES[request.param])
    make_tokenizer(folder / "base")
    base = adopt_folder(folder, folder / "base")
    return {"base": base, "pack": make_pack(folder, base, epochs=2)}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_loss_is_that_of_the_whole_model(
    tmp_path: Path, family: dict[str, Artifact], quantization: str
) -> None:
    recipe = KL | {"quantization": quantization}
    cache = tmp_path / "cache"
    whole = train(tmp_path / "whole", family, recipe, cache, frozen_prefix=False)
    assert not list(cache.glob("prefix-*"))
    cut = train(tmp_path / "cut", family, recipe, cache)
    assert len(list(cache.glob("prefix-*"))) == 1
    again = train(tmp_path / "again", family, recipe, cache, activation_checkpointing=True)
    assert len(losses(whole)) == 4
    assert losses(again) == losses(cut)
    assert relative(losses(cut), losses(whole)) <= 1e-5


def test_a_lost_damaged_or_missing_cache_changes_no_bit(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    cache = tmp_path / "cache"
    first = (train(tmp_path / "first", inputs, KL, cache) / ADAPTER).read_bytes()
    (folder,) = cache.glob("prefix-*")
    states = folder / "hidden.bin"
    whole = states.read_bytes()
    assert any(whole)

    def again(name: str, **execution: Any) -> bytes:
        return (train(tmp_path / name, inputs, KL, cache, **execution) / ADAPTER).read_bytes()

    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    states.write_bytes(damaged)
    assert again("damaged") == first
    assert states.read_bytes() == whole  # made again
    states.unlink()
    assert again("lost") == first
    assert again("none", prefix_cache_gb=0.0) == first
    assert again("some", prefix_cache_gb=len(whole) / 2 / 1e9) == first


def test_jobs_share_a_cache_and_old_ones_make_room(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.model.prefix import Prefix

    cache = tmp_path / "cache"
    train(tmp_path / "first", inputs, KL, cache)
    (folder,) = cache.glob("prefix-*")
    size = sum(f.stat().st_size for f in folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "run", lambda self, documents: pytest.fail("run again"))
        other = KL | {"optimizer": {"learning_rate": 0.01}, "lora": LORA | {"rank": 1}}
        train(tmp_path / "other", inputs, other, cache)
    foreign = cache / "prefix-tuning"
    foreign.mkdir()
    (foreign / "work").write_bytes(bytes(2 * size))
    train(tmp_path / "none", inputs, KL, cache, prefix_cache_gb=0.0)
    assert folder.exists(), "a job that wants no cache leaves those of others"
    higher = KL | {"lora": LORA | {"layers": {"first": 3, "last": 4}}}
    train(tmp_path / "higher", inputs, higher, cache, prefix_cache_gb=1.5 * size / 1e9)
    assert not folder.exists() and foreign.exists()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_backward_stops_at_the_lowest_adapted_layer(
    inputs: dict[str, Artifact], checkpointing: bool
) -> None:
    """And its gradients are, to the bit, those of a backward pass through everything."""
    recipe = SftRecipe.model_validate(RECIPE)
    documents = Documents(inputs["pack"], "train", AnchorLoss())
    batch = documents.micro_batch([0, 1, 2])
    gradients: list[dict[str, torch.Tensor]] = []
    for everything in (False, True):
        execution = Execution(activation_checkpointing=checkpointing)
        model, _ = build_model(inputs["base"], recipe, execution)
        if everything:
            model.enable_input_require_grads()
        visited: set[int] = set()
        for index, layer in enumerate(model.model.layers):
            layer.register_full_backward_hook(lambda *_, i=index, seen=visited: seen.add(i))
        SftModule(model)(batch)[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert visited == (set(range(6)) if everything else {1, 2, 3, 4, 5})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"lora": None}, {}, "full fine-tuning"),
        ({"lora": LORA | {"layers": {}}}, {}, "layer 0 is adapted"),
        ({}, {"attention_dropout": 0.1}, "dropout of its own"),
        ({}, {"model_type": "gpt_neox"}, "architecture gpt_neox"),
    ],
)
def test_it_says_why_nothing_is_cut_off(
    change: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    shapes = AutoConfig.for_model(**{"model_type": "llama", "num_hidden_layers": 6} | config)
    cut, why = cut_of(shapes.to_dict(), SftRecipe.model_validate(RECIPE | change))
    assert cut == 0 and words in why
