"""Stage 3: packed rows + base -> adapters, one an epoch, by supervised fine-tuning.

deepspeed pipeline/sft.py --ds ds_configs/zero3.json    ZeRO
torchrun --nproc-per-node 2 pipeline/sft.py             FSDP2 (or --engine ddp)
python pipeline/sft.py                                  one process
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.artifact import Artifact
from pipeline.data.packing import measure
from pipeline.errors import DataError, UntaxedError, one_line
from pipeline.model import lora, support
from pipeline.model.allocator import keep_freed_memory
from pipeline.model.attention import PER_DOCUMENT
from pipeline.model.build import DTYPES, build_model, check_dtypes
from pipeline.model.geometry import ARCHITECTURES, cut_of
from pipeline.model.products import use_fp32_products
from pipeline.recipes import SftRecipe
from pipeline.stage import Context, Run, arguments, main, say_status
from pipeline.train import checkpoint
from pipeline.train.batches import Documents, load_steps
from pipeline.train.checkpoint import Position
from pipeline.train.engine import Engine, GradientWatch, make_engine, trainable
from pipeline.train.fitting import settle
from pipeline.train.loop import Split, Trainer, write_history
from pipeline.train.loss import SftModule
from pipeline.train.prefix_states import PrefixStates
from pipeline.train.reference import probe_isolation, reference
from pipeline.train.stopping import StopRequests
from pipeline.train.watch import Verdict
from pipeline.train.world import DistributedWorld, init_world


def run(
    recipe: SftRecipe, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Train; write ``epoch-N/`` (a PEFT adapter, or the whole model) and metrics.jsonl."""
    world, stop = context.world, StopRequests()
    world.be_patient(context.execution.collective_timeout_seconds)
    world.mark("loading the model")
    torch.manual_seed(recipe.seed * 1000003 + world.rank)
    engine = make_engine(context.options.get("ds"), context.options.get("engine"), world.size)
    capacity = int(inputs["pack"].manifest.recipe["pack"]["max_length"])
    config = _config(inputs["base"].folder)
    off = 0, "execution.frozen_prefix is false"
    cut, why = cut_of(config.to_dict(), recipe) if context.execution.frozen_prefix else off
    with engine.loading(recipe):
        support.check(recipe, engine.name, launched=dist.is_initialized())
        execution = settle(config, recipe, cut, capacity, engine.name, context)
        model, adapted = build_model(inputs["base"], recipe, execution, cut)
    shared = _shares_beginnings(model, recipe)
    train, dev = (
        Documents(inputs["pack"], name, recipe.anchors, shared) for name in ("train", "dev")
    )
    if cut:
        PrefixStates(inputs["base"], recipe, cut, (train, dev), context).fill()
    else:
        context.log(f"sft: the whole model runs in every step: {why}")
    module = SftModule(model)
    named = trainable(module)
    count = sum(_elements(p) for p in named.values())
    sharded_full = recipe.lora is None and engine.name == "fsdp"
    watch = GradientWatch(() if sharded_full else named.items())
    engine.wrap(module, recipe)
    if sharded_full:
        watch.unhooked = trainable(module)
    check_dtypes(module, recipe)
    context.log(f"sft: {engine.name} x {world.size}, {count:,} trainable parameters")
    probe_isolation(engine, train, DTYPES[recipe.precision])
    base = _base_identity(inputs["base"], recipe, cut, model)
    splits = [
        Split(d, reference(engine, d, capacity, recipe.anchors.top_k, context, base))
        for d in (train, dev)
    ]
    start = _resume(engine, context)
    _replay_epochs(out, context)
    epochs = load_steps(inputs["pack"])
    fill = measure(epochs[0], train.lengths, capacity, world.size)
    context.log(
        f"sft: packs of {capacity} tokens are {fill.efficiency:.1%} full, and ranks wait for one"
        f" another {fill.imbalance:.1%} of the time"
    )
    trainer = Trainer(
        engine=engine,
        recipe=recipe,
        context=context,
        train=splits[0],
        dev=splits[1],
        epochs=epochs,
        capacity=capacity,
        watch=watch,
        trainable=list(named),
        stop=stop,
    )

    def save_epoch(number: int) -> None:
        _save_epoch(out, number, engine, recipe, adapted, inputs["base"], context)

    end = trainer.run(start, save_epoch)
    if world.rank == 0:
        write_history(out / "metrics.jsonl", end.history)
    return _facts(recipe, engine, context, count, end, named) | {
        "packing_efficiency": round(fill.efficiency, 4),
        "rank_imbalance": round(fill.imbalance, 4),
        "tokens": {
            "read": sum(train.lengths[d] for epoch in epochs for step in epoch for d in step),
            "learned": sum(sum(train.targets(step)) for epoch in epochs for step in epoch),
        },
    }


def _base_identity(base: Artifact, recipe: SftRecipe, cut: int, model: Any) -> dict[str, Any]:
    """What decides a bit of the base's predictions, beside documents, engine and machine."""
    return {
        "base": base.digest,
        "cut": cut,
        "full": recipe.lora is None,
        "precision": recipe.precision,
        "quantization": recipe.quantization,
        "attention": model.config._attn_implementation,
    }


def _elements(parameter: torch.nn.Parameter) -> int:
    """Number of elements; a parameter that ZeRO-3 has sharded knows its full size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _config(base: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{base}: config.json cannot be used: {error}") from error


def _shares_beginnings(model: Any, recipe: SftRecipe) -> bool:
    """Whether a pack holds what its documents begin with once. Only one attention here can; and with
    dropout the documents would share its mask as well."""
    config = model.config
    known = config.model_type in ARCHITECTURES and config._attn_implementation == PER_DOCUMENT
    return known and not (recipe.lora and recipe.lora.dropout)


def _resume(engine: Engine, context: Context) -> Position:
    world = context.world
    found = checkpoint.newest(context.scratch, context.log) if world.rank == 0 else None
    found = world.broadcast(found)  # one rank chooses, or ranks could go on from different steps
    if found is None:
        return Position(0, 0, [])
    position = checkpoint.restore(found, engine, world.rank, world.size)
    context.log(f"sft: going on after step {position.step}")
    for record in position.history:
        context.metric(int(record["step"]), record)
    return position


def _save_epoch(
    out: Path,
    number: int,
    engine: Engine,
    recipe: SftRecipe,
    adapted: dict[str, lora.LoraLinear],
    base: Artifact,
    context: Context,
) -> None:
    """Gather on all ranks, write on rank 0; a copy in scratch survives a crash of later epochs."""
    state = engine.trainable_state(keep=context.world.rank == 0)
    if context.world.rank != 0:
        return
    folder = out / f"epoch-{number}"
    shutil.rmtree(folder, ignore_errors=True)  # of a try that died between epoch and checkpoint
    if recipe.lora is None:
        from safetensors.torch import save_file

        folder.mkdir()
        dtype = DTYPES[recipe.precision]
        tensors = {k: v.to(dtype).contiguous() for k, v in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        source = str(base.facts.get("source", ""))
        config = lora.adapter_config(recipe.lora, adapted, source)
        lora.save(folder, lora.export(adapted, state), config, base.digest)
    staging, kept = context.scratch / f".{folder.name}.tmp", context.scratch / folder.name
    for old in (staging, kept):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder, staging)
    staging.rename(kept)


def _replay_epochs(out: Path, context: Context) -> None:
    """Epochs that a stopped run had finished already."""
    if context.world.rank == 0:
        for kept in sorted(context.scratch.glob("epoch-*")):
            shutil.copytree(kept, out / kept.name, dirs_exist_ok=True)


def _facts(
    recipe: SftRecipe,
    engine: Engine,
    context: Context,
    count: int,
    end: Position,
    named: Mapping[str, Any],
) -> dict[str, Any]:
    validations = [r for r in end.history if "dev_loss" in r or "dev_kl" in r]
    return {
        "method": "lora" if recipe.lora else "full",
        "engine": engine.name,
        "world_size": context.world.size,
        "epochs": recipe.epochs,
        "steps": end.step,
        "trainable_parameters": count,
        "trainable_tensors": len(named),
        "dev": validations,
        "final_loss": next((r["loss"] for r in reversed(end.history) if "loss" in r), None),
    }


def join(*, always: bool) -> DistributedWorld | None:
    """Make this process one that trains: with the launcher's others, or (``always``) with itself."""
    keep_freed_memory()
    use_fp32_products()
    return init_world(always=always, leave=leave_for)


def start(argv: list[str] | None = None) -> int:
    """The command line: join the launcher's processes, then run the stage."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = arguments("sft").parse_args(argv)
    try:
        world = join(always=options.ds is not None or options.engine == "fsdp")
    except UntaxedError as error:
        print(f"sft: {one_line(error)}", file=sys.stderr, flush=True)
        return error.exit_code
    code = main("sft", _with_others(world) if world else run, argv, world)
    if world is not None:
        if code == 0:
            world.close()
        else:  # the others may never come to the end
            world.say_left(code, f"rank {world.rank} ended with exit code {code}")
    return code


def _with_others(world: DistributedWorld) -> Run:
    """``run``, which tells the other ranks of its failure and names the rank that caused it."""

    def watched(
        recipe: SftRecipe, inputs: Mapping[str, Artifact], out: Path, context: Context
    ) -> dict[str, Any]:
        with world.blaming():
            return run(recipe, inputs, out, context)

    return watched


def leave_for(found: Verdict) -> None:
    """End this process, whose main thread waits for a rank that will not come."""
    print(f"sft: {found.message}", file=sys.stderr, flush=True)
    say_status(found.code)
    leave(found.code)


def leave(code: int) -> None:
    """End this process now. All is sealed or has failed, and an orderly exit after collectives can
    still abort: threads of gloo may outlive the group that they belong to."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(start())
