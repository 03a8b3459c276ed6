"""Whether activation checkpointing is needed here: the planner asked about this device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import DataError
from pipeline.model.advice import GB, choose_checkpointing, needed
from pipeline.model.attention import choose
from pipeline.model.geometry import geometry_of, stored_bytes
from pipeline.model.memory import Setup, Work, plan
from pipeline.recipes import Execution, SftRecipe
from pipeline.train.world import device, gather_objects

if TYPE_CHECKING:
    from pipeline.stage import Context

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def settle(
    config: Any, recipe: SftRecipe, cut: int, tokens: int, engine: str, context: Context
) -> Execution:
    """``context.execution`` with "auto" checkpointing decided, alike on all ranks, for packs of
    ``tokens``; ``config`` is the base's. Where nothing can be planned (full fine-tuning, unknown
    shapes): on, but on a CPU off.
    """
    execution = context.execution
    if execution.activation_checkpointing != "auto":
        return execution
    kind, room = device().type, device_bytes()
    work, why = _work(config, recipe, cut, tokens)
    if work is None:
        on = kind != "cpu"
    else:
        size = context.world.size
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        setup = Setup(engine, size, min(local, size), kind)
        on = choose_checkpointing(work, setup, room)
        bytes_off = needed(plan(work, setup), setup)
        why = f"without it {bytes_off / GB:.2f} GB of {room / GB:.2f} GB"
    on = any(gather_objects(on))
    context.log(f"sft: activation checkpointing is {'on' if on else 'off'}: {why}")
    return execution.model_copy(update={"activation_checkpointing": on})


def _work(config: Any, recipe: SftRecipe, cut: int, tokens: int) -> tuple[Work | None, str]:
    if recipe.lora is None:
        return None, "memory is planned for LoRA alone"
    try:
        geometry = geometry_of(config.to_dict())
    except DataError as error:
        return None, str(error)
    masked = choose(config, bf16=recipe.precision == "bf16") == "sdpa"
    stored = stored_bytes(config.to_dict())
    return Work(geometry, recipe, tokens, cut, stored=stored, masked=masked), ""


def device_bytes() -> int:
    """Bytes of this rank's GPU; on a CPU of the machine, as far as they are free and allowed."""
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit))
