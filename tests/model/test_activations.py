"""What the planner says is kept for backward, against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeline.model import lora
from pipeline.model.activations import Row, around, layer_input, saved
from pipeline.model.attention import choose
from pipeline.model.cut import drop_prefix
from pipeline.model.geometry import geometry_of
from pipeline.recipes import SftRecipe

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TARGETS: tuple[Any, ...] = ("all-linear", "mlp", "attention", ["up_proj"], ["q_proj", "o_proj"])
TOKENS, LAYERS = 64, 4


def kept_by_autograd(config: Any, recipe: SftRecipe, cut: int, checkpointing: bool) -> int:
    """Bytes of all storages that a forward pass leaves for backward, parameters not counted."""
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.precision]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(choose(config, bf16=dtype == torch.bfloat16))
    assert recipe.lora is not None
    lora.inject(model, recipe.lora, 0, lambda name: torch.empty(0))
    drop_prefix(model, cut)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            found[storage.data_ptr()] = tensor
        return tensor

    states = torch.randn(1, TOKENS, config.hidden_size, dtype=dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(
            inputs_embeds=states,
            position_ids=torch.arange(TOKENS)[None],
            use_cache=False,
            document_starts=torch.tensor([0, 20, TOKENS]),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def config_of(family: str, **change: Any) -> Any:
    from transformers import AutoConfig

    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": None,
    }
    return AutoConfig.for_model(family, **(shape | change))


def recipe_of(precision: str, targets: Any, **change: Any) -> SftRecipe:
    adapter = {"rank": 2, "targets": targets, "layers": {"first": 1, "last": 2}} | change
    return SftRecipe.model_validate({"precision": precision, "lora": adapter})


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_kept_is_counted(family: str, precision: str, targets: Any) -> None:
    config, recipe = config_of(family), recipe_of(precision, targets)
    row = Row(TOKENS, 2 if precision == "bf16" else 4)
    geometry = geometry_of(config.to_dict())
    planned = sum(saved(geometry, recipe, range(1, LAYERS), row)) + around(geometry, row, True)
    assert planned == kept_by_autograd(config, recipe, 1, False)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_dropout_in_the_adapter_is_counted(precision: str) -> None:
    config, recipe = config_of("llama"), recipe_of(precision, "all-linear", dropout=0.1)
    row = Row(TOKENS, 2 if precision == "bf16" else 4)
    geometry = geometry_of(config.to_dict())
    planned = sum(saved(geometry, recipe, range(1, LAYERS), row)) + around(geometry, row, True)
    assert planned == kept_by_autograd(config, recipe, 1, False)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_linear_keeps_under_zero3_is_counted(
    precision: str, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    config, recipe = config_of("llama"), recipe_of(precision, targets)
    row = Row(TOKENS, 2 if precision == "bf16" else 4, linear_inputs=True)
    geometry = geometry_of(config.to_dict())
    planned = sum(saved(geometry, recipe, range(1, LAYERS), row)) + around(geometry, row, True)
    assert planned == kept_by_autograd(config, recipe, 1, False)


def test_a_sliding_window_is_counted_with_a_mask_a_layer() -> None:
    config, recipe = config_of("mistral", sliding_window=16), recipe_of("bf16", ["up_proj"])
    row = Row(TOKENS, 2, masked=True)
    geometry = geometry_of(config.to_dict())
    planned = sum(saved(geometry, recipe, range(1, LAYERS), row)) + around(geometry, row, True)
    assert planned == kept_by_autograd(config, recipe, 1, False)


def test_a_checkpointed_layer_keeps_its_input() -> None:
    """And the final norm its own; the rotation is held by the layer's arguments, not by autograd."""
    config, recipe = config_of("llama"), recipe_of("bf16", ["up_proj"])
    row = Row(TOKENS, 2)
    geometry = geometry_of(config.to_dict())
    planned = (LAYERS - 1) * layer_input(geometry, row) + around(geometry, row, False)
    assert kept_by_autograd(config, recipe, 1, True) == planned
