"""Stage 2: conversations -> packed token rows, and the rows of every training step.

Renders with the base's own chat template, masks by token position (only the target is trained),
drops documents that are too long (never cuts), and writes ``trained.txt``: what is trained, in a
form a person can read.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import Artifact, write_atomic
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.data.packing import epoch_steps, measure
from pipeline.errors import DataError
from pipeline.graph import PackStep
from pipeline.model.base import load_tokenizer
from pipeline.stage import Context, main

KINDS = {"refusal": 0, "answer": 1, "anchor": 2}
SHEET_ROWS = 24
RANKS = (2, 8)
ROWS_AT_ONCE = 1024


def run(
    recipe: PackStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write tokens.safetensors, steps.json, documents.json and trained.txt under ``out``."""
    check_generation_prompt(recipe.chat)
    chat = Chat(load_tokenizer(inputs["base"].folder), recipe.chat)
    conversations = inputs.get("anchor") or inputs["prep"]
    train, dropped = _render(conversations.path("train.jsonl"), chat, recipe.pack.max_length)
    dev, dev_dropped = _render(conversations.path("dev.jsonl"), chat, recipe.pack.max_length)
    if not train:
        raise DataError(
            f"no document of {len(dropped)} fits pack.max_length={recipe.pack.max_length}; raise it"
        )
    lengths = [len(d["ids"]) for d in train]
    strata = _strata(train)
    epochs = [
        epoch_steps(lengths, strata, recipe.batch, recipe.pack.seed, epoch)
        for epoch in range(recipe.epochs)
    ]
    write_tokens(out / "tokens.safetensors", train, dev)
    write_atomic(out / "steps.json", json.dumps(epochs, separators=(",", ":")))
    documents = {"train": [d["id"] for d in train], "dev": [d["id"] for d in dev]}
    write_atomic(out / "documents.json", json.dumps(documents | {"dropped": dropped + dev_dropped}))
    write_atomic(out / "trained.txt", sheet(train, chat))
    fills = {ranks: measure(epochs[0], lengths, recipe.pack.max_length, ranks) for ranks in RANKS}
    trained = sum(sum(d["trained"]) for d in train)
    context.log(
        f"pack: {len(train)} documents, {sum(lengths)} tokens ({trained} trained),"
        f" {len(epochs[0])} steps an epoch, {len(dropped)} over-long dropped"
    )
    context.log(
        "pack: "
        + "; ".join(
            f"on {ranks} ranks packs are {fill.efficiency:.1%} full and {fill.imbalance:.1%} of the"
            " time is waiting"
            for ranks, fill in fills.items()
        )
    )
    return {
        "documents": len(train),
        "dev_documents": len(dev),
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "dropped_over_long": len(dropped) + len(dev_dropped),
        "steps_per_epoch": len(epochs[0]),
        "longest": max(lengths),
        **{f"efficiency_{ranks}_ranks": round(fill.efficiency, 4) for ranks, fill in fills.items()},
        **{f"imbalance_{ranks}_ranks": round(fill.imbalance, 4) for ranks, fill in fills.items()},
    }


def _render(path: Path, chat: Chat, max_length: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Rendered documents of one split, and the ids of those that are too long."""
    documents: list[dict[str, Any]] = []
    dropped: list[str] = []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    some = (rows[at : at + ROWS_AT_ONCE] for at in range(0, len(rows), ROWS_AT_ONCE))
    # one renders while the other is in the tokenizer
    with _no_collection(), ThreadPoolExecutor(2) as pool:
        for document in chain.from_iterable(pool.map(lambda part: render_all(part, chat), some)):
            if len(document["ids"]) > max_length:
                dropped.append(document["id"])
            else:
                documents.append(document)
    return documents, dropped


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Rows refer to nothing that refers back, and looking for that in all of them again and again
    would take up to a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def render(row: Mapping[str, Any], chat: Chat) -> dict[str, Any]:
    """``render_all`` of one row."""
    return render_all([row], chat)[0]


def render_all(rows: Sequence[Mapping[str, Any]], chat: Chat) -> list[dict[str, Any]]:
    """Conversations as {id, source, kind, ids, trained}; ``trained`` marks the target tokens.

    Raises DataError when nothing is trained, or an answer that is complete does not end with the end
    token. A safety primer (thoughts, no response) has none.
    """
    texts = chat.prompt_texts([row["messages"] for row in rows])
    to_encode: list[str] = []
    for row, text in zip(rows, texts, strict=True):
        if row.get("response_ids") is not None:  # the base's own tokens, never retokenised
            continue
        if row["response"] is None and row.get("complete", True):
            raise DataError(f"row {row['id']}: has no response; anchor rows need the anchor stage")
        to_encode.append(chat.target_text(row.get("think"), row["response"], prompt=text))
    ids = chat.encode([*texts, *to_encode])
    encoded = iter(ids[len(rows) :])
    return [_document(row, prompt, encoded, chat) for row, prompt in zip(rows, ids, strict=False)]


def _document(
    row: Mapping[str, Any], prompt: list[int], encoded: Iterator[list[int]], chat: Chat
) -> dict[str, Any]:
    if row.get("response_ids") is not None:
        target = [int(token) for token in row["response_ids"]]
    else:
        target = [*next(encoded), *([] if row["response"] is None else [chat.end_id])]
    complete = row.get("complete", True)
    if not target or (complete and target[-1] != chat.end_id):
        raise DataError(
            f"row {row['id']}: the target does not end with the end token {chat.end_id}"
        )
    bos = chat.tokenizer.bos_token_id
    if bos is not None and bos != chat.end_id and prompt[:2] == [bos, bos]:
        raise DataError(f"row {row['id']}: the prompt begins with two BOS tokens")
    return {
        "id": row["id"],
        "source": row["source"],
        "kind": KINDS[row["kind"]],
        "ids": prompt + target,
        "trained": [0] * len(prompt) + [1] * len(target),
    }


def _strata(documents: list[dict[str, Any]]) -> list[int]:
    number = {source: n for n, source in enumerate(sorted({d["source"] for d in documents}))}
    return [number[d["source"]] for d in documents]


def write_tokens(path: Path, train: list[dict[str, Any]], dev: list[dict[str, Any]]) -> None:
    """Flat arrays of both splits: ids int32 [T], trained uint8 [T], starts int64 [D+1], kind [D]."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for split, documents in (("train", train), ("dev", dev)):
        lengths = [len(d["ids"]) for d in documents]
        for name, dtype in (("ids", np.int32), ("trained", np.uint8)):
            flat = chain.from_iterable(d[name] for d in documents)
            arrays[f"{split}.{name}"] = np.fromiter(flat, dtype, count=sum(lengths))
        arrays[f"{split}.starts"] = np.cumsum([0, *lengths], dtype=np.int64)
        arrays[f"{split}.kind"] = np.array([d["kind"] for d in documents], dtype=np.uint8)
    save_file(arrays, path)


def sheet(documents: list[dict[str, Any]], chat: Chat) -> str:
    """Sample documents decoded, with the trained span between >>> and <<<."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        by_source.setdefault(document["source"], []).append(document)
    each = max(1, SHEET_ROWS // len(by_source))
    blocks = ["What is trained: the tokens between >>> and <<<, and nothing else.\n"]
    for source, rows in by_source.items():
        for document in rows[:each]:
            ids, trained = document["ids"], document["trained"]
            at = trained.index(1)
            prompt = chat.tokenizer.decode(ids[:at])
            target = chat.tokenizer.decode(ids[at:])
            blocks.append(
                f"--- {document['id']} ({source}; {len(ids)} tokens, {len(ids) - at} trained)\n"
                f"{prompt}>>>{target}<<<\n"
            )
    return "\n".join(blocks)


if __name__ == "__main__":
    import sys

    sys.exit(main("pack", run))
