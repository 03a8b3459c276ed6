"""What a model answered to a programming task, made a program with its tests, and run.

A chat model answers with a block of code, most of the time the whole function.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.tasks import Task
from pipeline.evals.sandbox import STANDARD, Ended, Limits, Sandbox

_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CODE = re.compile(r"^(?:def|class|import|from|@|async def)\b", re.MULTILINE)


def extract(answer: str, entry_point: str | None = None) -> str | None:
    """The code in an answer: the last block that defines ``entry_point``, else the last that defines
    anything, else the answer from its first line of code on; None when there is no code."""
    blocks = _BLOCK.findall(answer)
    if entry_point:
        defining = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
        named = [block for block in blocks if defining.search(block)]
        if named:
            return str(named[-1])
    coded = [block for block in blocks if _CODE.search(block)] or blocks
    if coded:
        return str(coded[-1])
    start = _CODE.search(answer)
    return answer[start.start() :] if start else None


def program(task: Task, answer: str) -> str | None:
    """The answer's code with what it may rely on before it and the tests after it.

    An answer that goes on where the stub ends (an indented body) is put there. None without code.
    """
    code = extract(answer, task.entry_point)
    if code is None and task.stub and re.match(r"[ \t]+\S", answer):
        code = answer
    if code is None:
        return None
    defines = task.entry_point is None or re.search(
        rf"^def {re.escape(task.entry_point)}\b", code, re.MULTILINE
    )
    before = task.helpers if defines else task.stub
    return f"{before}\n{code.rstrip()}\n\n{task.tests}\n"


def run_answers(
    sandbox: Sandbox, answers: Sequence[tuple[Task, str]], limits: Limits = STANDARD
) -> list[Ended | None]:
    """How the program of each answer ended; None where the answer holds no code."""
    programs = [program(task, answer) for task, answer in answers]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda p: sandbox.run(p, limits) if p else None, programs))
