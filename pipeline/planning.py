"""What a job needs in memory and in hours, and what to run where: the second half of ``untaxed plan``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import artifact as art
from pipeline.data.raw import place_of
from pipeline.data.rows import Row, read_rows
from pipeline.errors import DataError, RecipeError
from pipeline.graph import Workspace, plan_job
from pipeline.model.advice import DEVICES, FREE, GB, OVERHEAD, advise, needed
from pipeline.model.geometry import cut_of, geometry_of, stored_bytes
from pipeline.model.hours import (
    CARDS,
    Answers,
    generation_seconds,
    training_flops,
    training_seconds,
)
from pipeline.model.memory import Memory, Setup, Work, plan
from pipeline.model.support import check
from pipeline.recipes import Job, SourceRecipe, Suite

PER_MACHINE = 8  # processes, where it is not said
CHARACTERS = 4  # a token, where rows were not counted yet


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
    if options.device in CARDS:
        console.print(_hours(job, work, setup, workspace, options.device))


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


def _hours(job: Job, work: Work, setup: Setup, workspace: Workspace, device: str) -> Table:
    """Of each stage that uses the GPU; what nobody has counted yet is not guessed."""
    title = f"no less than this on {device}, if all answers are as long as they may be"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("stage")
    for column in ("GPUs", "minutes"):
        table.add_column(column, justify="right")
    for name, gpus, seconds in _stages(job, work, setup, workspace, device):
        table.add_row(
            name, str(gpus), "not known yet" if seconds is None else f"{seconds / 60:.1f}"
        )
    return table


def _stages(
    job: Job, work: Work, setup: Setup, workspace: Workspace, device: str
) -> list[tuple[str, int, float | None]]:
    card, recipe = CARDS[device], job.eval
    asked = _asked(recipe.suites, recipe.samples, recipe.batch_rows, workspace)
    found: list[tuple[str, int, float | None]] = []

    def generated(name: str, answers: list[Answers] | None) -> None:
        seconds = None if answers is None else generation_seconds(work.geometry, answers, card)
        found.append((name, 1, seconds))

    if job.anchor is not None:
        rows = [_rows(s, workspace) for s in job.prep.sources if s.kind == "anchor"]
        known = [len(r) for r in rows if r is not None]
        one = Answers(sum(known), job.anchor.max_new_tokens, job.anchor.batch_rows)
        generated("anchor", [one] if len(known) == len(rows) else None)
    tokens = work.cached or _tokens(job, workspace)
    trained = tokens and training_flops(
        work.geometry, tokens, job.sft.epochs, work.cut, checkpointing=work.checkpointing
    )
    seconds = None if trained is None else training_seconds(trained, card, setup.world_size)
    found.append(("sft", setup.world_size, seconds))
    if job.choose is not None and job.choose.dev is None:
        points = 1 + len(job.choose.scales) * (
            len(job.choose.epochs) if job.choose.epochs else job.sft.epochs
        )
        generated("choose", _asked(job.choose.suites, points, recipe.batch_rows, workspace))
    elif job.choose is not None:
        found.append(("choose", 1, None))
    for name in ("baseline", "eval"):
        generated(name, asked)
    return found


def _asked(
    suites: Sequence[Suite], times: int, at_once: int, workspace: Workspace
) -> list[Answers] | None:
    rows = [(_rows(suite, workspace), suite.max_new_tokens) for suite in suites]
    known = [Answers(times * len(r), tokens, at_once) for r, tokens in rows if r is not None]
    return known if len(known) == len(rows) else None


def _tokens(job: Job, workspace: Workspace) -> int | None:
    """Of an epoch, before pack has counted them: four characters a token, anchors of full length."""
    total = 0
    for source in job.prep.sources:
        rows = _rows(source, workspace)
        if rows is None:
            return None
        own = job.anchor.max_new_tokens if job.anchor and source.kind == "anchor" else 0
        texts = sum(len(row.prompt) + len(row.response or "") for row in rows)
        total += texts // CHARACTERS + own * len(rows)
    return total


def _rows(source: SourceRecipe, workspace: Workspace) -> list[Row] | None:
    place = place_of(source, workspace)
    return None if place is None else read_rows(place, source)
