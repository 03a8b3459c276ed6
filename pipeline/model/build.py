"""From base artifact and recipe to the model that is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifact import Artifact
from pipeline.errors import RecipeError, UntaxedError
from pipeline.model import lora
from pipeline.model.attention import choose
from pipeline.model.base import load_model
from pipeline.model.cut import drop_prefix
from pipeline.model.shards import open_checkpoint
from pipeline.recipes import Execution, SftRecipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    base: Artifact, recipe: SftRecipe, execution: Execution, cut: int = 0
) -> tuple[nn.Module, dict[str, lora.LoraLinear]]:
    """The base from layer ``cut`` on, with what is trained in it: adapters by name, or nothing for
    full fine-tuning.

    Frozen weights have the recipe's precision; what is trained is fp32.
    """
    dtype = torch.float32 if recipe.lora is None else DTYPES[recipe.precision]
    options: dict[str, Any] = {}
    if recipe.quantization == "nf4":
        options["quantization_config"] = quantization(dtype)
    model = load_model(base.folder, dtype, **options)
    model.set_attn_implementation(choose(model.config, bf16=dtype == torch.bfloat16))
    adapted: dict[str, lora.LoraLinear] = {}
    if recipe.lora is None:
        model.requires_grad_(True)
    else:
        adapted = lora.inject(model, recipe.lora, recipe.seed, _weights_of(base.folder))
    drop_prefix(model, cut)
    if execution.activation_checkpointing is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers asks the embedding output for gradients, which would send backward through
        # every frozen layer below the first adapter; non-reentrant checkpointing needs none of it
        model.disable_input_require_grads()
    model.train()
    return model, adapted


def check_dtypes(model: nn.Module, recipe: SftRecipe) -> None:
    """UntaxedError when an engine has changed a precision: frozen weights have the recipe's, adapters
    are fp32. (Quantized weights have none; in full fine-tuning the engine holds its own copies.)"""
    if recipe.lora is None or recipe.quantization != "none":
        return
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else DTYPES[recipe.precision]
        if parameter.dtype != wanted:
            raise UntaxedError(
                f"sft: {name} became {parameter.dtype} under this engine, wanted {wanted};"
                " nothing was trained"
            )


def quantization(compute: torch.dtype) -> Any:
    """NF4 for transformers, multiplied in ``compute``; RecipeError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401  (only to say clearly that it is missing)
        from transformers import BitsAndBytesConfig
    except ImportError:
        raise RecipeError(
            "sft.quantization: nf4 needs bitsandbytes; run: pip install bitsandbytes"
        ) from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # a floating storage is what FSDP can shard
        bnb_4bit_use_double_quant=False,
    )


def _weights_of(folder: Path) -> Callable[[str], Tensor]:
    """Reads one module's weight from the base's files, whatever the engine has sharded away."""
    checkpoint = open_checkpoint(folder)
    return lambda name: checkpoint.read(f"{name}.weight")
