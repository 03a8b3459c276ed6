"""What a right answer to a reasoning problem is: one small type for each way of telling.

A row carries one of them, and its type says how the answer is read and compared (``evals/verdicts.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Number:
    """The number that ``text`` ends on."""

    text: str


@dataclass(frozen=True)
class Expression:
    """A mathematical expression in LaTeX, without dollar signs; other forms of it are right too."""

    latex: str

    def __post_init__(self) -> None:
        if not self.latex.strip():
            raise ValueError("the answer is empty")


@dataclass(frozen=True)
class Choice:
    """The letter of the right one of ``options`` lettered options."""

    letter: str
    options: int

    def __post_init__(self) -> None:
        if not 2 <= self.options <= len(LETTERS):
            raise ValueError(f"{self.options} options, wanted 2 to {len(LETTERS)}")
        if len(self.letter) != 1 or self.letter not in self.letters:
            raise ValueError(
                f"the answer is {self.letter!r}, wanted a letter from A to {self.letters[-1]}"
            )

    @property
    def letters(self) -> str:
        return LETTERS[: self.options]


@dataclass(frozen=True)
class Words:
    """A text that the answer has to be, apart from case, punctuation and markup around it."""

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the answer is empty")


@dataclass(frozen=True)
class Task:
    """A programming task. ``tests``: program text that fails unless the solution above it is right.
    ``stub``: the head of the function ``entry_point`` that has to be written, where the task gives
    one."""

    tests: str
    entry_point: str | None = None
    stub: str = ""

    @property
    def helpers(self) -> str:
        """What stands in the stub before the function: imports, and functions that it may call."""
        found = re.search(rf"^def {re.escape(self.entry_point or '')}\b", self.stub, re.MULTILINE)
        return self.stub[: found.start()] if found else ""


Reference = Number | Expression | Choice | Words | Task
