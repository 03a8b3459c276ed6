"""One live screen over all stages of a launch; plain lines where nobody watches a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipeline.cluster.launch import Sight
from pipeline.cluster.words import State

MARKS = {
    State.ABSENT: "[dim].[/]",
    State.WAITING: "[yellow]-[/]",
    State.RUNNING: "[cyan]>[/]",
    State.COMPLETE: "[green]+[/]",
    State.FAILED: "[red]x[/]",
}
LINE_CHARACTERS = 200


class Screen:
    """``show`` gets every look. A terminal sees one table that changes; a log gets a line a change."""

    def __init__(self, console: Console, stages: Sequence[str]) -> None:
        self.console = console
        self.sights: dict[str, Sight | None] = dict.fromkeys(stages)
        self.since: dict[str, float] = {}
        self.live: Live | None = None

    @contextlib.contextmanager
    def on(self) -> Iterator[Screen]:
        """While it is shown."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(self.table(), console=self.console, refresh_per_second=4) as self.live:
            yield self
            self.live.update(self.table())

    def show(self, sight: Sight) -> None:
        """A look at one stage."""
        before = self.sights.get(sight.stage)
        changed = before is None or (before.seen, before.name) != (sight.seen, sight.name)
        self.sights[sight.stage] = sight
        if changed:
            self.since[sight.stage] = time.monotonic()
        if self.live is not None:
            self.live.update(self.table())
        elif changed and sight.seen.state != State.ABSENT:
            self.say(f"{sight.stage}: {_told(sight)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """The stages as they were last seen."""
        table = Table.grid(padding=(0, 2))
        for stage, sight in self.sights.items():
            if sight is None or sight.seen.state == State.ABSENT:
                table.add_row(MARKS[State.ABSENT], stage, "", "")
                continue
            seconds = time.monotonic() - self.since.get(stage, time.monotonic())
            running = sight.seen.state in (State.WAITING, State.RUNNING)
            took = f"{seconds:,.0f} s" if running else ""
            table.add_row(MARKS[sight.seen.state], stage, took, escape(_told(sight)))
        return table


def _told(sight: Sight) -> str:
    """State, why and the way out, or what the stage says itself."""
    attempt = f" (attempt {sight.attempt})" if sight.attempt > 1 else ""
    if sight.seen.why:
        return f"{sight.seen.state}{attempt}: {sight.seen.why}; {sight.seen.way_out}"
    line = f": {sight.line[:LINE_CHARACTERS]}" if sight.line else ""
    return f"{sight.seen.state}{attempt}{line}"
