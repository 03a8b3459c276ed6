"""What trains with what: method x quantization x engine, the one place that says so. Torch-free.

Asked before a model is loaded. All of NF4 and of LoRA has been run on CPUs, but for offload; of full
fine-tuning one process, FSDP2 and ZeRO-3 (tests/train/test_engines.py).
"""

from __future__ import annotations

from pipeline.errors import RecipeError
from pipeline.recipes import SftRecipe

ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3-offload")
WITH_NF4 = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
WORKS: dict[tuple[str, str], tuple[str, ...]] = {
    ("lora", "none"): ENGINES,
    ("lora", "nf4"): WITH_NF4,
    ("full", "none"): ENGINES,
    ("full", "nf4"): (),  # the recipe itself refuses it
}


def check(recipe: SftRecipe, engine: str, *, launched: bool) -> None:
    """RecipeError, naming what works, where ``engine`` cannot train ``recipe``; ``launched``: whether
    this process has joined a group."""
    if engine == "fsdp" and not launched:
        raise RecipeError("engine fsdp needs a process group; start with torchrun")
    works = WORKS["full" if recipe.lora is None else "lora", recipe.quantization]
    if engine in works:
        return
    method = "full fine-tuning" if recipe.lora is None else "LoRA"
    raise RecipeError(
        f"sft.quantization={recipe.quantization}: {method} on it does not work with the engine"
        f" {engine}; use {', '.join(works)}, or sft.quantization=none"
    )
