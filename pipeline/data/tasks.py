"""A programming task: what a solution has to do, as tests that it is run with."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """``tests``: program text that fails unless the solution above it is right. ``stub``: the head of
    the function ``entry_point`` that has to be written, where the task gives one."""

    tests: str
    entry_point: str | None = None
    stub: str = ""

    @property
    def helpers(self) -> str:
        """What stands in the stub before the function: imports, and functions that it may call."""
        found = re.search(rf"^def {re.escape(self.entry_point or '')}\b", self.stub, re.MULTILINE)
        return self.stub[: found.start()] if found else ""
