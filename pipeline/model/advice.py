"""What to run where: does a plan fit a device, and which checkpointing, pack and engine. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.model.memory import Memory, Setup, Work, plan
from pipeline.model.support import WORKS
from pipeline.recipes import SftRecipe

GB = 10**9
DEVICES = {
    "h200-141g": 141 * GB,
    "h100-80g": 80 * GB,
    "a100-80g": 80 * GB,
    "a100-40g": 40 * GB,
    "l40s-48g": 48 * GB,
    "a10-24g": 24 * GB,
}
# What a process has before any tensor: on a CPU the interpreter and libraries, measured by
# benchmarks/memory.py; on a GPU its context and the libraries' workspaces, assumed.
OVERHEAD = {"cpu": 450 * 10**6, "cuda": 1500 * 10**6}
FREE = 0.1  # share of a device that is left free: what the allocator cannot use, and the error
PACKS = tuple(1024 * 2**n for n in range(8))


@dataclass(frozen=True)
class Advice:
    """What is recommended, as lines to print, and the checkpointing chosen for the asked setup."""

    checkpointing: bool
    lines: tuple[str, ...]


def needed(memory: Memory, setup: Setup) -> int:
    """Bytes of the device: of one GPU; of a CPU machine, for all processes on it."""
    each = memory.peak - memory.mapped + OVERHEAD[setup.kind]
    return each if setup.kind == "cuda" else each * setup.per_machine + memory.mapped


def fits(work: Work, setup: Setup, device_bytes: int) -> bool:
    """Whether the peak of a process leaves ``FREE`` of the device."""
    return needed(plan(work, setup), setup) <= (1 - FREE) * device_bytes


def choose_checkpointing(work: Work, setup: Setup, device_bytes: int) -> bool:
    """Off where that fits: it costs another forward pass. On otherwise."""
    return not fits(replace(work, checkpointing=False), setup, device_bytes)


def advise(work: Work, setup: Setup, device_bytes: int) -> Advice:
    """For the asked setup: checkpointing and the longest pack; and the first engine that fits."""
    on = choose_checkpointing(work, setup, device_bytes)
    lines = []
    if fits(replace(work, checkpointing=on), setup, device_bytes):
        reason = "it does not fit without" if on else "it fits without"
        lines.append(f"checkpointing: {'on' if on else 'off'} ({reason})")
    else:
        lines.append("checkpointing: on, and it still does not fit")
    for checkpointing in (False, True):
        longest = max(
            (
                tokens
                for tokens in PACKS
                if fits(
                    replace(work, tokens=tokens, predicted=None, checkpointing=checkpointing),
                    setup,
                    device_bytes,
                )
            ),
            default=0,
        )
        word = "with" if checkpointing else "without"
        most = f"up to {longest:,}" if longest else f"not even {PACKS[0]:,}"
        lines.append(f"pack.max_length {word} checkpointing: {most} tokens")
    lines.append(f"engine: {_engine(work, setup, device_bytes)}")
    return Advice(on, tuple(lines))


def _engine(work: Work, setup: Setup, device_bytes: int) -> str:
    """The first that fits: replicated before sharded, without checkpointing before with, the base
    as it is before NF4."""
    for candidate, place in _candidates(work, setup):
        if fits(candidate, place, device_bytes):
            nf4 = ", QLoRA (sft.quantization=nf4)" if _is_nf4(candidate.recipe) else ""
            how = "with" if candidate.checkpointing else "without"
            return f"{place.engine} x {place.world_size}{nf4}, {how} checkpointing"
    return (
        f"none fits {device_bytes / GB:.0f} GB x {setup.world_size}; more or larger devices, or a"
        " shorter pack.max_length"
    )


def _candidates(work: Work, setup: Setup) -> Iterator[tuple[Work, Setup]]:
    engines = ("single",) if setup.world_size == 1 else ("ddp", "fsdp", "zero3")
    kinds = ("nf4",) if _is_nf4(work.recipe) else ("none", "nf4")
    for quantization in kinds:
        recipe = work.recipe.model_copy(update={"quantization": quantization})
        for engine in engines:
            if engine not in WORKS["lora", quantization]:
                continue
            for checkpointing in (False, True):
                yield (
                    replace(work, recipe=recipe, checkpointing=checkpointing),
                    replace(setup, engine=engine),
                )


def _is_nf4(recipe: SftRecipe) -> bool:
    return recipe.quantization == "nf4"
