"""Answers that survive a kill: each finished one is appended to a file and not generated again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UntaxedError
from pipeline.evals.asking import Generation, Request

if TYPE_CHECKING:
    from pipeline.evals.engines import Engine

FAILURES = 10
FAILED_SHARE = 0.05


def answer(
    engine: Engine,
    requests: Sequence[Request],
    *,
    path: Path,
    identity: str,
    title: str,
    log: Callable[[str], None],
) -> list[Generation]:
    """What ``engine`` answers to ``requests`` (one answer an id), going on from what ``path`` holds.

    ``identity`` names everything that the answers depend on; a file of another identity is begun
    anew, and ``log`` is told. An answer that could not be had has an ``error`` and is not kept, so
    that another run tries again. UntaxedError where these are many.
    """
    wanted = {request.id: request for request in requests}
    finished, others = _resume(path, identity)
    if others:
        log(
            f"{title}: {others} finished answers are begun anew: the model, the server or how it is"
            " asked is not what it was"
        )
    todo = [request for request in wanted.values() if request.id not in finished]
    failed: dict[str, Generation] = {}
    with path.open("a", encoding="utf-8") as stream:

        def done(index: int, generation: Generation) -> None:
            if generation.error is not None:
                failed[todo[index].id] = generation
                if too_many(len(failed), len(finished), len(wanted)):
                    raise UntaxedError(
                        f"{title}: {len(failed)} of {len(wanted)} requests failed, the last (row"
                        f" {todo[index].id}): {generation.error}; {len(finished)} answers are kept:"
                        " see to the server, then run again"
                    )
                return
            finished[todo[index].id] = generation
            row = {"id": todo[index].id, "ids": generation.ids, "complete": generation.complete}
            if generation.text is not None:
                row["text"] = generation.text
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
            stream.flush()

        engine.answers(todo, done, title)
    return [finished.get(request.id) or failed[request.id] for request in requests]


def too_many(failed: int, finished: int, total: int) -> bool:
    """Whether so many requests failed that the others would measure something else: the first ten, or
    more than ten and one in twenty."""
    if finished == 0:
        return failed >= min(FAILURES, total)
    return failed > max(FAILURES, FAILED_SHARE * total)


def _resume(path: Path, identity: str) -> tuple[dict[str, Generation], int]:
    """The finished rows in ``path``, and how many of another identity were there instead; what a kill
    left half-written at its end is cut off.

    The file is only ever cut in place: a second kill while resuming loses no row either.
    """
    whole = path.read_bytes() if path.exists() else b""
    header = json.dumps({"identity": identity}).encode("ascii") + b"\n"
    if not whole.startswith(header):
        path.write_bytes(header)
        return {}, len([line for line in whole.splitlines(keepends=True) if _row(line)])
    rows: dict[str, Generation] = {}
    good = len(header)
    for line in whole[good:].splitlines(keepends=True):
        row = _row(line)
        if row is None:
            break
        rows[row["id"]] = Generation(row["ids"], row["complete"], row.get("text"))
        good += len(line)
    os.truncate(path, good)
    return rows, 0


def _row(line: bytes) -> dict[str, Any] | None:
    """One finished row, or None for a line that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"id", "ids", "complete"} else None
