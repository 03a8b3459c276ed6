"""One run of one training system, for benchmarks/sft.py: SYSTEM SPEC.json, under any launcher.

Each rank writes result-RANK.json: seconds from the first step (with what has to be done before it)
to the end, of the first epoch and of the later ones, and the peak resident bytes meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from pipeline import artifact as art
from pipeline.model.products import use_fp32_products


class Clock:
    """Wall-clock times of the start, and of the end of every optimiser step; peak memory between."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.begin()

    def begin(self) -> None:
        self.started = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def tick(self) -> None:
        self.steps.append(time.perf_counter())

    def result(self, spec: dict[str, Any], losses: list[float]) -> dict[str, Any]:
        an_epoch = len(self.steps) // spec["epochs"]
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        return {
            "seconds": self.steps[-1] - self.started,
            "first_epoch_seconds": self.steps[an_epoch - 1] - self.started,
            "later_seconds": self.steps[-1] - self.steps[an_epoch - 1],
            "steps": len(self.steps),
            "peak_bytes": peak * 1024,
            "losses": [losses[0], losses[-1]],
        }


def untaxed(spec: dict[str, Any], **execution: Any) -> dict[str, Any]:
    from rich.console import Console

    from pipeline import sft
    from pipeline.recipes import Execution, SftRecipe
    from pipeline.stage import Context, Solo
    from pipeline.train.world import DistributedWorld

    world = sft.join(always=spec["engine"] != "single") or Solo()
    clock, losses = Clock(), []

    class Timed(Context):
        def metric(self, step: int, values: Any) -> None:
            if "loss" in values:
                clock.tick()
                losses.append(values["loss"])

    built = sft.build_model

    def timed_build(*arguments: Any) -> Any:
        made = built(*arguments)
        clock.begin()
        return made

    sft.build_model = timed_build
    scratch = Path(spec["scratch"])
    context = Timed(
        scratch=scratch,
        world=world,
        options={
            "ds": Path(spec["ds"]) if spec["engine"] == "zero3" else None,
            "engine": None if spec["engine"] == "zero3" else spec["engine"],
        },
        console=Console(quiet=True),
        execution=Execution(**execution),
    )
    inputs = {name: art.open_artifact(Path(spec[name])) for name in ("base", "pack")}
    out = scratch / "out"
    out.mkdir(exist_ok=True)
    sft.run(SftRecipe.model_validate(spec["recipe"]), inputs, out, context)
    if isinstance(world, DistributedWorld):
        world.close()
    return clock.result(spec, losses)


def without_cached_prefix_and_with_input_gradients(spec: dict[str, Any]) -> dict[str, Any]:
    """Backward goes down to the embedding, as where gradient checkpointing is switched on."""
    from pipeline import sft

    built = sft.build_model

    def build(*arguments: Any) -> Any:
        model, adapted = built(*arguments)
        model.enable_input_require_grads()
        return model, adapted

    sft.build_model = build
    return untaxed(spec, frozen_prefix=False)


def without_shared_beginnings(spec: dict[str, Any]) -> dict[str, Any]:
    from pipeline import sft

    sft._shares_beginnings = lambda model, recipe: False
    return untaxed(spec)


def without_document_attention(spec: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's attention with the mask of the whole pack."""
    from pipeline.model import build

    build.choose = lambda config, bf16: "sdpa"
    return untaxed(spec)


def without_completion_rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Logits of all tokens at once."""
    from pipeline.train.loss import SftModule

    decode = SftModule._decode

    def every_row(self: Any, batch: Any) -> Tensor:
        head, self.model.lm_head = self.model.lm_head, torch.nn.Identity()
        chunked, self.chunked = self.chunked, True
        predict, batch.predict = batch.predict, slice(None)
        hidden = decode(self, batch)
        batch.predict, self.chunked, self.model.lm_head = predict, chunked, head
        return torch.nn.functional.linear(hidden, head.weight)[predict].float()

    def whole(self: Any, model: Any) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.chunked = model, False

    SftModule._decode = every_row  # type: ignore[method-assign]
    SftModule.__init__ = whole  # type: ignore[method-assign,assignment]
    return untaxed(spec)


def peft_model(spec: dict[str, Any]) -> Any:
    """The base in bf16 with PEFT's LoRA (fp32), as the recipe says."""
    from peft import LoraConfig, get_peft_model

    from pipeline.model.base import load_model
    from pipeline.recipes import SftRecipe

    recipe = SftRecipe.model_validate(spec["recipe"]).lora
    assert recipe is not None
    model = load_model(art.open_artifact(Path(spec["base"])).folder, torch.bfloat16)
    layers = recipe.layers.select(model.config.num_hidden_layers)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.modules),
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).train()


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    """A loop as most people write it: packed rows with restarting positions, the model's own loss."""
    model = peft_model(spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["recipe"]["optimizer"]["learning_rate"])
    clock, losses = Clock(), []
    for _ in range(spec["epochs"]):
        for step in spec["steps"]:
            documents = [spec["documents"][d] for d in step]
            ids = torch.tensor([[t for d in documents for t in d["input_ids"]]])
            places = torch.tensor([[i for d in documents for i in range(len(d["input_ids"]))]])
            labels = torch.tensor([[t for d in documents for t in d["labels"]]])
            loss: Tensor = model(input_ids=ids, position_ids=places, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            clock.tick()
    return clock.result(spec, losses)


def trl(spec: dict[str, Any], checkpointing: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pipeline.model.base import load_tokenizer

    clock = Clock()

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.tick()

    engine: dict[str, Any] = {}
    if spec["engine"] == "zero3":
        engine["deepspeed"] = spec["ds"]
    if spec["engine"] == "fsdp":
        wrapped = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        engine |= {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    arguments = SFTConfig(
        output_dir=spec["scratch"],
        packing=True,
        max_length=spec["capacity"],
        per_device_train_batch_size=1,
        num_train_epochs=spec["epochs"],
        learning_rate=spec["recipe"]["optimizer"]["learning_rate"],
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **engine,
    )
    trainer = SFTTrainer(
        model=peft_model(spec),
        args=arguments,
        processing_class=load_tokenizer(art.open_artifact(Path(spec["base"])).folder),
        train_dataset=Dataset.from_list(spec["documents"]),
        callbacks=[Ticks()],
    )
    trainer.train()
    return clock.result(spec, [e["loss"] for e in trainer.state.log_history if "loss" in e])


SYSTEMS = {
    "untaxed": untaxed,
    "without_cached_prefix": lambda spec: untaxed(spec, frozen_prefix=False),
    "without_cached_prefix_and_with_input_gradients": without_cached_prefix_and_with_input_gradients,
    "without_shared_beginnings": without_shared_beginnings,
    "without_document_attention": without_document_attention,
    "without_completion_rows": without_completion_rows,
    "with_checkpointing": lambda spec: untaxed(spec, activation_checkpointing=True),
    "plain": plain,
    "trl_shipped": lambda spec: trl(spec, True),
    "trl_no_checkpointing": lambda spec: trl(spec, False),
}


def main() -> None:
    system, path = [a for a in sys.argv[1:] if not a.startswith("--local")]
    spec = json.loads(Path(path).read_text())
    use_fp32_products()  # for the peers too: systems differ in what they compute, not in how
    result = SYSTEMS[system](spec)
    rank = os.environ.get("RANK", "0")
    Path(spec["scratch"], f"result-{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive their group, and abort an orderly exit


if __name__ == "__main__":
    main()
