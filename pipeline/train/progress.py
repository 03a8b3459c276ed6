"""What a person sees while training runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from pipeline.stage import Context

LINE_SECONDS = 15.0


class StepProgress:
    """Progress over ``steps`` optimiser steps, on rank 0 only."""

    def __init__(self, context: Context, steps: int, done: int) -> None:
        self.context = context
        self.steps = steps
        self.done = done
        self.started = time.monotonic()
        self.first = done
        self.said = 0.0
        console = context.console
        self.bar: Progress | None = None
        if context.world.rank == 0 and console.is_terminal:
            self.bar = Progress(
                TextColumn("sft"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tok/s"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> StepProgress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=self.steps, completed=self.done, loss=0, speed=0
            )
        return self

    def advance(self, record: dict[str, float]) -> None:
        """One step is done."""
        self.done += 1
        loss, speed = record["loss"], record["tokens_per_second"]
        if self.bar:
            self.bar.update(self.task, advance=1, loss=loss, speed=speed)
            return
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS or self.done == self.steps:
            self.said = now
            left = (now - self.started) / (self.done - self.first) * (self.steps - self.done)
            self.context.log(
                f"sft: step {self.done}/{self.steps}  loss {loss:.4f}  {speed:.0f} tok/s"
                f"  {left:.0f} s left"
            )

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()
