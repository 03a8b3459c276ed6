"""Answers that survive a kill: each finished row is appended to a file and not generated again."""

from __future__ import annotations

import json
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
    """The finished rows in ``path``; what a kill left half-written at its end is cut off."""
    whole = path.read_bytes() if path.exists() else b""
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    header = json.dumps({"identity": identity})
    if not lines or lines[0] != header.encode("utf-8"):
        path.write_text(header + "\n", encoding="utf-8")
        return {}
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
    return {row["id"]: Generation(row["ids"], row["complete"]) for row in rows}
