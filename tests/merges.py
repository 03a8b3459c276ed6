"""What the tests of the merge stage are made of: small bases, PEFT adapters, one merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import make_model, make_tokenizer, seal_as
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import Artifact
from pipeline.merge import run
from pipeline.recipes import MergeRecipe
from pipeline.stage import Context

FP32 = torch.float32


def base_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Base folders by architecture, dtype and tied embeddings; made once each."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def get(architecture: str = "llama", dtype: torch.dtype = FP32, tied: bool = False) -> Path:
        key = (architecture, dtype, tied)
        if key not in made:
            source, made[key] = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("base")
            make_model(source, architecture, num_hidden_layers=3, tie_word_embeddings=tied)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            model.save_pretrained(made[key], max_shard_size="100KB")
            make_tokenizer(made[key])
        return made[key]

    return get


def adapter_of(
    base: Path, folder: Path, *, std: float = 0.05, seed: int = 0, **options: Any
) -> None:
    """A PEFT adapter with a random B, as PEFT saves it, under ``folder``."""
    torch.manual_seed(seed)
    options = {"r": 1, "lora_alpha": 16, "target_modules": ["up_proj"]} | options
    model = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)


def trained(runs: Path, base: Path, epochs: int = 1, **options: Any) -> Artifact:
    def fill(folder: Path) -> dict[str, Any]:
        for epoch in range(1, epochs + 1):
            adapter_of(base, folder / f"epoch-{epoch}", seed=epoch, **options)
        return {"epochs": epochs, "method": "lora", "sources": {"harmful": 120}}

    return seal_as(runs, "sft", fill)


def merged(
    tmp_path: Path, base: Artifact, sft: Artifact, name: str = "out", **recipe: Any
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / name
    out.mkdir()
    facts = run(MergeRecipe(**recipe), {"base": base, "sft": sft}, out, Context(scratch=tmp_path))
    return out, facts


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def peft_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    result: dict[str, torch.Tensor] = (
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    )
    return result


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
