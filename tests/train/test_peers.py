"""Our training against TRL and PEFT: the same rows and start give the same losses and adapter."""

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
from pipeline.model import lora
from pipeline.model.base import load_model, load_tokenizer
from pipeline.model.build import build_model
from pipeline.recipes import AnchorLoss, Execution, LoraRecipe, SftRecipe
from pipeline.stage import Context
from pipeline.train.batches import Documents, load_steps

CONSTANT = {"optimizer": {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.0}}
SFT = SftRecipe.model_validate(RECIPE | CONSTANT)


def start_adapter(folder: Path, inputs: dict[str, Artifact]) -> None:
    """The adapter that training starts from, as PEFT reads it. Its B is zero, so save() refuses."""
    from safetensors.torch import save_file

    assert SFT.lora is not None
    model, adapted = build_model(inputs["base"], SFT, Execution())
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    config = lora.adapter_config(SFT.lora, adapted, "")
    lora.save(folder, {n: t + 1.0 for n, t in lora.export(adapted, state).items()}, config, "")
    save_file(lora.export(adapted, state), folder / "adapter_model.safetensors")


def rows_in_order(inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    """Every document of every step, in order, as input_ids and labels."""
    documents = Documents(inputs["pack"], "train", AnchorLoss())
    rows = []
    for step in (step for epoch in load_steps(inputs["pack"]) for step in epoch):
        for d in step:
            span = slice(int(documents.starts[d]), int(documents.starts[d + 1]))
            ids, trained = documents.ids[span].tolist(), documents.trained[span].tolist()
            labels = [t if on else -100 for t, on in zip(ids, trained, strict=True)]
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def test_losses_and_adapter_are_those_of_trl(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    from datasets import Dataset
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    ours = tmp_path / "ours"
    ours.mkdir()
    context = Context(scratch=tmp_path, options={"engine": "single"}, console=Console(quiet=True))
    sft.run(SFT, inputs, ours, context)
    start_adapter(tmp_path / "start", inputs)
    base = load_model(inputs["base"].folder, torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        processing_class=load_tokenizer(inputs["base"].folder),
        train_dataset=Dataset.from_list(rows_in_order(inputs)),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=4,
            max_steps=20,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    got = losses(ours)
    assert len(got) == len(expected) == 20
    assert got[-1] < 0.8 * got[0]
    assert max(abs(g - e) / e for g, e in zip(got, expected, strict=True)) <= 1e-4
    trained = load_file(ours / "epoch-10" / "adapter_model.safetensors")
    peers = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(peers) == len(trained)
    for name, tensor in trained.items():
        peer = peers[name.replace(".weight", ".default.weight")]
        assert (tensor - peer).abs().mean() <= 1e-2 * peer.abs().mean(), name


@pytest.mark.parametrize("policy", ["fixed", "proportional", "rslora"])
@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
def test_the_exported_adapter_is_what_was_trained(
    tmp_path: Path, inputs: dict[str, Artifact], init: str, policy: str
) -> None:
    """Our live model and PEFT with our file give the same logits; before training, the base's."""
    from peft import PeftModel

    recipe = SFT.model_copy(
        update={"lora": LoraRecipe.model_validate(LORA | {"init": init, "alpha_policy": policy})}
    )
    assert recipe.lora is not None
    model, adapted = build_model(inputs["base"], recipe, Execution())
    model.eval()
    ids = torch.arange(3, 43)[None]
    plain = load_model(inputs["base"].folder, torch.float32)
    with torch.no_grad():
        untouched = plain(ids).logits
        scale = untouched.abs().max()
        assert (model(ids).logits - untouched).abs().max() <= 1e-5 * scale
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * noise
        moved = model(ids).logits
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    config = lora.adapter_config(recipe.lora, adapted, "")
    lora.save(tmp_path / "adapter", lora.export(adapted, state), config, inputs["base"].digest)
    peer = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = peer(ids).logits
    assert (moved - untouched).abs().max() > 1e-2 * scale
    assert (moved - expected).abs().max() <= 1e-5 * expected.abs().max()
