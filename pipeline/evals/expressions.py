"""Whether a mathematical expression that a model wrote is the wanted one, by math-verify.

The library reads LaTeX and plain expressions and compares their values with sympy. What a model writes
can keep it busy for ever or take all memory, and its own time limit is an alarm signal, which works in
the main thread alone and does not stop everything. So it runs as a process of its own
(``expression_child.py``) that the kernel ends at a limit of processor time or memory; the answer is
wrong then, and the next one gets a new process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.evals.answers import boxed

CHILD = Path(__file__).with_name("expression_child.py")
WALL_SECONDS = 300.0  # for a process that waits; one that computes is ended long before
MOST_CHARACTERS = 20_000


@dataclass(frozen=True)
class Compared:
    """``read``: what was read as the answer, None if nothing was."""

    read: str | None
    right: bool


class Expressions:
    """Compares expressions while it is open: ``with Expressions() as expressions``. For one thread.

    RuntimeError where the library cannot be started.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Expressions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def reads(self, latex: str) -> bool:
        """Whether ``latex`` can serve as a reference: it equals itself."""
        return self.compare(latex, f"\\boxed{{{latex}}}").right

    def compare(self, reference: str, answer: str) -> Compared:
        """``reference`` is LaTeX without dollar signs, ``answer`` any text: its last ``\\boxed{}`` is
        read, else the last expression near its end."""
        inside = boxed(answer)
        text = f"\\boxed{{{inside}}}" if inside is not None else answer
        said = self._ask({"reference": reference, "answer": text[-MOST_CHARACTERS:]})
        return Compared(said["read"], said["right"]) if said else Compared(None, False)

    def _ask(self, question: dict[str, str]) -> dict[str, Any] | None:
        """What the process says; None if it did not survive the question."""
        child = self._child or self._start()
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(question) + "\n")
            child.stdin.flush()
        line = self._line(child)
        if line is None:
            self._end()
        return line

    def _start(self) -> subprocess.Popen[str]:
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],  # -P: no module of this folder is in its way
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        ready = self._line(self._child)
        if ready is None or "error" in ready:
            why = ready["error"] if ready else f"exit code {self._child.wait()}"
            self._end()
            raise RuntimeError(f"expressions cannot be compared ({why}); install math-verify")
        return self._child

    def _line(self, child: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], WALL_SECONDS)
        line = child.stdout.readline() if ready else ""
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
