"""Answers that survive a kill: each finished row is appended to a file and not generated again."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evals.generate import Generation, Request, generate

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel


def answer(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    path: Path,
    identity: str,
    end_ids: Collection[int],
    batch_rows: int,
    temperature: float,
    seed: int,
    console: Console | None,
    title: str,
) -> list[Generation]:
    """``generate`` for ``requests`` (one answer an id), going on from what ``path`` holds.

    ``identity`` names everything that the answers depend on; a file of another identity is begun
    anew.
    """
    finished = _resume(path, identity)
    todo = list({r.id: r for r in requests if r.id not in finished}.values())
    with path.open("a", encoding="utf-8") as stream:

        def done(index: int, generation: Generation) -> None:
            finished[todo[index].id] = generation
            row = {"id": todo[index].id, "ids": generation.ids, "complete": generation.complete}
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
            stream.flush()

        generate(
            model,
            todo,
            end_ids=end_ids,
            batch_rows=batch_rows,
            temperature=temperature,
            seed=seed,
            done=done,
            console=console,
            title=title,
        )
    return [finished[request.id] for request in requests]


def _resume(path: Path, identity: str) -> dict[str, Generation]:
    """The finished rows in ``path``; what a kill left half-written at its end is cut off.

    The file is only ever cut in place: a second kill while resuming loses no row either.
    """
    whole = path.read_bytes() if path.exists() else b""
    header = json.dumps({"identity": identity}).encode("ascii") + b"\n"
    if not whole.startswith(header):
        path.write_bytes(header)
        return {}
    rows: dict[str, Generation] = {}
    good = len(header)
    for line in whole[good:].splitlines(keepends=True):
        row = _row(line)
        if row is None:
            break
        rows[row["id"]] = Generation(row["ids"], row["complete"])
        good += len(line)
    os.truncate(path, good)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """One finished row, or None for a line that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"id", "ids", "complete"} else None
