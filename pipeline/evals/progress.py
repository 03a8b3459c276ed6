"""A progress bar for rows that are generated or scored."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Rows done, tokens a second and time left; silent without a console."""

    def __init__(self, console: Console | None, title: str, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None or total == 0,
        )
        self.task = self.progress.add_task(title, total=total, rate="")
        self.tokens = 0

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self, tokens: int) -> None:
        self.tokens += tokens
        elapsed = self.progress.tasks[0].elapsed or 0.0
        rate = f"{self.tokens / elapsed:.0f} tokens/s" if elapsed > 0 and self.tokens else ""
        self.progress.update(self.task, advance=1, rate=rate)
