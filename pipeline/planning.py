"""What training a job needs in memory, and what to run where: the second half of ``untaxed plan``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import artifact as art
from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace, plan_job
from pipeline.model.advice import DEVICES, FREE, GB, OVERHEAD, advise, needed
from pipeline.model.geometry import cut_of, geometry_of, stored_bytes
from pipeline.model.memory import Memory, Setup, Work, plan
from pipeline.model.support import check
from pipeline.recipes import Job

PER_MACHINE = 8  # processes, where it is not said


def setup_of(options: argparse.Namespace) -> tuple[Setup, int]:
    """How the run is spread, and the bytes of its device; RecipeError for what cannot be."""
    size = options.world_size
    if size < 1:
        raise RecipeError(f"--world-size {size}: wanted at least 1")
    local = options.ranks_per_machine or min(size, PER_MACHINE)
    if not 1 <= local <= size:
        raise RecipeError(f"--ranks-per-machine {local}: wanted 1 to {size}")
    engine = options.engine or ("zero3" if size > 1 else "single")
    if engine == "single" and size > 1:
        raise RecipeError(f"--engine single with --world-size {size}; use fsdp, ddp or zero3")
    if options.device != "cpu" and options.device not in DEVICES:
        raise RecipeError(
            f"--device {options.device}: known are cpu, {', '.join(DEVICES)}; for another GPU give"
            " one of these and --device-gb"
        )
    kind = "cpu" if options.device == "cpu" else "cuda"
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given = options.device_gb
    if given is not None and given <= 0:
        raise RecipeError(f"--device-gb {given:g}: wanted more than 0")
    room = ram if kind == "cpu" else DEVICES[options.device]
    return Setup(engine, size, local, kind), room if given is None else int(given * GB)


def work_of(job: Job, workspace: Workspace) -> Work | None:
    """What of ``job`` decides its memory, from the adopted base or the shapes that it states; None
    without either."""
    planned = plan_job(job, workspace, adopt=False)
    config = _config(planned["sft"].upstream["base"])
    try:
        geometry = geometry_of(config) if config else job.base.geometry
    except DataError:
        return None
    if geometry is None:
        return None
    known = config or {"model_type": geometry.architecture, "num_hidden_layers": geometry.layers}
    cut = cut_of(known, job.sft)[0] if job.execution.frozen_prefix else 0
    pack = planned["pack"].folder
    facts = art.open_artifact(pack).facts if (pack / art.MANIFEST).exists() else {}
    return Work(
        geometry=geometry,
        recipe=job.sft,
        tokens=job.pack.max_length,
        cut=cut,
        checkpointing=job.execution.activation_checkpointing is True,
        cached=int(facts.get("tokens", 0)),
        stored=stored_bytes(config),
    )


def _config(base: Path) -> Mapping[str, Any]:
    path = base / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config


def print_memory(
    job: Job, workspace: Workspace, options: argparse.Namespace, console: Console
) -> None:
    """Bytes of a process by term, what they are for the device, and what is recommended."""
    setup, room = setup_of(options)
    work = work_of(job, workspace)
    if work is None or job.sft.lora is None:
        why = "the base's shapes are not known yet" if work is None else "sft.lora is null"
        console.print(f"  memory: not planned, {why}", highlight=False)
        return
    check(job.sft, setup.engine, launched=True)
    advice = advise(work, setup, room)
    chosen = job.execution.activation_checkpointing
    on = advice.checkpointing if chosen == "auto" else chosen
    work = replace(work, checkpointing=on)
    memory = plan(work, setup)
    total = needed(memory, setup)
    verdict = "fits" if total <= (1 - FREE) * room else "does not fit"
    processes = "" if setup.kind == "cuda" else f" in {setup.per_machine} process(es)"
    lines = [
        f"{setup.engine} x {setup.world_size}, {options.device} of {room / GB:.1f} GB;"
        f" checkpointing {'on' if on else 'off'}, packs of {work.tokens:,} tokens:"
        f" {total / GB:.2f} GB{processes}, {verdict} with {FREE:.0%} left free"
    ]
    lines += [
        f"{name}: {size / GB:.2f} GB a machine" for name, size in memory.machine.items() if size
    ]
    if work.cut and not work.cached:
        each = work.size * work.geometry.hidden_size
        lines.append(f"prefix cache: {each:,} bytes a token; how many is known after pack")
    lines += [f"recommended {line}" for line in advice.lines]
    console.print(_table(memory, setup))
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _table(memory: Memory, setup: Setup) -> Table:
    table = Table()
    table.add_column("memory of a process at the peak of a step")
    table.add_column("GB", justify="right")
    for name, size in memory.step.items():
        if size:
            table.add_row(name, f"{size / GB:.3f}")
    table.add_section()
    table.add_row("a step", f"{memory.phases['step'] / GB:.3f}")
    for name in ("load", "prefix"):
        table.add_row(f"before the first step: {name}", f"{memory.phases[name] / GB:.3f}")
    table.add_row("the process itself", f"{OVERHEAD[setup.kind] / GB:.3f}")
    return table
