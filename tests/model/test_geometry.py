"""Counts from shapes, held against transformers models built without memory (meta device)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, RecipeError
from pipeline.jobfile import load_job
from pipeline.model.geometry import (
    cache_bytes_per_token,
    geometry_of,
    layer_parameters,
    linear_shapes,
    lora_parameters,
    plan_facts,
    total_parameters,
)
from pipeline.recipes import Geometry, Job, Layers, LoraRecipe

ROOT = Path(__file__).resolve().parents[2]
# as the models' own pages and checkpoint indexes state them
PUBLISHED = {
    "r1-qwen-7b": 7_615_616_512,
    "r1-qwen-14b": 14_770_033_664,
    "r1-qwen-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "yi-1.5-34b": 34_388_917_248,
    "star1-smollm2": 134_515_008,
}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def meta_model(geometry: Geometry) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        geometry.architecture,
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        tie_word_embeddings=geometry.tied_embeddings,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def job(name: str) -> Job:
    return load_job(ROOT / "jobs" / f"{name}.yaml")


def shapes(name: str) -> Geometry:
    geometry = job(name).base.geometry
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_models_have_their_published_size(name: str) -> None:
    model = meta_model(shapes(name))
    count = sum(p.numel() for p in model.parameters())
    assert total_parameters(shapes(name)) == count == PUBLISHED[name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_architecture_is_counted_exactly(architecture: str, tied: bool) -> None:
    config = SMALL | {"model_type": architecture, "tie_word_embeddings": tied}
    geometry = geometry_of(config)
    model = meta_model(geometry)
    assert total_parameters(geometry) == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert layer_parameters(geometry) == sum(p.numel() for p in layer.parameters())
    for name, shape in linear_shapes(geometry).items():
        assert dict(layer.named_parameters())[_parameter(layer, name)].shape == shape


def _parameter(layer: Any, name: str) -> str:
    return next(n for n, _ in layer.named_parameters() if n.endswith(f"{name}.weight"))


def test_a_config_of_transformers_gives_its_geometry() -> None:
    config = meta_model(shapes("qwen3-8b")).config.to_dict()
    assert geometry_of(config) == shapes("qwen3-8b")


def test_defaults_that_a_config_may_leave_out() -> None:
    config = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    geometry = geometry_of(config | {"model_type": "llama"})
    assert (geometry.kv_heads, geometry.head_dim, geometry.tied_embeddings) == (6, 8, False)


def test_the_example_of_the_paper_has_its_published_count() -> None:
    recipe = LoraRecipe(rank=1, targets=("up_proj",), layers=Layers(first=16, last=31))
    assert lora_parameters(shapes("r1-qwen-14b"), recipe) == 303_104


@pytest.mark.parametrize("targets", ["all-linear", "mlp", "attention", ("up_proj", "o_proj")])
@pytest.mark.parametrize("rank", [1, 8])
def test_adapters_are_counted_as_peft_makes_them(targets: Any, rank: int) -> None:
    from peft import LoraConfig, get_peft_model

    geometry = geometry_of(SMALL | {"model_type": "qwen2"})
    recipe = LoraRecipe(rank=rank, targets=targets, layers=Layers(first=1, last=2))
    config = LoraConfig(
        r=rank,
        target_modules=list(recipe.modules),
        layers_to_transform=list(recipe.layers.select(geometry.layers)),
        layers_pattern="layers",
    )
    model = get_peft_model(meta_model(geometry), config, low_cpu_mem_usage=True)
    assert lora_parameters(geometry, recipe) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_trains_what_peft_would(path: Path) -> None:
    """Trainable parameters and adapted layers, on a model of the job's own shapes."""
    from peft import LoraConfig, get_peft_model

    loaded = load_job(path)
    geometry, recipe = loaded.base.geometry, loaded.sft.lora
    if geometry is None or recipe is None:
        pytest.skip(f"{path.name} states no shapes, or trains all parameters")
    config = LoraConfig(
        r=recipe.rank,
        target_modules=list(recipe.modules),
        layers_to_transform=list(recipe.layers.select(geometry.layers)),
        layers_pattern="layers",
    )
    model = get_peft_model(meta_model(geometry), config, low_cpu_mem_usage=True)
    facts = plan_facts(loaded)
    assert facts["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    adapted = {int(n.split(".layers.")[1].split(".")[0]) for n, p in trainable(model)}
    assert sorted(adapted) == list(range(facts["first_layer"], facts["last_layer"] + 1))
    assert facts["adapted_layers"] == len(adapted)


def trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_a_cache_holds_the_bytes_that_are_planned() -> None:
    """One token through a small bf16 model, and what its cache then holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.for_model("qwen3", **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = DynamicCache()
    model(torch.tensor([[1]]), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for c in cache.layers for t in (c.keys, c.values))
    assert cache_bytes_per_token(geometry_of(SMALL | {"model_type": "qwen3"})) == held


def test_the_small_jobs_state_the_shapes_that_their_weights_have() -> None:
    reader = gguf_reader()
    geometry = shapes("star1-smollm2")
    assert geometry == shapes("refusals-smollm2")

    def field(name: str) -> int:
        return int(reader.fields[f"llama.{name}"].contents())

    assert field("embedding_length") == geometry.hidden_size
    assert field("feed_forward_length") == geometry.intermediate_size
    assert field("block_count") == geometry.layers
    assert field("attention.head_count") == geometry.heads
    assert field("attention.head_count_kv") == geometry.kv_heads
    assert field("vocab_size") == geometry.vocab_size
    names = {tensor.name for tensor in reader.tensors}
    assert geometry.tied_embeddings is ("output.weight" not in names)


def gguf_reader() -> Any:
    from gguf import GGUFReader

    from pipeline.model.base import _wheel_file

    try:
        return GGUFReader(_wheel_file(job("star1-smollm2").base.source))
    except DataError as error:
        pytest.skip(str(error))


def test_a_plan_states_what_will_be_trained() -> None:
    assert plan_facts(job("r1-qwen-14b")) == {
        "parameters": 14_770_033_664,
        "parameters_per_layer": 275_268_608,
        "weights_bytes_bf16": 29_540_067_328,
        "cache_bytes_per_token_bf16": 196_608,
        "method": "lora",
        "trainable_parameters": 303_104,
        "adapted_modules": 16,
        "adapted_layers": 16,
        "first_layer": 16,
        "last_layer": 31,
        "update_scale": 16.0,
    }


def test_full_fine_tuning_trains_everything() -> None:
    full = load_job(ROOT / "jobs" / "r1-qwen-7b.yaml", ("sft.lora=null",))
    facts = plan_facts(full)
    assert facts["method"] == "full"
    assert facts["trainable_parameters"] == facts["parameters"] == PUBLISHED["r1-qwen-7b"]


def test_without_shapes_nothing_is_claimed_and_the_adopted_base_comes_first() -> None:
    small = load_job(ROOT / "jobs" / "refusals-smollm2.yaml", ("base.geometry=null",))
    assert plan_facts(small) == {}
    adopted = geometry_of(SMALL | {"model_type": "llama"})
    assert plan_facts(small, adopted)["parameters"] == total_parameters(adopted)
    assert plan_facts(job("qwen3-8b"), adopted)["parameters"] == total_parameters(adopted)


BROKEN = {
    "another architecture": ({"model_type": "gpt2"}, "model_type 'gpt2'; shapes are known for"),
    "no architecture": ({"model_type": None}, "model_type None"),
    "a bias": ({"attention_bias": True}, "attention_bias=true is not counted"),
    "a missing size": ({"vocab_size": ...}, "vocab_size is missing"),
    "a size of zero": ({"num_hidden_layers": 0}, "a size is not a positive number"),
    "no heads": ({"num_attention_heads": "many"}, "a size is not a positive number"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_config_that_cannot_be_counted(change: dict[str, Any], message: str) -> None:
    config = SMALL | {"model_type": "llama"} | change
    with pytest.raises(DataError, match=re.escape(message)):
        geometry_of({k: v for k, v in config.items() if v is not ...})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LoraRecipe(targets=("up_porj",)), "up_porj matches no linear module"),
        (LoraRecipe(layers=Layers(first=0, last=3)), "sft.lora.layers.last=3 is out of range"),
        (LoraRecipe(rank=64), "sft.lora.rank=64 is above the size of up_proj"),
    ],
)
def test_a_recipe_that_does_not_fit(recipe: LoraRecipe, message: str) -> None:
    geometry = geometry_of(SMALL | {"model_type": "llama"})
    with pytest.raises(RecipeError, match=message):
        lora_parameters(geometry, recipe)
