"""The process that compares mathematical expressions: a question a line in, an answer a line out.

A program of its own, started by ``expressions.py`` and imported by nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, TextIO

CPU_SECONDS = 5  # for one question
MEMORY_BYTES = 2 << 30


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that a library prints is taken for a reply
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_CORE, 0)
    try:
        import math_verify
    except ImportError as error:
        reply(replies, {"error": str(error)})
        return
    reply(replies, {"ready": True})
    for line in sys.stdin:
        limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + CPU_SECONDS)
        question = json.loads(line)
        try:
            said = compare(math_verify, question["reference"], question["answer"])
        except Exception:
            said = {"read": None, "right": False}
        reply(replies, said)


def compare(math_verify: Any, reference: str, answer: str) -> dict[str, Any]:
    """What is read in ``answer`` and whether it is ``reference``; without the library's own alarms."""
    wanted = parsed(math_verify, f"\\boxed{{{reference}}}")[0]
    found, text = parsed(math_verify, answer)
    if not found:
        return {"read": None, "right": False}
    right = bool(wanted) and math_verify.verify(wanted, found, timeout_seconds=None)
    return {"read": text[:1000], "right": bool(right)}


def parsed(math_verify: Any, text: str) -> tuple[list[Any], str]:
    """The expressions that were read, and how they were written."""
    found = math_verify.parse(text, parsing_timeout=None)
    written = [one for one in found if isinstance(one, str)]
    return [one for one in found if not isinstance(one, str)], "".join(written[-1:])


def limit(what: int, value: int) -> None:
    """Set the soft limit, on which the kernel acts; no higher than the hard one."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def reply(replies: TextIO, said: dict[str, Any]) -> None:
    replies.write(json.dumps(said) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
